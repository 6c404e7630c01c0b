"""Borrowed experts that stay for a step: as level as the planner inside, with fewer transfers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.plan import DispatchPlan, Planner
from parallel.planners.assemble import assemble
from parallel.planners.home import home_plan
from parallel.planners.inputs import row_limit
from parallel.planners.least_loaded import LeastLoaded
from parallel.planners.quota import Quota
from parallel.planners.stateful import StatefulPlanner
from parallel.planners.sticky import Sticky
from placement.topology import Topology

NUM_RANKS, NUM_EXPERTS = 4, 16
HOME = torch.arange(NUM_EXPERTS) // 4
BUSY = 1 / (1 + torch.arange(NUM_EXPERTS)).double() ** 0.8  # rank 0 is hottest


def surplus_plan(counts_RE: Tensor, home_E: Tensor, min_rows: int = 20) -> DispatchPlan:
    """Down to the mean the fullest rank gives of its largest expert to the emptiest rank."""
    load_E, homes = counts_RE.sum(0).numpy().copy(), home_E.numpy()
    load_R = np.bincount(homes, weights=load_E, minlength=len(counts_RE)).astype(np.int64)
    mean = -(-load_E.sum() // len(counts_RE))
    away: dict[tuple[int, int], int] = {}
    while True:
        giver, taker = int(load_R.argmax()), int(load_R.argmin())
        expert = int(np.where(homes == giver, load_E, -1).argmax())
        rows = int(min(load_R[giver] - mean, mean - load_R[taker], load_E[expert]))
        if rows < min_rows:
            break
        away[expert, taker] = away.get((expert, taker), 0) + rows
        load_E[expert] -= rows
        load_R[giver] -= rows
        load_R[taker] += rows
    away_N3 = [(expert, rank, rows) for (expert, rank), rows in sorted(away.items())]
    return assemble(counts_RE, home_E, np.array(away_N3, dtype=np.int64).reshape(-1, 3))


class Asked:
    """A planner that notes how often it is asked, and the counts of the last time."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        self.times += 1
        self.counts_RE = counts_RE
        return surplus_plan(counts_RE, home_E)


def draw(share_E: Tensor, seed: int, num_ranks: int = NUM_RANKS, tokens: int = 1000) -> Tensor:
    """Counts [R, E] of one micro-batch, rows drawn with these shares."""
    generator = torch.Generator().manual_seed(seed)
    rows_RT = torch.multinomial(share_E.expand(num_ranks, -1), tokens, True, generator=generator)
    return torch.stack([rows_T.bincount(minlength=len(share_E)) for rows_T in rows_RT])


def ratio(plan: DispatchPlan) -> float:
    load_R = plan.load_R()
    return float(load_R.max() / load_R.double().mean().clamp(min=1e-9))


def pairs(plan: DispatchPlan) -> set[tuple[int, int, int]]:
    return set(map(tuple, plan.borrowed.tolist()))


@dataclass(frozen=True)
class Step:
    """Of one step: what was held at its end, load ratios, transfers of the planner inside."""

    held: set[tuple[int, int, int]]
    ratios: list[float]
    base_ratios: list[float]
    base_transfers: int


def run(planner: Sticky, steps: Sequence[Sequence[Tensor]], home_E: Tensor = HOME) -> list[Step]:
    """Steps of micro-batches through a planner as an engine would; every plan is checked."""
    results: list[Step] = []
    before: Sequence[Tensor] = []
    for counts in steps:
        planner.next_step(before)
        before = counts
        held: set[tuple[int, int, int]] = set()
        plans = []
        for counts_RE in counts:
            plan = planner(counts_RE, home_E)
            plan.check(counts_RE, home_E)
            assert plan.keep
            assert held <= pairs(plan), "what a step borrowed stays for the step"
            held = pairs(plan)
            plans.append(plan)
        base = [planner.planner(counts_RE, home_E) for counts_RE in counts]
        transfers = sum(len(plan.borrowed) for plan in base)
        results.append(Step(held, list(map(ratio, plans)), list(map(ratio, base)), transfers))
    return results


def test_steady_skew_needs_few_transfers() -> None:
    steps = [[draw(BUSY, 100 * step + micro) for micro in range(8)] for step in range(5)]
    planner = Sticky(surplus_plan, slack=0.05).for_layer(0)
    assert isinstance(planner, StatefulPlanner)
    for step in run(planner, steps):
        assert max(step.ratios) <= 1.05
        assert 0 < len(step.held) <= step.base_transfers / 5
    home_ratios = [ratio(home_plan(counts_RE, HOME)) for counts_RE in steps[0]]
    assert min(home_ratios) > 1.5


def test_steps_start_with_what_the_average_calls_for() -> None:
    counts = [draw(BUSY, 0)] * 3
    asked = Asked()
    planner = Sticky(asked)
    for times in (1, 2, 3):  # on the first micro-batch ever, then once per step on the average
        planner.next_step(counts if times > 1 else [])
        for counts_RE in counts:
            plan = planner(counts_RE, HOME)
            assert ratio(plan) < 1.05
        assert asked.times == times
        assert torch.equal(asked.counts_RE, counts[0])
    balanced = torch.full((NUM_RANKS, NUM_EXPERTS), 60)
    planner.next_step(counts)
    assert pairs(planner(balanced, HOME)) == pairs(surplus_plan(counts[0], HOME))  # all unused
    unforeseen = Sticky(asked, predict=False)
    unforeseen.next_step(counts)
    assert not len(unforeseen(balanced, HOME).borrowed)


def hot_rank(rank: int) -> Tensor:
    """Three experts at home on this rank are eight times as busy as all others."""
    share_E = torch.ones(NUM_EXPERTS, dtype=torch.float64)
    share_E[4 * rank : 4 * rank + 3] = 8
    return share_E


def test_rotating_hot_spot_is_followed_and_left() -> None:
    """As workload W6: the hot experts move to the next rank every three steps."""
    steps = [
        [draw(hot_rank(step // 3), 100 * step + micro) for micro in range(4)] for step in range(9)
    ]
    results = run(Sticky(surplus_plan, slack=0.1, decay=0.2), steps)
    for number, step in enumerate(results):
        assert max(step.ratios) <= 1.1
        homes = {home for _, home, _ in step.held}
        assert number // 3 in homes
        if number % 3 == 2:  # two steps after the move the old ones are gone
            assert homes == {number // 3}


def test_burst_is_served_and_let_go() -> None:
    """As workload W7: steady, one step in which rank 3 is hot, recovery."""
    shares = [hot_rank(3 if step == 3 else 0) for step in range(7)]
    steps = [
        [draw(share_E, 100 * step + micro) for micro in range(4)]
        for step, share_E in enumerate(shares)
    ]
    results = run(Sticky(surplus_plan, slack=0.1, decay=0.2), steps)
    assert all(max(step.ratios) <= 1.1 for step in results)
    homes = [{home for _, home, _ in step.held} for step in results]
    assert homes[2] == {0}
    assert 3 in homes[3]
    assert homes[6] == {0}


def test_of_a_plan_what_helps_a_full_rank_is_held() -> None:
    """Only rank 0 is above the slack; that the plan levels rank 2 too is held when it matters."""
    counts_RE = torch.zeros(NUM_RANKS, NUM_EXPERTS, dtype=torch.int64)
    counts_RE[0, [0, 4, 8, 12]] = torch.tensor([1600, 700, 1040, 700])

    def two(counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        return assemble(counts_RE, home_E, np.array([[0, 1, 300], [0, 3, 300], [8, 1, 20]]))

    plan = Sticky(two, slack=0.1)(counts_RE, HOME)
    assert pairs(plan) == {(0, 0, 1), (0, 0, 3)}
    assert ratio(plan) <= 1.1
    plan = Sticky(two, slack=0.0)(counts_RE, HOME)
    assert pairs(plan) == {(0, 0, 1), (0, 0, 3), (8, 2, 1)}
    assert int(plan.load_R().max()) <= 1020


def test_the_rest_of_a_plan_is_held_if_the_full_rank_needs_it() -> None:
    """Rank 1 can take rows of rank 0 only because rank 2 takes some of its own."""
    counts_RE = torch.zeros(NUM_RANKS, NUM_EXPERTS, dtype=torch.int64)
    counts_RE[0, [0, 4, 8, 12]] = torch.tensor([1600, 1000, 400, 1000])

    def chain(counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        return assemble(counts_RE, home_E, np.array([[0, 1, 600], [4, 2, 600]]))

    plan = Sticky(chain)(counts_RE, HOME)
    assert pairs(plan) == {(0, 0, 1), (4, 1, 2)}
    assert ratio(plan) <= 1.01


def test_nothing_is_held_for_a_plan_that_is_no_better() -> None:
    counts_RE = torch.zeros(NUM_RANKS, NUM_EXPERTS, dtype=torch.int64)
    counts_RE[0, [0, 4, 8, 12]] = torch.tensor([1600, 700, 1000, 700])

    def useless(counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        return assemble(counts_RE, home_E, np.array([[8, 1, 100]]))

    plan = Sticky(useless)(counts_RE, HOME)
    assert torch.equal(plan.rows, home_plan(counts_RE, HOME).rows)
    assert not len(plan.borrowed)


@settings(deadline=None, max_examples=60)
@given(
    ranks_per_node=st.integers(1, 3),
    num_nodes=st.integers(1, 2),
    experts_per_rank=st.integers(1, 4),
    base=st.sampled_from([surplus_plan, LeastLoaded(min_rows=5, trigger=1.0), Quota()]),
    slack=st.sampled_from([0.0, 0.05, 0.5]),
    predict=st.booleans(),
    max_borrowed=st.sampled_from([None, 0, 1, 3]),
    follows_protocol=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_exact_level_and_the_same_on_every_rank(
    ranks_per_node: int,
    num_nodes: int,
    experts_per_rank: int,
    base: Planner,
    slack: float,
    predict: bool,
    max_borrowed: int | None,
    follows_protocol: bool,
    seed: int,
) -> None:
    """Whatever the counts, also when homes change between steps."""
    num_ranks = ranks_per_node * num_nodes
    num_experts = num_ranks * experts_per_rank
    node_of_R = tuple(rank // ranks_per_node for rank in range(num_ranks))
    planner = Sticky(base, slack=slack, predict=predict, max_borrowed=max_borrowed)
    planner = planner.for_topology(Topology(node_of_R, 400.0, 50.0, 1e12))
    here, there = planner.for_layer(0), planner.for_layer(0)
    generator = torch.Generator().manual_seed(seed)
    counts: list[Tensor] = []
    for step in range(4):
        if follows_protocol:
            here.next_step(counts)
            there.next_step(counts)
        if step % 2 == 0:
            home_E = torch.randperm(num_experts, generator=generator) % num_ranks
        share_E = torch.rand(num_experts, generator=generator).double() ** 3 + 1e-6
        counts = [draw(share_E, seed + 10 * step + m, num_ranks, 50) for m in range(3)]
        counts[2] *= 0 if seed % 2 else 10
        held: set[tuple[int, int, int]] = set()
        for counts_RE in counts:
            plan, other = here(counts_RE, home_E), there(counts_RE, home_E)
            plan.check(counts_RE, home_E)
            assert torch.equal(plan.rows, other.rows)
            assert torch.equal(plan.borrowed, other.borrowed)
            assert held <= pairs(plan)
            held = pairs(plan)
            if max_borrowed is None:
                base_R = here.planner(counts_RE, home_E).load_R()
                limit = row_limit(1 + slack, int(counts_RE.sum()), num_ranks)
                assert plan.load_R().max() <= max(limit, int(base_R.max()))
            else:
                borrowed_R = plan.borrowed[:, 2].bincount(minlength=num_ranks)
                assert borrowed_R.max() <= max_borrowed


def test_room_goes_to_what_computes_most_rows() -> None:
    counts_RE = torch.zeros(2, 4, dtype=torch.int64)
    counts_RE[0] = torch.tensor([60, 100, 0, 0])
    home_E = torch.tensor([0, 0, 1, 1])

    def both(counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        return assemble(counts_RE, home_E, np.array([[0, 1, 10], [1, 1, 70]]))

    assert pairs(Sticky(both)(counts_RE, home_E)) == {(0, 0, 1), (1, 0, 1)}
    assert pairs(Sticky(both, max_borrowed=1)(counts_RE, home_E)) == {(1, 0, 1)}


def test_topology_reaches_the_planner_inside() -> None:
    @dataclass(frozen=True)
    class Inner:
        node_of_R: tuple[int, ...] = ()
        bytes_per_parameter: float = 0.0

        def for_topology(self, topology: Topology, bytes_per_parameter: float) -> Inner:
            return Inner(topology.node_of_R, bytes_per_parameter)

        def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
            return surplus_plan(counts_RE, home_E)

    topology = Topology((0, 0, 1, 1), 400.0, 50.0, 1e12)
    planner = Sticky(Inner(), slack=0.3, decay=0.7, predict=False, max_borrowed=5)
    there = planner.for_topology(topology, 8.0)
    assert there.planner == Inner((0, 0, 1, 1), 8.0)
    assert there.node_of_R == (0, 0, 1, 1)
    assert (there.slack, there.decay, there.predict, there.max_borrowed) == (0.3, 0.7, False, 5)
    assert planner.planner == Inner()


def test_layers_learn_apart() -> None:
    planner = Sticky(surplus_plan)
    first, second = planner.for_layer(0), planner.for_layer(1)
    first(draw(BUSY, 0), HOME)
    first.next_step([draw(BUSY, 0)])
    balanced = torch.full((NUM_RANKS, NUM_EXPERTS), 60)
    assert len(first(balanced, HOME).borrowed)
    assert not len(second(balanced, HOME).borrowed)
    assert not len(planner(balanced, HOME).borrowed)


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match=r"planner.slack \(-0.1\) must be >= 0"):
        Sticky(surplus_plan, slack=-0.1)
    with pytest.raises(ValueError, match=r"planner.decay \(1.5\) must be >= 0 and < 1"):
        Sticky(surplus_plan, decay=1.5)
    with pytest.raises(ValueError, match=r"planner.max_borrowed \(-1\) must be >= 0"):
        Sticky(surplus_plan, max_borrowed=-1)
    with pytest.raises(ValueError, match=r"planner.planner \(Sticky\) must be stateless"):
        Sticky(Sticky(surplus_plan))
    planner = Sticky(surplus_plan)
    planner.next_step([draw(BUSY, 0)])
    with pytest.raises(ValueError, match=r"counts_RE is \(4, 8\), in the steps before .*\(4, 16\)"):
        planner(draw(BUSY[:8], 0), torch.arange(8) // 2)
