"""Routing statistics: what placement is decided by.

T tokens, L MoE layers, K choices, E experts, R source ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from placement.preferences import Preferences
from placement.trace import Trace

FORMAT = 1
COUNTS = ("load_LE", "pair_LEE", "coactive_LEE", "source_LRE")
KINDS = ("by_token", "by_domain")
Ids = Tensor | npt.NDArray[np.integer]


class RoutingStats:
    """Counts of what the routers of a model chose: mergeable over ranks and time.

    Whole numbers in float64, exact up to 2**53; after `decay` they are weighted counts.

    Attributes:
        load_LE: rows per expert.
        pair_LEE: [L-1, E, E], rows of an expert of layer l and one of layer l+1 by one token: a
            token with K choices in both adds K * K.
        coactive_LEE: tokens that chose both experts; symmetric, 0 on the diagonal.
        source_LRE: rows per source rank and expert.
        tokens: observed, counted with layer 0. top_k: largest number of choices seen.
        by_token, by_domain: `Preferences` of token ids and of domains; empty unless given.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(self, num_layers: int, num_experts: int, num_ranks: int = 1) -> None:
        for name, size in (
            ("num_layers", num_layers),
            ("num_experts", num_experts),
            ("num_ranks", num_ranks),
        ):
            if size < 1:
                raise ValueError(f"stats.{name} ({size}) must be >= 1")
        self.num_layers, self.num_experts, self.num_ranks = num_layers, num_experts, num_ranks
        square = (num_experts, num_experts)
        self.load_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.pair_LEE = torch.zeros(num_layers - 1, *square, dtype=torch.float64)
        self.coactive_LEE = torch.zeros(num_layers, *square, dtype=torch.float64)
        self.source_LRE = torch.zeros(num_layers, num_ranks, num_experts, dtype=torch.float64)
        self.tokens, self.top_k = 0.0, 0
        self.by_token = Preferences(num_layers, num_experts)
        self.by_domain = Preferences(num_layers, num_experts)
        self._before: tuple[int, int, npt.NDArray[np.int64]] | None = None

    @property
    def rows_per_token_L(self) -> npt.NDArray[np.float64]:
        """Mean choices of a token in every layer, float64 [L]; fewer than top_k where some are "no
        expert". 1 before anything is observed."""
        rows_L = self.load_LE.sum(1).numpy()
        return np.divide(
            rows_L, self.tokens, out=np.ones_like(rows_L), where=rows_L * self.tokens > 0
        )

    @classmethod
    def of_trace(cls, trace: Trace, num_ranks: int | None = None) -> RoutingStats:
        """The statistics of a whole trace.

        Args:
            num_ranks: that its tokens come from; default: as many as it names.
        """
        source_T = trace.source_T if trace.source_T is not None else np.zeros(1, dtype=np.int64)
        if num_ranks is None:
            num_ranks = int(source_T.max(initial=0)) + 1
        stats = cls(trace.num_layers, trace.num_experts, num_ranks)
        source = 0 if trace.source_T is None else source_T
        stats.observe_trace(trace.ids_TLK, source, token_T=trace.token_T, domain_T=trace.domain_T)
        return stats

    def observe(
        self,
        layer: int,
        ids_TK: Ids,
        source_rank: int | Ids = 0,
        *,
        token_T: Ids | None = None,
        domain_T: Ids | None = None,
    ) -> None:
        """Count one layer's choices.

        Transitions are counted if the call before was the previous layer's, for the same tokens.

        Args:
            ids_TK: expert ids, num_experts for "no expert"; a token's choices are distinct.
            source_rank: of all tokens, or int [T]. token_T, domain_T: for the preferences.

        Raises:
            ValueError: for a layer, an id or a rank out of range, or if the layer before had
                another number of tokens.
        """
        ids = _numpy(ids_TK)
        if ids.ndim != 2:
            raise ValueError(f"ids must be [tokens, choices], got shape {ids.shape}")
        self._check(layer, ids)
        sources = np.broadcast_to(_numpy(source_rank), len(ids))
        if len(ids) and not 0 <= sources.min() <= sources.max() < self.num_ranks:
            raise ValueError(
                f"source_rank ({int(sources.max())}) must be >= 0 and < {self.num_ranks}, the "
                f"ranks of these statistics"
            )
        by_source_RE = _together(sources[:, None], ids, self.num_ranks, self.num_experts)
        self.source_LRE[layer] += by_source_RE
        self.load_LE[layer] += by_source_RE.sum(0)
        if ids.shape[1] > 1:
            together_EE = _together(ids, ids, self.num_experts, self.num_experts)
            self.coactive_LEE[layer] += together_EE.fill_diagonal_(0)
        if self._before is not None and self._before[0] == layer - 1:
            self._count_pairs(layer, ids)
        self._before = (layer, len(ids), ids) if layer + 1 < self.num_layers else None
        if layer == 0:
            self.tokens += len(ids)
        self.top_k = max(self.top_k, ids.shape[1])
        for preferences, kind_T in ((self.by_token, token_T), (self.by_domain, domain_T)):
            if kind_T is not None:
                preferences.observe(layer, ids, _numpy(kind_T))

    def observe_trace(
        self,
        ids_TLK: Ids,
        source_rank: int | Ids = 0,
        *,
        token_T: Ids | None = None,
        domain_T: Ids | None = None,
    ) -> None:
        """Count all layers of the same tokens, [tokens, layers, k] or [tokens, layers].

        Raises:
            ValueError: as `observe`, and for another number of layers.
        """
        ids = _numpy(ids_TLK)
        ids = ids[:, :, None] if ids.ndim == 2 else ids
        if ids.ndim != 3 or ids.shape[1] != self.num_layers:
            raise ValueError(
                f"a trace for these statistics is [tokens, {self.num_layers}, k], got {ids.shape}"
            )
        self._before = None
        for layer in range(self.num_layers):
            about: dict[str, Any] = {"token_T": token_T, "domain_T": domain_T}
            self.observe(layer, ids[:, layer], source_rank, **about)

    def merge(self, other: RoutingStats) -> None:
        """Add another's counts, in place.

        Raises:
            ValueError: if the other is of another model or number of ranks.
        """
        mine = (self.num_layers, self.num_experts, self.num_ranks)
        theirs = (other.num_layers, other.num_experts, other.num_ranks)
        if mine != theirs:
            raise ValueError(
                f"cannot merge statistics of (layers, experts, ranks) = {theirs} into {mine}"
            )
        for name in COUNTS:
            getattr(self, name).add_(getattr(other, name))
        for name in KINDS:
            getattr(self, name).add(getattr(other, name))
        self.tokens += other.tokens
        self.top_k = max(self.top_k, other.top_k)

    def decay(self, factor: float) -> None:
        """Multiply all counts, so that the past fades.

        Raises:
            ValueError: unless 0 < factor <= 1.
        """
        if not 0 < factor <= 1:
            raise ValueError(f"stats decay ({factor}) must be > 0 and <= 1")
        for name in COUNTS:
            getattr(self, name).mul_(factor)
        for name in KINDS:
            getattr(self, name).decay(factor)
        self.tokens *= factor

    def sources(self, num_ranks: int) -> Tensor:
        """Rows per source rank and expert, float64 [L, R, E]; evenly if recorded on others."""
        if num_ranks == self.num_ranks:
            return self.source_LRE
        return (self.load_LE[:, None] / num_ranks).repeat(1, num_ranks, 1)

    def with_sources(self, num_ranks: int) -> RoutingStats:
        """A copy whose rows come from so many ranks, as in `sources`."""
        other = RoutingStats(self.num_layers, self.num_experts, num_ranks)
        for name in COUNTS:
            counts = self.sources(num_ranks) if name == "source_LRE" else getattr(self, name)
            getattr(other, name).copy_(counts)
        for name in KINDS:
            getattr(other, name).add(getattr(self, name))
        other.tokens, other.top_k = self.tokens, self.top_k
        return other

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Refuse statistics of another model.

        Raises:
            ValueError: naming both shapes.
        """
        if (self.num_layers, self.num_experts) != (num_layers, num_experts):
            raise ValueError(
                f"the statistics are of {self.num_layers} MoE layers x {self.num_experts} experts, "
                f"the model has {num_layers} x {num_experts}; record them with this model"
            )

    def check(self) -> None:
        """Refuse counts that no routing can have.

        Raises:
            ValueError: naming the array, the layer and what does not add up.
        """
        for name in COUNTS:
            counts = getattr(self, name)
            if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
                raise ValueError(f"stats.{name} has counts that are negative or not finite")
        load_LE, tolerance = self.load_LE, 1e-9 * float(self.load_LE.sum()) + 1e-9
        unequal = (self.source_LRE.sum(1) - load_LE).abs() > tolerance
        _refuse(unequal, "source_LRE", "does not sum to load_LE over the ranks")
        coactive = self.coactive_LEE
        asymmetric = (coactive - coactive.transpose(1, 2)).abs().sum(2) > tolerance
        _refuse(asymmetric, "coactive_LEE", "is not symmetric")
        diagonal = coactive.diagonal(dim1=1, dim2=2) != 0
        _refuse(diagonal, "coactive_LEE", "counts an expert with itself")
        others = max(0, self.top_k - 1)
        too_many = coactive.sum(2) > others * load_LE + tolerance
        _refuse(too_many, "coactive_LEE", f"has more than {others} others per row")
        for side, loads in ((2, load_LE[:-1]), (1, load_LE[1:])):
            too_many = self.pair_LEE.sum(side) > self.top_k * loads + tolerance
            _refuse(too_many, "pair_LEE", f"has more than {self.top_k} transitions per row")

    def save(self, path: str | Path) -> None:
        """Write all counts as one .npz."""
        arrays = {name: getattr(self, name).numpy() for name in COUNTS}
        for name in KINDS:
            preferences = getattr(self, name)
            table = preferences.table.tocoo()
            arrays[f"{name}_kind"], arrays[f"{name}_column"] = table.coords
            arrays[f"{name}_rows"] = table.data
            arrays[f"{name}_tokens"] = preferences.tokens_G
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, format=FORMAT, tokens=self.tokens, top_k=self.top_k, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> RoutingStats:
        """Read what `save` wrote, and check it.

        Raises:
            ValueError: if the file is not readable, is of a newer format, or its counts do not
                add up.
        """
        try:
            arrays = dict(np.load(path, allow_pickle=False))
            newer = int(arrays["format"]) > FORMAT
            layers, ranks, experts = arrays["source_LRE"].shape
            stats = cls(layers, experts, ranks)
            for name in COUNTS:
                getattr(stats, name).copy_(torch.from_numpy(arrays[name]))
            for name in KINDS:
                _fill(getattr(stats, name), arrays, name)
            stats.tokens, stats.top_k = float(arrays["tokens"]), int(arrays["top_k"])
        except (
            OSError,
            KeyError,
            TypeError,
            RuntimeError,
            EOFError,
            ValueError,
            BadZipFile,
        ) as error:
            raise ValueError(f"stats {path}: not a readable statistics file ({error})") from error
        if newer:
            raise ValueError(
                f"stats {path}: format {arrays['format']} is newer than {FORMAT}, the newest this "
                f"version reads; update Evenkeel"
            )
        try:
            stats.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}; record the statistics again") from error
        return stats

    def _check(self, layer: int, ids: npt.NDArray[np.int64]) -> None:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer ({layer}) must be >= 0 and < {self.num_layers}")
        if ids.size and not 0 <= ids.min() <= ids.max() <= self.num_experts:
            raise ValueError(
                f"expert ids of layer {layer} ({int(ids.min())}..{int(ids.max())}) must be >= 0 "
                f"and <= {self.num_experts}, which means no expert"
            )

    def _count_pairs(self, layer: int, ids: npt.NDArray[np.int64]) -> None:
        assert self._before is not None
        _, tokens, before = self._before
        if tokens != len(ids):
            raise ValueError(
                f"layer {layer} has {len(ids)} tokens, layer {layer - 1} had {tokens}; observe the "
                f"layers of one batch in order"
            )
        self.pair_LEE[layer - 1] += _together(before, ids, self.num_experts, self.num_experts)


def _together(
    first_TJ: npt.NDArray[np.int64],
    second_TK: npt.NDArray[np.int64],
    num_first: int,
    num_second: int,
) -> Tensor:
    """Tokens that have both an id of the first kind and one of the second, float64.

    Args:
        first_TJ, second_TK: ids of every token. num_first, num_second: how many there are, and the
            id of "none", which is not counted.
    """
    rows, columns = num_first + 1, num_second + 1
    counts = np.zeros(rows * columns, dtype=np.int64)
    for first_T in first_TJ.T:
        both_TK = first_T[:, None] * columns + second_TK
        counts += np.bincount(both_TK.ravel(), minlength=rows * columns)
    return torch.from_numpy(counts.reshape(rows, columns)[:num_first, :num_second]).double()


def _numpy(values: Any) -> npt.NDArray[np.int64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values).astype(np.int64, copy=False)


def _fill(preferences: Preferences, arrays: dict[str, Any], name: str) -> None:
    tokens_G = arrays[f"{name}_tokens"]
    entries = (arrays[f"{name}_rows"], (arrays[f"{name}_kind"], arrays[f"{name}_column"]))
    width = preferences.num_layers * preferences.num_experts
    preferences.add_rows(sparse.coo_array(entries, (len(tokens_G), width)), tokens_G)


def _refuse(wrong: Tensor, name: str, what: str) -> None:
    if bool(wrong.any()):
        layer, expert = wrong.nonzero()[0].tolist()[:2]
        raise ValueError(f"stats.{name} {what} (layer {layer}, expert {expert})")
