"""Replicas of busy experts that stay for a window of steps, water-filled every micro-batch.

E experts, R ranks, N (expert, rank) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from parallel.plan import DispatchPlan, Planner
from parallel.planners.assemble import assemble_checked
from parallel.planners.home import home_plan
from parallel.planners.inputs import check_inputs, check_nodes
from parallel.planners.stateful import check_decay, decayed
from parallel.planners.waterfill import waterfill
from placement.topology import Topology


class Replicated:
    """Copies of the experts that were busiest, after EPLB, chosen anew every few steps.

    Which experts get copies follows from the counts of earlier steps; how many rows each copy
    computes, from those of the micro-batch. Before any step was learned from there are none.
    A StatefulPlanner.

    Args:
        slots: copies that every rank holds.
        window: optimizer steps that copies stay.
        decay: weight of the past in the average over steps.
        node_of_R: node of every rank; None means one node.
        within_node: copies stay on the node of their expert's home, as in EPLB's hierarchical
            policy; then weights never cross nodes.

    Raises:
        ValueError: for slots or window below 1 or a decay outside [0, 1).
    """

    def __init__(
        self,
        slots: int,
        *,
        window: int = 16,
        decay: float = 0.9,
        node_of_R: Sequence[int] | None = None,
        within_node: bool = False,
    ) -> None:
        for name, value in (("slots", slots), ("window", window)):
            if value < 1:
                raise ValueError(f"planner.{name} ({value}) must be >= 1")
        check_decay("planner.decay", decay)
        self.slots, self.window, self.decay = slots, window, decay
        self.node_of_R, self.within_node = node_of_R, within_node
        self._average_E: np.ndarray | None = None
        self._num_steps = 0
        self._home_E = np.empty(0, dtype=np.int64)  # of the copies; empty when they are due
        self._copies_N2 = np.empty((0, 2), dtype=np.int64)

    @property
    def stateless(self) -> Planner:
        """Without copies: the home plan."""
        return home_plan

    def for_layer(self, layer: int) -> Replicated:
        """An independent planner for one MoE layer."""
        return deepcopy(self)

    def for_topology(self, topology: Topology, bytes_per_parameter: float = 6.0) -> Replicated:
        """A new planner with the same settings for these nodes.

        Args:
            topology: which ranks share a node.
            bytes_per_parameter: has no say in which experts get copies.
        """
        return Replicated(
            self.slots,
            window=self.window,
            decay=self.decay,
            node_of_R=topology.node_of_R,
            within_node=self.within_node,
        )

    def next_step(self, counts: Sequence[Tensor]) -> None:
        """Learn from the step before; every `window` steps the copies are chosen anew.

        Args:
            counts: int64 [R, E] of every micro-batch of the layer in the step before.
        """
        if not counts:
            return
        load_E = torch.stack(list(counts)).sum(dim=(0, 1)).numpy()
        self._average_E = decayed(self._average_E, load_E, self.decay)
        if self._num_steps % self.window == 0:
            self._home_E = np.empty(0, dtype=np.int64)
        self._num_steps += 1

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        """Plan one micro-batch of one layer; the Planner protocol.

        Raises:
            ValueError: for counts or homes that do not fit each other or the steps learned from.
        """
        counts, homes = check_inputs(counts_RE, home_E)
        num_ranks, num_experts = counts.shape
        if self.node_of_R is not None:
            check_nodes(self.node_of_R, num_ranks)
        if self._average_E is not None and not np.array_equal(self._home_E, homes.home_E):
            if len(self._average_E) != num_experts:
                raise ValueError(
                    f"counts_RE has {num_experts} experts, the steps before had "
                    f"{len(self._average_E)}; take a planner of its own for every layer (for_layer)"
                )
            node_of_R = self.node_of_R if self.within_node and self.node_of_R else [0] * num_ranks
            self._copies_N2 = choose_copies(self._average_E, homes.home_E, node_of_R, self.slots)
            self._home_E = homes.home_E
        copies_N2 = self._copies_N2
        away_N3, _ = waterfill(counts.sum(axis=0), homes.home_E, copies_N2, num_ranks)
        borrowed = np.insert(copies_N2, 1, homes.home_E[copies_N2[:, 0]], axis=1)
        return assemble_checked(counts, homes, away_N3, self.node_of_R, borrowed, keep=True)


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
