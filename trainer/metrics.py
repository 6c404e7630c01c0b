"""Metrics that carry their reduction, the one place that reduces them, and measures of load.

L MoE layers, E experts, R ranks of an EP group.
"""

from __future__ import annotations

import hashlib
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.rules import TOP_K


class Reduction(Enum):
    """How the ranks' values of a metric become one."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"


@dataclass(frozen=True)
class Metric:
    """This rank's part of a metric.

    Attributes:
        value: summand, maximum, or for MEAN the weighted sum. weight: total weight, for MEAN.
    """

    value: float
    reduction: Reduction
    weight: float = 1.0

    @classmethod
    def sum(cls, value: float) -> Metric:
        """A value that adds up over ranks."""
        return cls(float(value), Reduction.SUM)

    @classmethod
    def mean(cls, total: float, weight: float) -> Metric:
        """The sum of this rank's (weighted) values and their total weight, which may be 0."""
        return cls(float(total), Reduction.MEAN, float(weight))

    @classmethod
    def max(cls, value: float) -> Metric:
        """A value of which the largest over ranks counts."""
        return cls(float(value), Reduction.MAX)


def reduce_metrics(metrics: Mapping[str, Metric], group: dist.ProcessGroup) -> dict[str, float]:
    """Metrics over all ranks of a group, in float64 and bitwise the same on each.

    Two collectives whatever the number of metrics: one compares the names, one gathers the
    values. NaN on one rank gives NaN, and so does a mean without any weight.

    Raises:
        ValueError: if names or reductions differ between ranks, naming the first that does.
    """
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    _check_names(metrics, group, device)
    names = sorted(metrics)
    pairs = [[metrics[name].value, metrics[name].weight] for name in names]
    mine = torch.tensor(pairs, dtype=torch.float64, device=device).view(len(names), 2)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    value, weight = torch.stack(everyones).cpu().unbind(2)
    total = value.sum(0)
    reduced = {
        Reduction.SUM: total,
        Reduction.MEAN: total / weight.sum(0),
        Reduction.MAX: value.amax(0),
    }
    return {name: float(reduced[metrics[name].reduction][i]) for i, name in enumerate(names)}


def _check_names(
    metrics: Mapping[str, Metric], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Compare a digest of names and reductions before anything whose size depends on them."""
    kinds = {name: metrics[name].reduction.value for name in sorted(metrics)}
    digest = int(hashlib.sha256(repr(kinds).encode()).hexdigest()[:15], 16)
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if int(extremes[0]) == -int(extremes[1]):
        return
    everyones: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyones, kinds, group=group)
    for rank, theirs in enumerate(everyones):
        differing = sorted(set(theirs.items()) ^ set(everyones[0].items()))
        if differing:
            name = differing[0][0]
            raise ValueError(
                f"metric {name}: {everyones[0].get(name, 'absent')} on rank 0, "
                f"{theirs.get(name, 'absent')} on rank {rank}; every rank must report the same"
            )


def load_ratio(load_R: Tensor) -> float:
    """max / mean rows per rank: 1.0 is perfect, R the worst; 1.0 if there are no rows."""
    total = int(load_R.sum())
    return int(load_R.max()) * load_R.numel() / total if total else 1.0


def max_violation(load_E: Tensor) -> float:
    """MaxVio = max / mean - 1 of the rows per expert (arXiv:2408.15664); 0.0 without rows."""
    return load_ratio(load_E) - 1.0


def dead_experts(counts_LE: Tensor) -> int:
    """Experts without a single row, over all layers."""
    return int((counts_LE == 0).sum())


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """All parameters of an unsplit model, and those that one token passes.

    Of the routed experts of a layer a token passes top-k of E.

    Raises:
        ValueError: if the model's configuration does not say how many experts a token chooses.
    """
    total, active = 0, 0.0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        active += parameter.numel() * _share_passed(model, name, parameter)
    return total, round(active)


def _share_passed(model: nn.Module, name: str, parameter: Tensor) -> float:
    """Share of a parameter that one token passes: 1, or k/E of a stack of routed experts."""
    if ".experts." not in name:
        return 1.0
    config = _text_config(model)
    for field in TOP_K:
        top_k = getattr(config, field, None)
        if top_k is not None:  # some families set it layer by layer
            top_k = sum(top_k) / len(top_k) if isinstance(top_k, list) else top_k
            return top_k / parameter.shape[0]
    raise ValueError(
        f"model {config.model_type}: its configuration has none of {', '.join(TOP_K)} to say how "
        f"many experts a token chooses"
    )


def model_flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Floating-point operations of a training step per token, recomputation not counted.

    6 per parameter that a token passes (arXiv:2001.08361), input embeddings apart unless the
    output layer shares them, and per attention layer 6 * heads * (query width + value width) for
    every position that a token sees: those before it, within the window of sliding attention.
    Linear attention has no such term.

    Args:
        model: unsplit, also on the meta device. seq_len: tokens per sequence.
    """
    lookup: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    passed = parameter_counts(model)[1]
    if output is None or output.weight is not lookup:
        passed -= lookup.numel()
    config = _text_config(model)
    heads = config.num_attention_heads
    value_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    query_width = value_width
    if getattr(config, "kv_lora_rank", None):  # latent attention
        query_width = config.qk_nope_head_dim + config.qk_rope_head_dim
        value_width = config.v_head_dim
    windows = {
        "full_attention": seq_len,
        "sliding_attention": getattr(config, "sliding_window", None) or seq_len,
    }
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    seen = sum(mean_context(seq_len, windows.get(layer, 0)) for layer in layers)
    return 6.0 * passed + 6.0 * heads * (query_width + value_width) * seen


def mean_context(seq_len: int, window: int) -> float:
    """Positions, its own included, that a token sees on average under a causal mask."""
    window = min(seq_len, window)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def memory_bytes(device: torch.device) -> float:
    """Peak memory of this rank: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
