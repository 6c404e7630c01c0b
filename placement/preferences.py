"""Which experts each kind of token chooses: kinds are token ids, or domains of text.

G kinds, L MoE layers, E experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse

MOST_ADDED = 1_000_000  # rows that wait to be added to the table


class Preferences:
    """Rows per kind, layer and expert, kept sparse: a token id of a vocabulary meets few experts.

    Attributes:
        tokens_G: float64 tokens seen of every kind; its length is the largest kind seen + 1.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.tokens_G = np.zeros(0)
        self._table = sparse.csr_array((0, num_layers * num_experts), dtype=np.float64)
        self._added: list[npt.NDArray[np.int64]] = []  # kind * L * E + column of single rows
        self._num_added = 0

    @property
    def num_kinds(self) -> int:
        return len(self.tokens_G)

    @property
    def table(self) -> sparse.csr_array:
        """Rows, float64 sparse [G, L * E]; column l * E + e."""
        shape = (self.num_kinds, self._table.shape[1])
        self._table.resize(shape)
        if self._added:
            self._table = self._table + _counted(np.concatenate(self._added), shape)
            self._added, self._num_added = [], 0
        return self._table

    def observe(
        self, layer: int, ids_TK: npt.NDArray[np.int64], kind_T: npt.NDArray[np.int64]
    ) -> None:
        """Add the choices of one layer; the tokens are counted with layer 0.

        Args:
            ids_TK: expert ids; num_experts for "no expert".
        """
        if not len(kind_T):
            return
        self._grow(int(kind_T.max()) + 1)
        if layer == 0:
            self.tokens_G += np.bincount(kind_T, minlength=self.num_kinds)
        first_T = kind_T * self._table.shape[1] + layer * self.num_experts
        added = (first_T[:, None] + ids_TK)[ids_TK < self.num_experts]
        self._added.append(added)
        self._num_added += len(added)
        if self._num_added > max(MOST_ADDED, self._table.nnz):
            _ = self.table

    def add(self, other: Preferences) -> None:
        """Add another's rows."""
        self.add_rows(other.table, other.tokens_G)

    def add_rows(self, table: sparse.sparray, tokens_G: npt.NDArray[np.float64]) -> None:
        """Add a table [G, L * E] and the tokens of every kind."""
        self._grow(len(tokens_G))
        table = sparse.csr_array(table, copy=True)
        table.resize((self.num_kinds, self._table.shape[1]))
        self._table = self.table + table
        self.tokens_G[: len(tokens_G)] += tokens_G

    def decay(self, factor: float) -> None:
        """Multiply all counts."""
        self._table = self.table * factor
        self.tokens_G = self.tokens_G * factor

    def rows_per_rank(self, home_LE: npt.NDArray[np.int64], num_ranks: int) -> npt.NDArray:
        """Mean rows that a token of each kind has on every rank, over all layers, float64 [G, R].

        A kind that was never seen has the mean over all kinds.
        """
        columns = np.arange(home_LE.size)
        at_home = sparse.csr_array(
            (np.ones(home_LE.size), (columns, home_LE.ravel())), (home_LE.size, num_ranks)
        )
        rows_GR = (self.table @ at_home).toarray()
        seen_G = self.tokens_G > 0
        if seen_G.any():
            rows_GR[~seen_G] = rows_GR.sum(0) / self.tokens_G.sum()
        rows_GR[seen_G] /= self.tokens_G[seen_G, None]
        return rows_GR

    def _grow(self, num_kinds: int) -> None:
        if num_kinds > self.num_kinds:
            self.tokens_G = np.pad(self.tokens_G, (0, num_kinds - self.num_kinds))


def _counted(entries: npt.NDArray[np.int64], shape: tuple[int, int]) -> sparse.csr_array:
    """How often each entry of a table (row * width + column) is there, float64."""
    height, width = shape
    if height * width <= len(entries):
        counts = np.bincount(entries, minlength=height * width)
        return sparse.csr_array(counts.reshape(shape).astype(np.float64))
    entry, count = np.unique(entries, return_counts=True)
    table = sparse.coo_array((count.astype(np.float64), (entry // width, entry % width)), shape)
    return sparse.csr_array(table)
