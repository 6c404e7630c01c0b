"""Borrowed experts in training: kept or not, fetched once or twice, recomputed, accumulated."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from torch import Tensor

from parallel.plan import DispatchPlan
from tests.parallel.test_layer import RandomPlanner
from tests.trainer.test_engine import BASE, check


class KeepingPlanner(RandomPlanner):
    """Random plans whose borrowed experts stay for the optimizer step."""

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        return replace(super().__call__(counts_RE, home_E), keep=True)


@pytest.mark.parametrize(
    ("planner", "refetch", "recompute", "accumulate"),
    list(product([RandomPlanner(3), KeepingPlanner(4)], [False, True], [False, True], [1, 4])),
)
def test_every_combination(
    planner: RandomPlanner, refetch: bool, recompute: bool, accumulate: int
) -> None:
    check(
        {
            **BASE,
            "world": 2,
            "ep": 2,
            "accumulate": accumulate,
            "planner": planner,
            "recompute": recompute,
            "layers": {"refetch": refetch},
        }
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "two_experts"])  # split by experts, and within
@pytest.mark.parametrize("planner", [RandomPlanner(5), KeepingPlanner(6)])
def test_several_groups_lend_different_experts(planner: RandomPlanner, family: str) -> None:
    check(
        {**BASE, "world": 4, "ep": 2, "accumulate": 2, "planner": planner, "family": family},
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_while_training(recompute: bool) -> None:
    case = {**BASE, "world": 4, "ep": 4, "accumulate": 2, "planner": RandomPlanner(7)}
    check({**case, "recompute": recompute, "layers": {"num_chunks": 3, "refetch": True}})
