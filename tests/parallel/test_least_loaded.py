"""LeastLoaded: the published plans, and what the corrected ones promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.plan import DispatchPlan
from parallel.planners import LeastLoaded, home_plan
from parallel.planners.inputs import row_limit
from tests.parallel import loads

Slices = dict[int, list[tuple[int, int]]]  # (rank, rows) of experts that do not all stay at home


def in_blocks(load_E: list[int], num_ranks: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of every expert from random sources, experts at home in blocks."""
    generator = np.random.default_rng(seed)
    share_R = generator.dirichlet(np.ones(num_ranks))
    counts_ER = np.stack([generator.multinomial(rows, share_R) for rows in load_E])
    home_E = torch.arange(len(load_E)) * num_ranks // len(load_E)
    return torch.from_numpy(counts_ER.T.copy()), home_E


def is_same(one: DispatchPlan, other: DispatchPlan) -> bool:
    return torch.equal(one.rows, other.rows) and torch.equal(one.borrowed, other.borrowed)


def pairs(plan: DispatchPlan) -> dict[tuple[int, int], int]:
    """Rows by (expert, computing rank)."""
    rows: dict[tuple[int, int], int] = {}
    for expert, _, rank, number in plan.rows.tolist():
        rows[expert, rank] = rows.get((expert, rank), 0) + number
    return rows


@pytest.mark.parametrize(
    ("alpha", "min_rows", "load_E", "slices"),
    [
        (1.0, 1, [400, *[0] * 7], {0: [(0, 100), (1, 100), (2, 100), (3, 100)]}),
        (
            1.0,
            1,
            [10, 30, 5, 5, 40, 20, 5, 5],
            {4: [(2, 10), (1, 20), (3, 10)], 1: [(0, 20), (3, 10)]},
        ),
        (
            1.1,
            8,
            [10, 30, 5, 5, 40, 20, 5, 5],
            {4: [(2, 13), (1, 23), (3, 4)], 1: [(0, 23), (3, 7)]},
        ),
        (1.0, 1024, [8192, 8192, 0, 0], {0: [(0, 4096), (2, 4096)], 1: [(1, 4096), (3, 4096)]}),
        (
            1.1,
            1024,
            [4096, 4096, 1000, 0, 0, 0, 500, 0],
            {0: [(2, 2665), (3, 1431)], 1: [(0, 2665), (1, 1431)]},
        ),
        (  # a forced leftover evicts, which evicts
            1.0,
            1024,
            [6000, 4000, 4000, 4000],
            {0: [(0, 4500), (1, 1500)], 1: [(1, 3000), (2, 1000)], 2: [(2, 3500), (3, 500)]},
        ),
    ],
)
def test_published_plans_slice_for_slice(
    alpha: float, min_rows: int, load_E: list[int], slices: Slices
) -> None:
    counts_RE, home_E = in_blocks(load_E, 4)
    planner = LeastLoaded(alpha, min_rows, trigger=1.0, reference=True)
    plan = planner(counts_RE, home_E)
    plan.check(counts_RE, home_E)
    expected: dict[tuple[int, int, int], int] = {}
    for expert, total in enumerate(load_E):
        sources = np.repeat(np.arange(4), counts_RE[:, expert].numpy())
        computing = np.concatenate(
            [
                np.full(rows, rank)
                for rank, rows in slices.get(expert, [(int(home_E[expert]), total)])
            ]
        )
        for source, rank in zip(sources.tolist(), computing.tolist(), strict=True):
            expected[expert, source, rank] = expected.get((expert, source, rank), 0) + 1
    assert {tuple(row[:3]): row[3] for row in plan.rows.tolist()} == expected


@pytest.mark.parametrize("load_E", [[67, 0, 0, 0], [10001, 0]])
def test_published_leftover_borrows_an_expert_once(load_E: list[int]) -> None:
    """The total does not divide by the ranks: the published algorithm lists a move twice."""
    counts_RE, home_E = in_blocks(load_E, 2)
    for planner in (LeastLoaded(min_rows=1, reference=True), LeastLoaded(min_rows=1)):
        plan = planner(counts_RE, home_E)
        plan.check(counts_RE, home_E)
        assert plan.borrowed.tolist() == [[0, 0, 1]]
        assert sorted(plan.load_R().tolist()) == [load_E[0] // 2, load_E[0] // 2 + 1]


def test_one_row_over_moves_nothing() -> None:
    counts_RE, home_E = in_blocks([5001, 5000], 2)
    for min_rows in (1, 1024):
        plan = LeastLoaded(min_rows=min_rows, trigger=1.0)(counts_RE, home_E)
        assert is_same(plan, home_plan(counts_RE, home_E))


def test_no_cascade_when_pieces_are_small() -> None:
    counts_RE, home_E = in_blocks([6000, 4000, 4000, 4000], 4)
    plan = LeastLoaded(trigger=1.0)(counts_RE, home_E)
    assert plan.borrowed.tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 3]]
    assert plan.load_R().tolist() == [4500] * 4


def test_small_excess_stays_and_sets_the_level_of_others() -> None:
    """Capacity 1000; rank 0 keeps 150 over it, so rank 1 needs no small pieces below that."""
    counts_RE, home_E = in_blocks([1150, 1330, 700, 820], 4)
    plan = LeastLoaded(min_rows=200, trigger=1.0)(counts_RE, home_E)
    assert pairs(plan) == {(0, 0): 1150, (1, 1): 1030, (1, 2): 300, (2, 2): 700, (3, 3): 820}


def test_trigger_is_the_load_ratio_of_ranks() -> None:
    counts_RE, home_E = in_blocks([1300, 700, 1000, 1000], 4)
    assert not len(LeastLoaded(min_rows=1)(counts_RE, home_E).borrowed)
    assert len(LeastLoaded(min_rows=1, trigger=1.29)(counts_RE, home_E).borrowed) == 1
    # one expert has 4 times the mean of experts, but its rank no more than the others
    counts_RE, home_E = in_blocks([400, 0, 0, 0, 100, 100, 100, 100], 2)
    plan = LeastLoaded(min_rows=1, trigger=1.01)(counts_RE, home_E)
    assert not len(plan.borrowed)


@settings(deadline=None, max_examples=300)
@given(
    num_ranks=st.integers(1, 8),
    experts_per_rank=st.integers(1, 6),
    concentration=st.sampled_from([0.1, 1.0, 10.0]),
    rows=st.sampled_from([0, 1, 7, 100, 3000]),
    alpha=st.sampled_from([1.0, 1.01, 1.1, 1.5]),
    min_rows=st.sampled_from([1, 20, 1024]),
    reference=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_what_every_plan_keeps(
    num_ranks: int,
    experts_per_rank: int,
    concentration: float,
    rows: int,
    alpha: float,
    min_rows: int,
    reference: bool,
    seed: int,
) -> None:
    num_experts = num_ranks * experts_per_rank
    counts_RE = loads.dirichlet(num_experts, num_ranks, concentration, seed, rows)
    home_E = loads.random_home(num_experts, num_ranks, seed)
    planner = LeastLoaded(alpha, min_rows, 1.0, reference)
    plan = planner(counts_RE, home_E)
    plan.check(counts_RE, home_E)
    assert is_same(plan, planner(counts_RE.clone(), home_E.clone()))
    if reference:
        return
    capacity = row_limit(alpha, int(counts_RE.sum()), num_ranks)
    before, after = home_plan(counts_RE, home_E).load_R(), plan.load_R()
    most = int(after.max())
    assert most <= max(capacity, min(int(before.max()), capacity + min_rows - 1))
    lenders, helpers = set(plan.borrowed[:, 1].tolist()), set(plan.borrowed[:, 2].tolist())
    assert not lenders & helpers
    for (expert, rank), moved in pairs(plan).items():
        home = int(home_E[expert])
        if rank != home and moved < min_rows:
            assert int(after[home]) + moved > most  # undone, the fullest rank were fuller


@pytest.mark.parametrize("field", ["alpha", "min_rows", "trigger"])
def test_fields_out_of_bounds(field: str) -> None:
    with pytest.raises(ValueError, match=rf"planner\.{field} \(0\.9\) must be >= 1"):
        LeastLoaded(**{field: 0.9})  # type: ignore[arg-type]
