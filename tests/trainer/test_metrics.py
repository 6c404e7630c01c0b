"""Metrics: reductions over ranks, load figures, counts of parameters and operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from parallel.decisions import Decision
from parallel.mesh import ParallelMesh
from parallel.plan import DispatchPlan
from tests.families import tiny_config
from tests.ranks import run_ranks
from trainer.metrics import (
    Metric,
    dead_experts,
    load_ratio,
    max_violation,
    model_flops_per_token,
    parameter_counts,
    reduce_metrics,
)
from trainer.routing import routing_metrics


def reduced() -> dict[str, float]:
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    rank = mesh.rank
    metrics = {
        "sum": Metric.sum(2**40 + rank),
        "mean": Metric.mean(3.0 * rank, rank),
        "empty": Metric.mean(0.0, 0.0),
        "max": Metric.max(-5.0 - rank),
    }
    return reduce_metrics(metrics, mesh.dp_group)


def test_reductions() -> None:
    want = {"sum": 3 * 2**40 + 3, "mean": 3.0, "empty": 0.0, "max": -5.0}
    assert run_ranks(reduced, 3) == [want] * 3


def test_load_figures() -> None:
    assert load_ratio(torch.tensor([6, 2, 1])) == 2.0
    assert max_violation(torch.tensor([6, 2, 1])) == 1.0
    assert load_ratio(torch.tensor([0, 0])) == 1.0
    assert max_violation(torch.tensor([3, 3])) == 0.0
    assert dead_experts(torch.tensor([[0, 1, 2], [0, 0, 3]])) == 3


class Model(torch.nn.Linear):
    """Width 10, fp32, as far as the routing metrics look."""

    config: Any = tiny_config("mixtral")


def traffic() -> dict[str, float]:
    mesh = ParallelMesh.build(ep=4, ranks_per_node=2, device_type="cpu")
    rows = torch.tensor([[0, 0, 0, 5], [0, 0, 1, 7], [0, 3, 0, 11], [1, 2, 3, 2]])
    plan = DispatchPlan(rows, torch.empty(0, 3, dtype=torch.int64), 4, 2)
    counts_RE = torch.tensor([[12, 0], [0, 0], [0, 2], [11, 0]])
    metrics = routing_metrics([Decision(0, counts_RE, plan)], Model(2, 2), mesh)
    return reduce_metrics(metrics, mesh.dp_group)


def test_rows_and_bytes_by_link() -> None:
    (got, *others) = run_ranks(traffic, 4)
    assert all(other == got for other in others)
    width_bytes = 32 * 4 * 2  # hidden width of the tiny model, fp32, there and back
    assert got["moe/rows"] == 25
    assert got["moe/rows_crossing"] == 7 + 11 + 2
    assert got["moe/bytes_within_nodes"] == (7 + 2) * width_bytes
    assert got["moe/bytes_across_nodes"] == 11 * width_bytes
    assert got["moe/load_ratio"] == pytest.approx(16 / (25 / 4))
    assert got["moe/max_violation"] == pytest.approx(23 / 12.5 - 1)


def test_active_parameters_and_flops() -> None:
    config = tiny_config("qwen2_moe")
    model: Any = AutoModelForCausalLM.from_config(config)
    total, active = parameter_counts(model)
    assert total == sum(p.numel() for p in model.parameters())
    idle = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            idle += parameter[config.num_experts_per_tok :].numel()
    assert active == total - idle
    embedding = config.vocab_size * config.hidden_size
    attention = 6 * config.num_hidden_layers * config.hidden_size * 16
    assert model_flops_per_token(model, 16) == 6 * (active - embedding) + attention
