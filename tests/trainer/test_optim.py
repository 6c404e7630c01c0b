"""Parameter groups, schedules and the gradient norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from parallel.mesh import ParallelMesh
from parallel.model import parallelize
from tests.parallel.test_families import full_model
from tests.ranks import run_ranks
from trainer.optim import factor, grad_norm_, parameter_groups


def group_names(family: str, decay_routers: bool) -> dict[str, list[str]]:
    model: Any = full_model(family)
    parallelize(model, ParallelMesh.build(ep=1, device_type="cpu"))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1, decay_routers)
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(trainable)
    decay = {g["name"]: g["weight_decay"] for g in groups}
    assert decay["matrices"] == decay["experts"] == 0.1 and decay["no_decay"] == 0.0
    assert decay["routers"] == (0.1 if decay_routers else 0.0)
    return {g["name"]: [names[id(p)] for p in g["params"]] for g in groups}


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "gpt_oss", "hunyuan_v1_moe"])
def test_every_parameter_is_in_one_group(family: str) -> None:
    (groups,) = run_ranks(group_names, 1, family, family == "qwen3_moe")
    assert all("norm" in n or n.endswith("bias") or "sinks" in n for n in groups["no_decay"])
    assert all(".experts.experts." in n for n in groups["experts"])
    assert all(".gate." in n or ".router." in n for n in groups["routers"])
    assert "model.embed_tokens.weight" in groups["matrices"]
    assert not any("norm" in n or "bias" in n for n in groups["matrices"])


def lr(step: int, **changes: Any) -> float:
    settings: dict[str, Any] = {"steps": 100, "warmup_steps": 10, "decay_steps": 0}
    return factor(step, **{"schedule": "cosine", "min_lr_ratio": 0.1, **settings, **changes})


def test_schedules() -> None:
    assert [lr(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert lr(10) == pytest.approx(1.0)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 40 / 89))
    assert lr(50) == pytest.approx(middle)
    assert lr(99) == lr(500) == pytest.approx(0.1)
    assert lr(99, schedule="constant") == 1.0
    wsd = {"schedule": "wsd", "decay_steps": 20}
    assert lr(80, **wsd) == 1.0
    assert lr(90, **wsd) == pytest.approx(0.1 + 0.9 * 9 / 19)
    assert lr(99, **wsd) == pytest.approx(0.1)


def norm_of_parts(max_norm: float) -> tuple[float, list[float]]:
    """Each rank holds other elements; an empty part counts nothing."""
    from torch import distributed as dist

    rank = dist.get_rank()
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0))]
    parameters[0].grad = torch.tensor([1.0 + rank, 2.0])
    parameters[1].grad = torch.zeros(0)
    group: Any = dist.group.WORLD
    norm = grad_norm_(parameters, max_norm, group)
    return float(norm), parameters[0].grad.tolist()


def test_gradient_norm_counts_every_element_once() -> None:
    want = math.sqrt(1 + 4 + 4 + 4)
    for rank, (norm, grad) in enumerate(run_ranks(norm_of_parts, 2, 0.0)):
        assert norm == pytest.approx(want)
        assert grad == [1.0 + rank, 2.0]
    for rank, (norm, grad) in enumerate(run_ranks(norm_of_parts, 2, 0.5)):
        assert norm == pytest.approx(want)
        assert grad == pytest.approx([(1.0 + rank) * 0.5 / want, 1.0 / want], rel=1e-5)
