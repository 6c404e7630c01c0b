"""Choose copies of busy experts by what they save: traffic and the busiest rank, in seconds.

Copies are judged by the plan that the planner makes of them for the mean counts: it shares an
expert's rows out over home and copies, so that the fullest rank is lowest, and gives every copy
the rows of the nearest sources first. Every layer is searched by itself, from no copies and from
those that the planner itself would take by load: add the copy that saves most, exchange and drop
copies, until nothing saves anything; then from the best of these, changed at random.

L MoE layers, E experts, R ranks, N (expert, rank) pairs, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from placement.objective import Cost, ExpertShape, check_fit, journeys, priced, row_operations
from placement.replicas import Replicas
from placement.simulate import expected_rows
from placement.stats import RoutingStats
from placement.step_time import GRADIENT_BYTES, expert_hops
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.traffic import check_mode, expected_sends

CANDIDATES = 8  # judged of all that may be added, those that promise most
JUDGED = 1000  # plans per layer after which the best found is kicked no more
ROUNDS = 4  # at most, of exchanges of every copy
TOLERANCE = 1e-9  # what saves a smaller share saves nothing
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class CopyPlanner(Protocol):
    """What is asked of a planner whose copies are chosen, such as parallel.planners.Replicated.

    Attributes:
        slots: copies that a rank may hold. within_node: copies stay on their home's node.
    """

    slots: int
    within_node: bool

    def for_topology(self, topology: Topology) -> CopyPlanner: ...

    def by_load(self, load_E: Floats, home_E: Ints, num_ranks: int) -> Ints:
        """The copies that it would take by load, int64 [N, 2]."""
        ...

    def with_copies(self, counts_RE: torch.Tensor, home_E: torch.Tensor, copies_N2: Ints) -> Any:
        """The plan for a micro-batch and these copies."""
        ...


@dataclass(frozen=True)
class Chosen:
    """Copies, and what the statistics' tokens cost with them, once through.

    Attributes:
        cost: expected with the copies; fetching them is part of traffic_s. by_load: with those
            that the planner takes by load alone. without: with none.
    """

    replicas: Replicas
    cost: Cost
    by_load: Cost
    without: Cost


def choose_replicas(
    placement: ExpertPlacement,
    stats: RoutingStats,
    topology: Topology,
    planner: CopyPlanner,
    *,
    steps: float = 0.0,
    two_level: bool = False,
    shape: ExpertShape | None = None,
) -> Chosen:
    """Copies that cost no more seconds than none, and no more than the planner's own by load.

    Seconds are those of `objective.cost` in `home`, and with `steps` those of fetching the copies.

    Args:
        planner: that will hold the copies; its slots and within_node count, and nothing else.
        steps: optimizer steps that the statistics' tokens make. In each, every copy's weights
            come and its gradients go home once; 0 leaves that out, as if steps were endless.
        two_level: tokens cross to a node once and are handed on there.
        shape: of an expert; default that of Qwen3-30B-A3B.

    Raises:
        ValueError: for statistics, placement and topology that do not fit each other, and steps
            below 0.
    """
    if not 0 <= steps < np.inf:
        raise ValueError(f"steps ({steps}) must be >= 0 and finite")
    check_mode("home", topology, two_level)
    check_fit(placement, topology)
    stats.check_model(placement.num_layers, placement.num_experts)
    planner, shape = planner.for_topology(topology), shape or ExpertShape()
    layers = [
        _Layer(placement, stats, topology, planner, steps, two_level, shape, layer)
        for layer in range(placement.num_layers)
    ]
    none = [layer.none for layer in layers]
    by_load = [layer.judge(layer.by_load()) for layer in layers]
    found = [layer.search() for layer in layers]
    replicas = Replicas(placement, tuple(np.argwhere(judged.copied_ER) for judged in found))
    costs = []
    for states in (found, by_load, none):
        sends_LRR = np.stack([judged.sends_RR for judged in states])
        load_LR = np.stack([judged.load_R for judged in states])
        cost = priced(sends_LRR, load_LR, topology, shape, "home")
        fetch_s = sum(judged.fetch_s for judged in states)
        seconds, traffic_s = cost.seconds + fetch_s, cost.traffic_s + fetch_s
        costs.append(replace(cost, seconds=seconds, traffic_s=traffic_s))
    return Chosen(replicas, *costs)


@dataclass(frozen=True)
class _Judged:
    """Copies of a layer, what they cost, fetching included, and where rows are computed."""

    copied_ER: Bools
    seconds: float
    fetch_s: float
    sends_RR: Floats
    rows_ER: Floats

    @property
    def load_R(self) -> Floats:
        return self.rows_ER.sum(0)


class _Layer:
    """The search in one layer."""

    def __init__(
        self,
        placement: ExpertPlacement,
        stats: RoutingStats,
        topology: Topology,
        planner: CopyPlanner,
        steps: float,
        two_level: bool,
        shape: ExpertShape,
        layer: int,
    ) -> None:
        num_ranks, num_experts = topology.num_ranks, placement.num_experts
        self.topology, self.planner, self.shape = topology, planner, shape
        self.two_level, self.slots = two_level, planner.slots
        self.home_E = placement.home_LE[layer]
        self.rows_RE = stats.sources(num_ranks)[layer].numpy()
        self.load_E = self.rows_RE.sum(0)
        self.counts_RE = torch.from_numpy(np.rint(self.rows_RE).astype(np.int64))
        self.coactive_EE = stats.coactive_LEE[layer].numpy()
        self.tokens_R = self.rows_RE.sum(1) / stats.rows_per_token_L[layer]
        self.top_k = max(1, stats.top_k)
        byte_s_RR = 1 / topology.bytes_per_s_RR() / num_ranks
        self.row_s_RR = journeys("home") * shape.row_bytes * byte_s_RR
        fetched_bytes = shape.parameters * (shape.bytes_per_value + GRADIENT_BYTES)
        self.fetch_s_RR = steps * fetched_bytes * byte_s_RR
        self.slow_R = row_operations(shape, "home") / topology.flops_per_s_R()
        home_E, node_R = self.home_E.numpy(), np.array(topology.node_of_R)
        self.at_home_ER = home_E[:, None] == np.arange(num_ranks)
        self.may_hold_ER = ~self.at_home_ER & (self.load_E > 0)[:, None]
        if planner.within_node:
            self.may_hold_ER &= node_R[home_E][:, None] == node_R
        self.num_judged = 0
        self.none = self.judge(np.zeros((num_experts, num_ranks), dtype=np.bool_))

    def judge(self, copied_ER: Bools) -> _Judged:
        self.num_judged += 1
        plan = self.planner.with_copies(self.counts_RE, self.home_E, np.argwhere(copied_ER))
        rows_RR, rows_ER = expected_rows(plan, self.rows_RE, self.counts_RE, self.home_E)
        share_ER = rows_ER / np.maximum(self.load_E, 1e-300)[:, None]
        sends_RR = expected_sends(
            rows_RR,
            self.coactive_EE,
            share_ER,
            self.tokens_R,
            self.top_k,
            self.topology,
            self.two_level,
        )
        cost = priced(sends_RR[None], rows_ER.sum(0)[None], self.topology, self.shape, "home")
        hops_RR = sum(expert_hops(plan.borrowed.tolist(), self.topology.node_of_R))
        fetch_s = float((hops_RR * self.fetch_s_RR).sum())
        return _Judged(copied_ER, cost.seconds + fetch_s, fetch_s, sends_RR, rows_ER)

    def by_load(self) -> Bools:
        copied_ER = self.none.copied_ER.copy()
        num_ranks = self.topology.num_ranks
        expert_N, rank_N = self.planner.by_load(self.load_E, self.home_E.numpy(), num_ranks).T
        copied_ER[expert_N, rank_N] = True
        return copied_ER

    def search(self) -> _Judged:
        """The best that is found from either start and by kicks; of equal ones the first."""
        starts = (self.none, self.judge(self.by_load()))
        best = min((self._improved(start) for start in starts), key=_seconds)
        rng = np.random.default_rng(0)
        while self.num_judged < JUDGED and self.may_hold_ER.any():
            trial = self._improved(self.judge(self._kicked(best.copied_ER, rng)))
            best = trial if _saves(trial, best.seconds) else best
        return best

    def _kicked(self, copied_ER: Bools, rng: np.random.Generator) -> Bools:
        """Two random copies more, each in the place of another one if its rank is full."""
        copied_ER = copied_ER.copy()
        for _ in range(2):
            rank, expert = rng.choice(np.argwhere(self.may_hold_ER.T))
            held = np.flatnonzero(copied_ER[:, rank])
            if len(held) >= self.slots and not copied_ER[expert, rank]:
                copied_ER[rng.choice(held), rank] = False
            copied_ER[expert, rank] = True
        return copied_ER

    def _improved(self, best: _Judged) -> _Judged:
        """Add, exchange and drop copies as long as that saves something."""
        for _ in range(ROUNDS):
            before = best.seconds
            best = self._exchanged(self._filled(best))
            if not _saves(best, before):
                break
        return best

    def _filled(self, best: _Judged) -> _Judged:
        """Add the copy that saves most, again and again."""
        while True:
            trial = min(self._additions(best), key=_seconds, default=best)
            if not _saves(trial, best.seconds):
                return best
            best = trial

    def _exchanged(self, best: _Judged) -> _Judged:
        """Every copy in turn: drop it if it saves nothing, or put another one in its place."""
        for expert, rank in np.argwhere(best.copied_ER):
            copied_ER = best.copied_ER.copy()
            copied_ER[expert, rank] = False
            less = self.judge(copied_ER)
            trial = min(self._additions(less), key=_seconds, default=less)
            if _saves(trial, best.seconds):
                best = trial
            elif less.seconds <= best.seconds:
                best = less
        return best

    def _additions(self, judged: _Judged) -> Iterator[_Judged]:
        """With one copy more, of those that promise most."""
        copied_ER = judged.copied_ER
        free_R = copied_ER.sum(0) < self.slots
        place_C = np.flatnonzero(self.may_hold_ER & ~copied_ER & free_R)
        if len(place_C) > CANDIDATES:
            promise_C = self._promise(judged).ravel()[place_C]
            place_C = place_C[np.argsort(-promise_C, kind="stable")[:CANDIDATES]]
        for place in place_C:
            more_ER = copied_ER.copy()
            more_ER.flat[place] = True
            yield self.judge(more_ER)

    def _promise(self, judged: _Judged) -> Floats:
        """Seconds that one copy more may save, [E, R]: of ways, and of the busiest rank."""
        held_ER = self.at_home_ER | judged.copied_ER
        way_s_RER = np.where(held_ER, self.row_s_RR[:, None], np.inf)
        nearest_s_RE = way_s_RER.min(2)
        saved_RER = np.maximum(nearest_s_RE[:, :, None] - self.row_s_RR[:, None], 0)
        busy_s_R = judged.load_R * self.slow_R
        busiest = int(busy_s_R.argmax())
        room_s_R = (busy_s_R[busiest] - busy_s_R) / 2
        here_s_E = judged.rows_ER[:, busiest] * self.slow_R[busiest]
        ways_s_ER = np.einsum("re,rep->ep", self.rows_RE, saved_RER)
        saved_s_ER = ways_s_ER + np.minimum(here_s_E[:, None], room_s_R)
        promise_ER: Floats = saved_s_ER - self.fetch_s_RR[self.home_E.numpy()]
        return promise_ER


def _seconds(judged: _Judged) -> float:
    return judged.seconds


def _saves(trial: _Judged, seconds: float) -> bool:
    return trial.seconds < seconds * (1 - TOLERANCE)
