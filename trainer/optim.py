"""Parameter groups, AdamW, learning-rate schedules and the gradient norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ROUTERS = ("gate", "router", "wg")


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_routers: bool
) -> list[dict[str, Any]]:
    """Named groups for an optimizer, every trainable parameter in exactly one.

    `experts` and `matrices` decay; `no_decay` holds norms, biases and other vectors; `routers`
    decay by option.
    """
    groups: dict[str, list[nn.Parameter]] = {
        "matrices": [],
        "experts": [],
        "routers": [],
        "no_decay": [],
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group_of(name, parameter)].append(parameter)
    decays = {"matrices": True, "experts": True, "routers": decay_routers, "no_decay": False}
    return [
        {"name": name, "params": params, "weight_decay": weight_decay if decays[name] else 0.0}
        for name, params in groups.items()
        if params
    ]


def _group_of(name: str, parameter: Tensor) -> str:
    path = name.split(".")
    if "experts" in path[:-1]:
        return "no_decay" if path[-1].endswith("bias") else "experts"
    if parameter.dim() < 2 or path[-1].endswith("bias") or "norm" in path[-2]:
        return "no_decay"
    return "routers" if any(part in ROUTERS for part in path[-3:-1]) else "matrices"


def build_adamw(
    groups: list[dict[str, Any]], lr: float, betas: Sequence[float], eps: float
) -> torch.optim.AdamW:
    """AdamW over named groups."""
    beta1, beta2 = betas
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps)


def build_schedule(
    optimizer: torch.optim.Optimizer,
    schedule: str,
    *,
    steps: int,
    warmup_steps: int,
    decay_steps: int,
    min_lr_ratio: float,
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over the steps of a run; see `factor`."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        partial(
            factor,
            schedule=schedule,
            steps=steps,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            min_lr_ratio=min_lr_ratio,
        ),
    )


def factor(
    step: int,
    *,
    schedule: str,
    steps: int,
    warmup_steps: int,
    decay_steps: int,
    min_lr_ratio: float,
) -> float:
    """Share of the peak learning rate in a step, counted from 0.

    A linear warm-up, then `constant`; `cosine` down to `min_lr_ratio` at the last step; or `wsd`:
    constant, then linear down to `min_lr_ratio` over the last `decay_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    first = warmup_steps if schedule == "cosine" else steps - decay_steps
    done = min(max((step - first) / max(1, steps - 1 - first), 0.0), 1.0)
    height = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return min_lr_ratio + (1 - min_lr_ratio) * height


@torch.no_grad()
def grad_norm_(
    parameters: Sequence[nn.Parameter], max_norm: float, group: dist.ProcessGroup
) -> Tensor:
    """The norm of the whole model's gradient; gradients are scaled down in place to `max_norm`.

    Every parameter is sharded over all ranks that hold it, so the sum over ranks of the squares
    of local shards counts each element once. The result stays on the device.

    Args:
        parameters: those with gradients. max_norm: 0 for no clipping. group: all ranks.
    """
    local = [_local(p.grad) for p in parameters if p.grad is not None]
    device = local[0].device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for norm in torch._foreach_norm([grad for grad in local if grad.numel()]):
        squares += norm.double().square()
    dist.all_reduce(squares, group=group)
    norm = squares.sqrt()
    if max_norm > 0:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for grad in local:
            grad.mul_(scale.to(grad.dtype))
    return norm


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
