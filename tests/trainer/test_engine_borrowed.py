"""Borrowed experts in training: kept or not, fetched once or twice, recomputed, accumulated."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.mesh import ParallelMesh
from parallel.model import moe_layers, parallelize
from parallel.plan import DispatchPlan
from parallel.planners import Quota, home_plan
from tests.parallel.test_families import full_model
from tests.parallel.test_layer import RandomPlanner
from tests.ranks import run_ranks
from tests.trainer.test_engine import BASE, check, engine_run


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


@pytest.mark.slow
def test_eighty_steps_under_quota() -> None:
    """Rounding grows from step to step, but from float64's it does not get far."""
    case = {**BASE, "world": 4, "ep": 4, "accumulate": 2, "steps": 80}
    home = run_ranks(engine_run, 4, {**case, "planner": home_plan})
    quota = run_ranks(engine_run, 4, {**case, "planner": Quota()})
    borrowed = 0.0
    for a, b in zip(home[0]["metrics"], quota[0]["metrics"], strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-9)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-8)
        assert b["moe/load_ratio_home"] == a["moe/load_ratio"] >= b["moe/load_ratio"]
        borrowed += b["moe/borrowed_experts"]
    assert borrowed > 80


def test_blocks_may_change_the_output_in_place() -> None:
    """FSDP2 loses its hook, and so the gradients, if a module's output is a view."""
    assert run_ranks(output_is_view, 2) == [False, False]


def output_is_view() -> bool:
    model: Any = full_model("qwen3_moe")
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    parallelize(model, mesh, planner=RandomPlanner(3))
    _, layer = moe_layers(model)[0]
    x = torch.randn(6, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1]] * 6)
    return layer(x, ids, torch.ones(6, 2, dtype=torch.float64))._is_view()
