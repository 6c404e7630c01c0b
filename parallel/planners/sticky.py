"""Borrowed experts that stay for an optimizer step, foreseen from the steps before.

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
from parallel.planners.inputs import check_inputs, check_nodes, row_limit
from parallel.planners.materialize import keep_most
from parallel.planners.stateful import StatefulPlanner, check_decay, decayed
from parallel.planners.waterfill import TOLERANCE, waterfill
from placement.topology import Topology


class Sticky:
    """Makes a planner's choice of borrowed experts last for all micro-batches of a step.

    Weights change once per optimizer step, so an expert that stays borrowed costs one transfer
    for all of them. Rows are water-filled over homes and what is held. Only where that leaves a
    rank too full is the planner asked for a plan, and only if its plan is better is what it
    borrows held from then on: experts with rows on such ranks, and the others if those do not
    do. So the fullest rank stays within the slack or the planner's own plan. Each step starts
    from the planner's choice for the average counts of the steps before; what has cooled off
    is let go. A StatefulPlanner.

    Args:
        planner: a stateless planner.
        slack: a rank may compute (1 + slack) times the mean rows, rounded up.
        decay: weight of the past in the average over steps.
        predict: whether a step starts from the average; else it starts with nothing held.
        max_borrowed: experts that one rank holds at most.
        node_of_R: node of every rank; None means one node.

    Raises:
        ValueError: for a stateful planner, negative slack or max_borrowed, or a decay outside
            [0, 1).
    """

    def __init__(
        self,
        planner: Planner,
        *,
        slack: float = 0.1,
        decay: float = 0.5,
        predict: bool = True,
        max_borrowed: int | None = None,
        node_of_R: Sequence[int] | None = None,
    ) -> None:
        if isinstance(planner, StatefulPlanner):
            raise ValueError(
                f"planner.planner ({type(planner).__name__}) must be stateless: Sticky asks it "
                "for plans of its own choosing"
            )
        if slack < 0:
            raise ValueError(f"planner.slack ({slack}) must be >= 0; 0 levels as far as it goes")
        if max_borrowed is not None and max_borrowed < 0:
            raise ValueError(
                f"planner.max_borrowed ({max_borrowed}) must be >= 0; None is no bound"
            )
        check_decay("planner.decay", decay)
        self.planner, self.slack, self.decay, self.predict = planner, slack, decay, predict
        self.max_borrowed, self.node_of_R = max_borrowed, node_of_R
        self._average_RE: np.ndarray | None = None
        self._home_E = np.empty(0, dtype=np.int64)  # of the held experts; empty before a step
        self._held_RE = np.zeros((0, 0), dtype=bool)

    @property
    def stateless(self) -> Planner:
        """The planner that it asks."""
        return self.planner

    def for_layer(self, layer: int) -> Sticky:
        """An independent planner for one MoE layer."""
        return deepcopy(self)

    def for_topology(self, topology: Topology, bytes_per_parameter: float = 6.0) -> Sticky:
        """A new planner with the same settings for these nodes and speeds, the inner one too.

        Args:
            topology: nodes and speeds. bytes_per_parameter: see Topology.rows_worth_moving.
        """
        planner = self.planner
        if hasattr(planner, "for_topology"):
            planner = planner.for_topology(topology, bytes_per_parameter)
        return Sticky(
            planner,
            slack=self.slack,
            decay=self.decay,
            predict=self.predict,
            max_borrowed=self.max_borrowed,
            node_of_R=topology.node_of_R,
        )

    def next_step(self, counts: Sequence[Tensor]) -> None:
        """Learn from the step before and let go of what it held.

        Args:
            counts: int64 [R, E] of every micro-batch of the layer in the step before.
        """
        self._home_E = np.empty(0, dtype=np.int64)
        if counts:
            mean_RE = torch.stack(list(counts)).sum(dim=0).numpy() / len(counts)
            self._average_RE = decayed(self._average_RE, mean_RE, self.decay)

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        """Plan one micro-batch of one layer; the Planner protocol.

        Raises:
            ValueError: for counts or homes that do not fit each other or the steps learned from.
        """
        counts, homes = check_inputs(counts_RE, home_E)
        if self.node_of_R is not None:
            check_nodes(self.node_of_R, len(counts))
        load_E = counts.sum(axis=0)
        if not np.array_equal(self._home_E, homes.home_E):
            self._start_step(counts.shape, home_E)
            self._home_E = homes.home_E
        away_N3, load_R = self._share(load_E, homes.home_E)
        limit = row_limit(1 + self.slack, int(load_E.sum()), len(counts))
        if load_R.max() > limit:
            plan = self.planner(counts_RE, home_E)
            limit = max(limit, int(plan.load_R().max()))
            rows_RE = _rows(load_E, homes.home_E, away_N3, len(counts))
            is_crowded_E = rows_RE[load_R > limit].sum(axis=0) > 0
            for may_hold_E in (is_crowded_E, np.ones_like(is_crowded_E)):
                if load_R.max() > limit:
                    self._hold(plan, may_hold_E)
                    away_N3, load_R = self._share(load_E, homes.home_E)
        copies_N2 = np.argwhere(self._held_RE.T)
        borrowed = np.insert(copies_N2, 1, homes.home_E[copies_N2[:, 0]], axis=1)
        return assemble_checked(counts, homes, away_N3, self.node_of_R, borrowed, keep=True)

    def _start_step(self, shape: tuple[int, ...], home_E: Tensor) -> None:
        self._held_RE = np.zeros(shape, dtype=bool)
        if self.predict and self._average_RE is not None:
            if self._average_RE.shape != shape:
                raise ValueError(
                    f"counts_RE is {shape}, in the steps before it was {self._average_RE.shape}; "
                    "take a planner of its own for every layer (for_layer)"
                )
            expected_RE = torch.from_numpy(np.rint(self._average_RE).astype(np.int64))
            self._hold(self.planner(expected_RE, home_E), np.ones(shape[1], dtype=bool))

    def _share(self, load_E: np.ndarray, home_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        copies_N2 = np.argwhere(self._held_RE.T)
        tolerance = min(self.slack, TOLERANCE)
        return waterfill(load_E, home_E, copies_N2, len(self._held_RE), tolerance=tolerance)

    def _hold(self, plan: DispatchPlan, may_hold_E: np.ndarray) -> None:
        """Hold what a plan borrows, as far as there is room: first what computes most rows."""
        expert, _, borrower = plan.borrowed.numpy().T
        is_new_RE = np.zeros_like(self._held_RE)
        is_new_RE[borrower, expert] = True
        is_new_RE &= ~self._held_RE & may_hold_E
        if self.max_borrowed is not None:
            rows_RE = np.zeros(is_new_RE.shape, dtype=np.int64)
            expert, _, computing, rows = plan.rows.numpy().T
            np.add.at(rows_RE, (computing, expert), rows)
            keep_most(is_new_RE, rows_RE, self.max_borrowed - self._held_RE.sum(axis=1))
        self._held_RE |= is_new_RE


def _rows(
    load_E: np.ndarray, home_E: np.ndarray, away_N3: np.ndarray, num_ranks: int
) -> np.ndarray:
    """Rows that every rank computes of every expert, int64 [R, E]."""
    expert_N, rank_N, away_N = away_N3.T
    rows_RE = np.zeros((num_ranks, len(load_E)), dtype=np.int64)
    rows_RE[home_E, np.arange(len(load_E))] = load_E
    np.subtract.at(rows_RE, (home_E[expert_N], expert_N), away_N)
    rows_RE[rank_N, expert_N] = away_N
    return rows_RE
