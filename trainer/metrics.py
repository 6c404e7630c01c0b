"""Metrics that carry their reduction, and the one place that reduces them.

L MoE layers, E experts, R ranks of an EP group.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Metric:
    """One rank's part of a metric: `total / weight` summed over ranks, or the largest value."""

    total: float
    weight: float = 1.0
    kind: str = "sum"

    @classmethod
    def sum(cls, value: float) -> Metric:
        """Adds up over ranks."""
        return cls(value, 0.0, "sum")

    @classmethod
    def mean(cls, total: float, weight: float) -> Metric:
        """Sum of totals / sum of weights; 0 if all weights are 0."""
        return cls(total, weight, "mean")

    @classmethod
    def max(cls, value: float) -> Metric:
        """The largest over ranks."""
        return cls(value, 0.0, "max")


def reduce_metrics(metrics: Mapping[str, Metric], group: dist.ProcessGroup) -> dict[str, float]:
    """Reduce over the ranks of a group, in float64, with two collectives.

    Every rank must bring the same names.
    """
    names = sorted(metrics)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    sums = torch.tensor(
        [[metrics[name].total, metrics[name].weight] for name in names],
        dtype=torch.float64,
        device=device,
    ).reshape(-1, 2)
    largest = sums[:, 0].clone()
    dist.all_reduce(sums, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    reduced = {}
    for name, (total, weight), peak in zip(names, sums.tolist(), largest.tolist(), strict=True):
        kind = metrics[name].kind
        if kind == "mean":
            reduced[name] = total / weight if weight else 0.0
        else:
            reduced[name] = total if kind == "sum" else peak
    return reduced


def load_ratio(load_R: Tensor) -> float:
    """Max/mean rows per rank; 1 if there are no rows."""
    return max_violation(load_R) + 1.0


def max_violation(load_E: Tensor) -> float:
    """MaxVio, max/mean - 1 rows per expert (arXiv:2408.15664); 0 if there are no rows."""
    total = int(load_E.sum())
    return int(load_E.max()) * load_E.numel() / total - 1.0 if total else 0.0


def dead_experts(counts_LE: Tensor) -> int:
    """Experts without a row, over all layers."""
    return int((counts_LE == 0).sum())


def model_flops_per_token(model: Any, seq_len: int) -> float:
    """Floating-point operations of forward and backward for one token.

    6 x active parameters (of routed experts the share top_k/E, embeddings not counted) plus
    12 x layers x width x tokens for causal attention halved, as in arXiv:2204.02311, appendix B.

    Args:
        model: of `transformers`, also on the meta device, not yet split. seq_len: tokens.
    """
    active = parameter_counts(model)[1]
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    matrices = active - (0 if tied else embedding)
    return 6.0 * matrices + 6.0 * config.num_hidden_layers * heads * head_dim * seq_len


def parameter_counts(model: Any) -> tuple[int, int]:
    """All parameters, and those that act on one token (of routed experts top_k of E)."""
    config = model.config.get_text_config()
    top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", 1)
    stacks = {
        id(parameter): module.num_experts
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" and isinstance(module, nn.Module)
        for parameter in module.parameters(recurse=False)
    }
    total = active = 0
    for parameter in model.parameters():
        total += parameter.numel()
        num_experts = stacks.get(id(parameter))
        active += parameter.numel() * top_k // num_experts if num_experts else parameter.numel()
    return total, active


def memory_bytes(device: torch.device) -> float:
    """Peak memory of this rank: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
