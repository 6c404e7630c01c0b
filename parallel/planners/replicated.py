"""Replicas of busy experts that stay for a window of steps, water-filled every micro-batch.

E experts, R ranks, N (expert, rank) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parallel.plan import DispatchPlan, Planner
from parallel.planners.assemble import assemble_checked
from parallel.planners.home import home_plan
from parallel.planners.inputs import check_inputs, check_nodes
from parallel.planners.stateful import check_decay, decayed
from parallel.planners.waterfill import waterfill
from placement.replicas import Replicas
from placement.topology import Topology

NO_COPIES_N2 = np.empty((0, 2), dtype=np.int64)


class Replicated:
    """Copies of the experts that were busiest, after EPLB, chosen anew every few steps.

    Which experts get copies follows from the counts of earlier steps; how many rows each copy
    computes, from those of the micro-batch. Before any step was learned from there are none, or
    those of `copies`, which stay for the first window. A StatefulPlanner.

    Args:
        slots: copies that every rank holds.
        window: optimizer steps that copies stay; None: those of `copies` stay for good.
        decay: weight of the past in the average over steps.
        node_of_R: node of every rank; None means one node.
        within_node: copies stay on the node of their expert's home, as in EPLB's hierarchical
            policy; then weights never cross nodes.
        copies: to begin with, or a file of them (`Replicas.save`). A copy whose expert has come
            home to its rank, or with within_node has left its node, is left out.

    Raises:
        ValueError: for slots or window below 1, a decay outside [0, 1), a window of None without
            copies, and more copies on a rank than slots.
    """

    def __init__(
        self,
        slots: int,
        *,
        window: int | None = 16,
        decay: float = 0.9,
        node_of_R: Sequence[int] | None = None,
        within_node: bool = False,
        copies: str | Path | Replicas | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"planner.{name} ({value}) must be >= 1")
        check_decay("planner.decay", decay)
        if isinstance(copies, (str, Path)):
            copies = Replicas.load(copies)
        if copies is None and window is None:
            raise ValueError(
                "planner.window (null) keeps planner.copies for good, but that is null too; give "
                "a file of copies, or a number of steps"
            )
        if copies is not None and copies.slots > slots:
            raise ValueError(
                f"planner.slots ({slots}) must be >= {copies.slots}, the most that planner.copies "
                f"gives one rank; raise it, or choose copies for fewer slots"
            )
        self.slots, self.window, self.decay = slots, window, decay
        self.node_of_R, self.within_node, self.copies = node_of_R, within_node, copies
        self._layer = 0
        self._given = copies  # as long as they stay
        self._steps_left = 1 if copies is None else window  # to learn from until a new choice
        self._average_E: np.ndarray | None = None
        self._home_E = np.empty(0, dtype=np.int64)  # of the copies; empty when they are due
        self._copies_N2 = NO_COPIES_N2

    @property
    def stateless(self) -> Planner:
        """Without copies: the home plan."""
        return home_plan

    def for_layer(self, layer: int) -> Replicated:
        """An independent planner for one MoE layer."""
        planner = deepcopy(self)
        planner._layer = layer
        return planner

    def for_topology(self, topology: Topology, bytes_per_parameter: float = 6.0) -> Replicated:
        """A new planner with the same settings for these nodes.

        Args:
            topology: which ranks share a node.
            bytes_per_parameter: has no say in which experts get copies.

        Raises:
            ValueError: for copies that were chosen for other ranks, or that within_node forbids.
        """
        if self.copies is not None:
            self.copies.check_fit(topology, self.within_node)
        return Replicated(
            self.slots,
            window=self.window,
            decay=self.decay,
            node_of_R=topology.node_of_R,
            within_node=self.within_node,
            copies=self.copies,
        )

    def next_step(self, counts: Sequence[Tensor]) -> None:
        """Learn from the step before; copies are chosen anew after the first, or after the first
        window where there were some to begin with, and then every `window` steps.

        Args:
            counts: int64 [R, E] of every micro-batch of the layer in the step before.
        """
        if not counts:
            return
        load_E = torch.stack(list(counts)).sum(dim=(0, 1)).numpy()
        self._average_E = decayed(self._average_E, load_E, self.decay)
        if self._steps_left is None:
            return
        self._steps_left -= 1
        if not self._steps_left:
            self._given, self._steps_left = None, self.window
            self._home_E = np.empty(0, dtype=np.int64)

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        """Plan one micro-batch of one layer; the Planner protocol.

        Raises:
            ValueError: for counts or homes that do not fit each other, the steps learned from, or
                the copies given.
        """
        _, homes = check_inputs(counts_RE, home_E)
        if not np.array_equal(self._home_E, homes.home_E):
            self._copies_N2 = self._choose(homes.home_E, len(counts_RE))
            self._home_E = homes.home_E
        return self.with_copies(counts_RE, home_E, self._copies_N2)

    def with_copies(self, counts_RE: Tensor, home_E: Tensor, copies_N2: np.ndarray) -> DispatchPlan:
        """The plan of one micro-batch for the caller's own copies.

        Args:
            copies_N2: int64 [N, 2] pairs (expert, rank) of copies besides home.

        Raises:
            ValueError: for counts, homes and copies that do not fit each other.
        """
        counts, homes = check_inputs(counts_RE, home_E)
        if self.node_of_R is not None:
            check_nodes(self.node_of_R, len(counts))
        away_N3, _ = waterfill(counts.sum(axis=0), homes.home_E, copies_N2, len(counts))
        borrowed = np.insert(copies_N2, 1, homes.home_E[copies_N2[:, 0]], axis=1)
        return assemble_checked(counts, homes, away_N3, self.node_of_R, borrowed, keep=True)

    def by_load(self, load_E: np.ndarray, home_E: np.ndarray, num_ranks: int) -> np.ndarray:
        """The copies that it takes by load: `choose_copies` with its slots, within its bounds."""
        return choose_copies(load_E, home_E, self._bounds(num_ranks), self.slots)

    def _choose(self, home_E: np.ndarray, num_ranks: int) -> np.ndarray:
        if self._given is not None:
            copies_N2 = self._given.of_layer(self._layer, home_E, num_ranks)
            bound_R = np.array(self._bounds(num_ranks))
            return copies_N2[bound_R[home_E[copies_N2[:, 0]]] == bound_R[copies_N2[:, 1]]]
        if self._average_E is None:
            return NO_COPIES_N2
        if len(self._average_E) != len(home_E):
            raise ValueError(
                f"counts_RE has {len(home_E)} experts, the steps before had "
                f"{len(self._average_E)}; take a planner of its own for every layer (for_layer)"
            )
        return self.by_load(self._average_E, home_E, num_ranks)

    def _bounds(self, num_ranks: int) -> Sequence[int]:
        """What of every rank copies must share with their home: its node, or nothing."""
        return self.node_of_R if self.within_node and self.node_of_R else [0] * num_ranks


def choose_copies(
    load_E: np.ndarray, home_E: np.ndarray, node_of_R: Sequence[int], slots: int
) -> np.ndarray:
    """Copies besides home that fill every rank's slots, within nodes.

    EPLB's rule says whose turn it is: the expert with most load per copy. The copy goes at
    once to the rank with the lowest load, if copies share an expert's load evenly, among those
    with a free slot that do not hold the expert; so no slot stays free that could help. Experts
    without load get no copies.

    Args:
        load_E: [E] expected load. home_E: int64 [E]. node_of_R: node of every rank.
        slots: of every rank.

    Returns:
        int64 [N, 2] (expert, rank), sorted.
    """
    num_ranks, num_experts = len(node_of_R), len(load_E)
    share_E = load_E.astype(np.float64)
    load_R = np.bincount(home_E, weights=share_E, minlength=num_ranks)
    free_R = np.full(num_ranks, slots)
    holds_RE = np.zeros((num_ranks, num_experts), dtype=bool)
    holds_RE[home_E, np.arange(num_experts)] = True
    may_hold_RE = np.equal.outer(node_of_R, np.take(node_of_R, home_E))
    turn_E = share_E.copy()
    while turn_E.max() > 0:
        expert = int(turn_E.argmax())
        fits_R = may_hold_RE[:, expert] & ~holds_RE[:, expert] & (free_R > 0)
        if not fits_R.any():
            turn_E[expert] = 0
            continue
        rank = int(np.where(fits_R, load_R, np.inf).argmin())
        load_R[holds_RE[:, expert]] -= share_E[expert]
        holds_RE[rank, expert] = True
        share_E[expert] = turn_E[expert] = load_E[expert] / holds_RE[:, expert].sum()
        load_R[holds_RE[:, expert]] += share_E[expert]
        free_R[rank] -= 1
    holds_RE[home_E, np.arange(num_experts)] = False
    return np.argwhere(holds_RE.T)
