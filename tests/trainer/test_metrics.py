"""Reduction over ranks and measures of load, traffic, size and memory, against slow oracles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from parallel.decisions import Collected, Decision, Traffic
from parallel.mesh import ParallelMesh
from parallel.plan import DispatchPlan
from tests.families import FAMILIES, tiny_config
from tests.ranks import run_ranks
from trainer import metrics
from trainer.metrics import (
    Metric,
    dead_experts,
    load_ratio,
    max_violation,
    mean_context,
    memory_bytes,
    model_flops_per_token,
    parameter_counts,
    reduce_metrics,
)
from trainer.routing import routing_metrics

# Reduction over ranks


def reduced(rank_metrics: list[dict[str, Metric]]) -> tuple[dict[str, float], int]:
    """This rank's result and the number of collectives it took."""
    calls: list[str] = []

    def counted(name: str, collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return collective(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather", "all_gather_object"):  # in this rank's own process
        setattr(dist, name, counted(name, getattr(dist, name)))
    return reduce_metrics(rank_metrics[dist.get_rank()], world()), len(calls)


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def test_reductions_and_their_weights() -> None:
    values = [(0.1, 3.0), (0.7, 1.0), (-4.0, 0.0)]
    ranks = [
        {
            "sum": Metric.sum(value),
            "mean": Metric.mean(value * weight, weight),
            "max": Metric.max(value),
            "one_rank_only": Metric.mean(5.0, 1.0) if rank == 1 else Metric.mean(0.0, 0.0),
        }
        for rank, (value, weight) in enumerate(values)
    ]
    for result, num_collectives in run_ranks(reduced, 3, ranks):
        assert list(result) == ["max", "mean", "one_rank_only", "sum"]
        assert result["sum"] == pytest.approx(0.1 + 0.7 - 4.0, rel=1e-15)
        assert result["mean"] == pytest.approx((0.1 * 3 + 0.7 * 1) / 4, rel=1e-15)
        assert result["max"] == 0.7
        assert result["one_rank_only"] == 5.0
        assert num_collectives == 2


def test_reduction_is_float64_and_equal_on_every_rank() -> None:
    ranks = [
        {"rows": Metric.sum(2.0**40 + rank), "share": Metric.sum(0.1 * rank)} for rank in (0, 1, 2)
    ]
    results = [result for result, _ in run_ranks(reduced, 3, ranks)]
    assert results[0]["rows"] == 3 * 2.0**40 + 3
    assert results[0] == results[1] == results[2]


def test_nan_and_infinity_reach_every_rank() -> None:
    ranks = [
        {"max": Metric.max(1.0), "sum": Metric.sum(1.0), "none": Metric.mean(0.0, 0.0)},
        {"max": Metric.max(math.nan), "sum": Metric.sum(math.inf), "none": Metric.mean(0.0, 0.0)},
    ]
    for result, _ in run_ranks(reduced, 2, ranks):
        assert math.isnan(result["max"])
        assert result["sum"] == math.inf
        assert math.isnan(result["none"])


def refused(rank_metrics: list[dict[str, Metric]]) -> str:
    with pytest.raises(ValueError) as error:
        reduce_metrics(rank_metrics[dist.get_rank()], world())
    return str(error.value)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"a": Metric.sum(1)}, "metric b: max on rank 0, absent on rank 1"),
        (
            {"a": Metric.sum(1), "b": Metric.max(1), "c": Metric.sum(1)},
            "metric c: absent on rank 0",
        ),
        ({"a": Metric.sum(1), "b": Metric.sum(1)}, "metric b: max on rank 0, sum on rank 1"),
        ({}, "metric a: sum on rank 0, absent on rank 1"),
    ],
)
def test_other_names_on_a_rank_are_refused(second: dict[str, Metric], message: str) -> None:
    first = {"a": Metric.sum(1), "b": Metric.max(1)}
    for text in run_ranks(refused, 2, [first, second]):
        assert message in text


def test_no_metrics() -> None:
    assert run_ranks(reduced, 1, [{}])[0][0] == {}


# Load


@pytest.mark.parametrize(
    ("load", "ratio"),
    [([3, 3, 3], 1.0), ([9, 0, 0], 3.0), ([5], 1.0), ([1, 2, 3, 6], 2.0), ([0, 0, 0], 1.0)],
)
def test_load_ratio_and_max_violation(load: list[int], ratio: float) -> None:
    assert load_ratio(torch.tensor(load)) == pytest.approx(ratio)
    assert max_violation(torch.tensor(load)) == pytest.approx(ratio - 1)


def test_dead_experts() -> None:
    assert dead_experts(torch.tensor([[0, 1, 0], [2, 3, 4], [0, 0, 0]])) == 5


# Traffic


def traffic() -> dict[str, float]:
    mesh = ParallelMesh.build(ep=4, ranks_per_node=2, device_type="cpu")
    rows = torch.tensor([[0, 0, 0, 5], [0, 0, 1, 7], [0, 3, 0, 11], [1, 2, 3, 2]])
    plan = DispatchPlan(rows, torch.tensor([[0, 0, 1]]), 4, 2)
    counts_RE = torch.tensor([[12, 0], [0, 0], [0, 2], [11, 0]])
    collected = Collected(
        [Decision(0, counts_RE, plan, 0.001 * (1 + mesh.rank))],
        [Traffic(0, 10, 20, 30, 40 + mesh.rank)],
    )
    home_LE = torch.tensor([[0, 3]])
    return reduce_metrics(routing_metrics(collected, home_LE, mesh, 100), mesh.dp_group)


def test_rows_and_bytes_by_link() -> None:
    (got, *others) = run_ranks(traffic, 4)
    assert all(other == got for other in others)
    assert got["moe/rows"] == 25
    assert got["moe/rows_crossing"] == 7 + 11 + 2
    assert got["moe/bytes_within_nodes"] == 4 * 10
    assert got["moe/bytes_across_nodes"] == 4 * 20
    assert got["moe/expert_bytes_within_nodes"] == 4 * 30
    assert got["moe/expert_bytes_across_nodes"] == 40 + 41 + 42 + 43
    assert got["moe/load_ratio"] == pytest.approx(16 / (25 / 4))
    assert got["moe/load_ratio_home"] == pytest.approx(23 / (25 / 4))
    assert got["moe/borrowed_experts"] == 1
    assert got["moe/planner_ms"] == pytest.approx(2.5)
    assert got["moe/activation_bytes"] == 16 * 100
    assert got["moe/max_violation"] == pytest.approx(23 / 12.5 - 1)


# Size and arithmetic of models


def meta_model(family: str, **overrides: object) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **overrides))


@pytest.mark.parametrize("family", FAMILIES)
def test_active_parameters_leave_out_the_experts_not_chosen(family: str) -> None:
    """Top-8 of 8 experts passes all; every expert less passes one expert's parameters less."""
    model = meta_model(family)
    total, active = parameter_counts(model)
    assert total == sum(p.numel() for p in model.parameters())
    stacks = [p for n, p in model.named_parameters() if ".experts." in n]
    assert stacks
    assert active == total - sum(p[0].numel() for p in stacks) * (8 - 2)


def test_shared_experts_are_active() -> None:
    small = parameter_counts(meta_model("glm4_moe", n_shared_experts=1))
    large = parameter_counts(meta_model("glm4_moe", n_shared_experts=2))
    one_expert = 3 * 32 * 24
    assert large[0] - small[0] == large[1] - small[1] == 2 * one_expert


def test_unknown_top_k_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TOP_K", ("field_a", "field_b"))
    with pytest.raises(ValueError, match=r"model qwen3_moe: .* none of field_a, field_b to say"):
        parameter_counts(meta_model("qwen3_moe"))


def test_flops_of_a_small_model_by_hand() -> None:
    layer = {
        "attention": 32 * 32 + 2 * 32 * 16 + 32 * 32,  # q, k and v (2 of 4 heads), o
        "norms": 2 * 32 + 2 * 8,
        "router": 8 * 32,
        "experts": 2 * 3 * 32 * 24,
    }
    head, last_norm = 64 * 32, 32
    passed = 2 * sum(layer.values()) + head + last_norm
    tokens_seen = (1 + 2 + 3 + 4 + 5) / 5
    attention = 2 * 3 * (2 * 4 * 8 + 2 * 4 * 8) * tokens_seen  # 2 layers; forward, 2 x backward
    for tied in (True, False):
        model = meta_model("qwen3_moe", tie_word_embeddings=tied)
        assert model_flops_per_token(model, 5) == pytest.approx(6 * passed + attention)


def attention_flops(model: nn.Module, seq_len: int) -> float:
    """The part that depends on the length: 6 * parameters cancel out."""
    return model_flops_per_token(model, seq_len) - model_flops_per_token(model, 1)


def test_flops_of_latent_sliding_and_linear_attention() -> None:
    latent = 6 * 2 * 4 * (16 + 8)  # 2 layers, 4 heads, query 8 + 8, value 8
    assert attention_flops(meta_model("deepseek_v3"), 9) == pytest.approx(latent * (5 - 1))
    one_layer = 6 * 4 * (8 + 8)
    linear = attention_flops(meta_model("qwen3_next"), 9)
    assert linear == pytest.approx(one_layer * (5 - 1))
    sliding = attention_flops(meta_model("gpt_oss"), 64)  # window 16 in one of two layers
    seen = (sum(range(1, 17)) + 48 * 16) / 64
    assert sliding == pytest.approx(one_layer * (32.5 + seen - 2))


@pytest.mark.parametrize(("seq_len", "window"), [(1, 1), (7, 7), (7, 3), (7, 100), (7, 1)])
def test_mean_context(seq_len: int, window: int) -> None:
    seen = [min(position + 1, window) for position in range(seq_len)]
    assert mean_context(seq_len, window) == pytest.approx(sum(seen) / seq_len)


def grown() -> tuple[float, float]:
    before = memory_bytes(torch.device("cpu"))
    torch.ones(64 * 2**20, dtype=torch.uint8)
    return before, memory_bytes(torch.device("cpu"))


def test_memory_is_the_peak_in_bytes() -> None:
    ((before, after),) = run_ranks(grown, 1)
    assert 60 * 2**20 < after - before < 80 * 2**20
    assert 50 * 2**20 < before < 2**40
