"""Sparse materialisation: a hot expert comes to its rows where that moves fewer bytes.

E experts, R ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from parallel.plan import DispatchPlan
from parallel.planners.assemble import assemble_checked
from parallel.planners.inputs import check_inputs, check_nodes
from placement.topology import Topology

TRIPS = 4  # of a row computed elsewhere: dispatch and combine, forward and backward


@dataclass(frozen=True)
class Materialize:
    """Every rank computes its own rows of the experts of which it has many (FSSDP of Hecate).

    Links are judged apart. An expert that a node borrows crosses to it once (its further ranks
    have it from inside) and keeps all the node's rows inside; a further rank borrows what
    saves bytes inside the node. So links between nodes never carry more than with the home
    plan, and links inside nodes at most what they took over from those.

    Attributes:
        rows_intra: rows of an expert from which a rank borrows it inside its node.
        rows_inter: rows of an expert on all ranks of a node from which one of them, that with
            most, borrows it from another node; ranks of the node with fewer than `rows_intra`
            rows send them there. None, of either: to be found by `for_widths`.
        node_of_R: node of every rank; None means one node.
        max_borrowed: experts that one rank borrows at most, those that save most bytes.

    Raises:
        ValueError: for bounds below 1 (0 for max_borrowed).
    """

    rows_intra: int | None = None
    rows_inter: int | None = None
    node_of_R: tuple[int, ...] | None = None
    max_borrowed: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows_intra", "rows_inter"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"planner.{name} ({value}) must be >= 1")
        if self.max_borrowed is not None and self.max_borrowed < 0:
            raise ValueError(
                f"planner.max_borrowed ({self.max_borrowed}) must be >= 0; None is no bound"
            )

    def for_widths(
        self,
        hidden_width: int,
        expert_parameters: int,
        *,
        bytes_per_value: float = 2.0,
        bytes_per_parameter: float = 6.0,
    ) -> Materialize:
        """Fill in bounds at which moving the expert takes fewer bytes than moving its rows.

        A row travels four times (to the expert and back, and so do the gradients); that rows of
        a token share a trip if one rank computes them is left out. For SwiGLU experts of width F
        in bf16 the bound is 2.25 F rows.

        Args:
            hidden_width: values of a row. expert_parameters: parameters of one expert.
            bytes_per_value: of a row in transit.
            bytes_per_parameter: both ways: 6 for bf16 weights and fp32 gradients, 8 if the
                weights are fetched again for the backward pass.

        Raises:
            ValueError: for a number that is not positive.
        """
        for name, value in (
            ("hidden_width", hidden_width),
            ("expert_parameters", expert_parameters),
            ("bytes_per_value", bytes_per_value),
            ("bytes_per_parameter", bytes_per_parameter),
        ):
            if not value > 0:
                raise ValueError(f"{name} ({value}) must be > 0")
        expert_bytes = expert_parameters * bytes_per_parameter
        rows = int(expert_bytes // (TRIPS * hidden_width * bytes_per_value)) + 1
        return replace(self, rows_intra=self.rows_intra or rows, rows_inter=self.rows_inter or rows)

    def for_topology(self, topology: Topology, bytes_per_parameter: float = 6.0) -> Materialize:
        """The same bounds for these nodes.

        Args:
            topology: which ranks share a node.
            bytes_per_parameter: counts in `for_widths`; the bounds here are in rows already.
        """
        return replace(self, node_of_R=topology.node_of_R)

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        """Plan one micro-batch of one layer; the Planner protocol.

        Raises:
            ValueError: for counts or homes that do not fit, nodes of another number of ranks, or
                bounds that nobody filled in.
        """
        rows_intra, rows_inter = self.rows_intra, self.rows_inter
        if rows_intra is None or rows_inter is None:
            raise ValueError(
                f"planner.rows_intra ({rows_intra}) and planner.rows_inter ({rows_inter}) must be "
                f"numbers; give both, or let for_widths find them"
            )
        counts, homes = check_inputs(counts_RE, home_E)
        node_of_R = self.node_of_R or (0,) * len(counts)
        check_nodes(node_of_R, len(counts))
        nodes = _Nodes(node_of_R)
        every_E = np.arange(len(homes.home_E))
        home_node_E = nodes.node_R[homes.home_E]
        rows_NE = nodes.sum(counts)
        is_inter_NE = rows_NE >= rows_inter
        is_inter_NE[home_node_E, every_E] = False
        node, expert = is_inter_NE.nonzero()
        first = nodes.fullest(counts)[node, expert]

        is_intra_RE = nodes.node_R[:, None] == home_node_E
        borrows_RE = (is_intra_RE | is_inter_NE[nodes.node_R]) & (counts >= rows_intra)
        borrows_RE[homes.home_E, every_E] = False
        borrows_RE[first, expert] = True
        if self.max_borrowed is not None:
            saved_RE = counts - rows_intra
            saved_RE[first, expert] = rows_NE[node, expert] - rows_inter
            keep_most(borrows_RE, saved_RE, np.full(len(counts), self.max_borrowed))

        rows_RE = np.where(borrows_RE, counts, 0)
        others = (rows_NE - nodes.sum(rows_RE))[node, expert]
        first = nodes.fullest(rows_RE)[node, expert]
        rows_RE[first, expert] += np.where(borrows_RE[first, expert], others, 0)

        expert, rank = rows_RE.T.nonzero()
        away_N3 = np.stack([expert, rank, rows_RE[rank, expert]], axis=1)
        return assemble_checked(counts, homes, away_N3, self.node_of_R)


class _Nodes:
    """Sums and maxima over the ranks of every node of tables [R, E]."""

    def __init__(self, node_of_R: tuple[int, ...]) -> None:
        self.node_R = np.unique(node_of_R, return_inverse=True)[1]
        self.by_node = np.argsort(self.node_R, kind="stable")
        self.starts = np.flatnonzero(np.diff(self.node_R[self.by_node], prepend=-1))

    def sum(self, table_RE: np.ndarray) -> np.ndarray:
        """[N, E]."""
        return np.add.reduceat(table_RE[self.by_node], self.starts, axis=0)

    def fullest(self, rows_RE: np.ndarray) -> np.ndarray:
        """The rank with most rows, the first of equals, int64 [N, E]."""
        num_ranks = len(rows_RE)
        last_first = num_ranks - 1 - np.arange(num_ranks)[:, None]
        keys_RE = (rows_RE * num_ranks + last_first)[self.by_node]
        return num_ranks - 1 - np.maximum.reduceat(keys_RE, self.starts, axis=0) % num_ranks


def keep_most(is_kept_RE: np.ndarray, value_RE: np.ndarray, room_R: np.ndarray) -> None:
    """Let every rank keep as many experts as it has room for, in place: those worth most.

    Args:
        is_kept_RE: bool, what each rank would keep. value_RE: of equals the first expert stays.
        room_R: int64, experts for which each rank has room.
    """
    rank, expert = is_kept_RE.nonzero()
    best_first = np.lexsort((expert, -value_RE[rank, expert], rank))
    rank, expert = rank[best_first], expert[best_first]
    is_over = np.arange(len(rank)) - np.searchsorted(rank, rank) >= room_R[rank]
    is_kept_RE[rank[is_over], expert[is_over]] = False
