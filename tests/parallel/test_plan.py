"""Plans: what `check` accepts and refuses, and the home plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.plan import DispatchPlan
from parallel.planners import home_plan

HOME = torch.tensor([0, 1, 0, 1])
COUNTS = torch.tensor([[2, 0, 3, 0], [1, 4, 0, 0]])


def plan(rows: list[list[int]], borrowed: list[list[int]]) -> DispatchPlan:
    tables = torch.tensor(rows).reshape(-1, 4), torch.tensor(borrowed).reshape(-1, 3)
    return DispatchPlan(tables[0].long(), tables[1].long(), 2, 4)


GOOD = [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 4], [2, 0, 0, 3]]


def test_good_plan_and_its_loads() -> None:
    good = plan(GOOD, [[0, 0, 1]])
    good.check(COUNTS, HOME)
    assert good.load_R().tolist() == [5, 5]


@pytest.mark.parametrize(
    ("rows", "borrowed", "message"),
    [
        (GOOD[:-1], [[0, 0, 1]], "computes 0 of 3 rows of expert 2 from rank 0"),
        ([*GOOD[:-1], [2, 0, 0, 4]], [[0, 0, 1]], "computes 4 of 3 rows of expert 2"),
        (GOOD, [], "rank 1 computes expert 0 without having it"),
        (GOOD, [[0, 1, 0]], "expert 0 lives on 0, not 1"),
        (GOOD, [[0, 0, 0]], "borrowed by its own home"),
        (GOOD, [[0, 0, 1], [0, 0, 1]], "borrowed is not sorted and unique"),
        ([GOOD[1], GOOD[0], *GOOD[2:]], [[0, 0, 1]], r"rows is not sorted .* \[0, 0, 0, 1\]"),
        ([*GOOD, [3, 0, 1, 0]], [[0, 0, 1]], r"\[3, 0, 1, 0\] has no rows"),
        ([*GOOD[:-1], [4, 0, 0, 3]], [[0, 0, 1]], "outside the 4 experts or 2 ranks"),
    ],
)
def test_bad_plans(rows: list[list[int]], borrowed: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(rows, borrowed).check(COUNTS, HOME)


@settings(deadline=None, max_examples=100)
@given(
    num_ranks=st.integers(1, 6),
    experts_per_rank=st.integers(1, 5),
    largest=st.sampled_from([0, 1, 100]),
    seed=st.integers(0, 1000),
)
def test_home_plan(num_ranks: int, experts_per_rank: int, largest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_experts = num_ranks * experts_per_rank
    counts_RE = torch.randint(0, largest + 1, (num_ranks, num_experts), generator=generator)
    home_E = torch.randperm(num_experts, generator=generator) % num_ranks
    home = home_plan(counts_RE, home_E)
    home.check(counts_RE, home_E)
    assert not len(home.borrowed)
    assert torch.equal(home.rows[:, 2], home_E[home.rows[:, 0]])
    loads = [int(counts_RE[:, home_E == rank].sum()) for rank in range(num_ranks)]
    assert home.load_R().tolist() == loads
