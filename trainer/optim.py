"""Parameter groups, AdamW, learning-rate schedules, and a gradient norm over sharded parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.layer import ExpertParallel
from parallel.model import moe_layers
from trainer.routers.learned import ROUTING

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_routers: bool, only_routers: bool = False
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one named group of the optimizer; none is empty.

    `decay` holds dense matrices, embeddings included; `experts` the stacked matrices of routed
    experts; `routers` the matrices that score experts, which decay only if asked to; `no_decay`
    all vectors: norms, biases (of experts too) and the like. With `only_routers` all that is no
    router's is in no group.
    """
    routers = _router_prefixes(model)
    members: dict[str, list[nn.Parameter]] = {
        "decay": [],
        "experts": [],
        "routers": [],
        "no_decay": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (only_routers and not name.startswith(routers)):
            continue
        is_expert = ".experts." in name
        if parameter.dim() - is_expert < 2:  # the first dim of a stack counts experts
            group = "no_decay"
        elif is_expert:
            group = "experts"
        else:
            group = "routers" if name.startswith(routers) else "decay"
        members[group].append(parameter)
    decaying = {"decay", "experts", "routers"} if decay_routers else {"decay", "experts"}
    return [
        {"name": group, "params": params, "weight_decay": weight_decay * (group in decaying)}
        for group, params in members.items()
        if params
    ]


def _router_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of router parameters: `gate` or `router` beside `experts`, and those
    of a router of the trainer's."""
    blocks = [name.removesuffix("experts") for name, _ in model.named_modules() if _is_moe(name)]
    own = tuple(f"{block}{router}." for block in blocks for router in ("gate", "router"))
    return (*own, f"{ROUTING}.")


def _is_moe(name: str) -> bool:
    """Whether a module of this name is all experts of a layer, and not a part of that."""
    return name.endswith(".experts") and ".experts." not in name


def build_adamw(
    groups: list[dict[str, Any]], lr: float, betas: Sequence[float], eps: float
) -> torch.optim.AdamW:
    """AdamW over groups that bring their own weight decay; one fused update per group."""
    beta1, beta2 = betas
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer,
    schedule: str,
    *,
    steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    min_lr_ratio: float = 0.0,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate over a run of `steps`: step it after every optimizer step.

    Args:
        schedule: `constant`, `cosine`, or `wsd` (constant, then linear over `decay_steps`).
        warmup_steps: steps of linear rise before that. min_lr_ratio: last rate / peak rate.

    Raises:
        ValueError: for another schedule.
    """
    shapes = {
        "constant": lambda number: 1.0,
        "cosine": lambda number: cosine(number, warmup_steps, steps, min_lr_ratio),
        "wsd": lambda number: linear(number, steps - decay_steps, steps, min_lr_ratio),
    }
    if schedule not in shapes:
        raise ValueError(f"optim.schedule ({schedule}) must be one of {', '.join(shapes)}")
    shape = shapes[schedule]

    def factor(finished_steps: int) -> float:
        number = finished_steps + 1  # of the step that comes, from 1 to steps
        return number / warmup_steps if number <= warmup_steps else shape(number)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def cosine(number: int, start: int, end: int, last: float) -> float:
    """Half a cosine from 1 in step `start` to `last` in step `end` and after."""
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * _progress(number, start, end)))


def linear(number: int, start: int, end: int, last: float) -> float:
    """1 up to step `start`, then a straight line to `last` in step `end` and after."""
    return 1 - (1 - last) * _progress(number, start, end)


def _progress(number: int, start: int, end: int) -> float:
    """Share of the way from step `start` to step `end`, from 0 to 1."""
    return min(max(number - start, 0) / max(1, end - start), 1.0)


@torch.no_grad()
def grad_norm_(
    model: nn.Module,
    max_norm: float,
    group: dist.ProcessGroup,
    *,
    counts_dense: bool = True,
    counts_experts: bool = True,
) -> Tensor:
    """Norm of the whole model's gradient, float64 [], which is scaled down to `max_norm` in place.

    Every element of a gradient must be on exactly one rank of those that count it: then the
    squares of the local shards, summed by one all-reduce, count each once. Every expert is summed
    by itself, then all in the order of their ids: homes make no difference. No host sync.

    Args:
        model: parameters without gradients do not count. max_norm: 0 for never scaling.
        group: all ranks.
        counts_dense, counts_experts: whether this rank counts its shards. False where they are
            copies of what another rank counts; they are scaled all the same.
    """
    layers = [layer for _, layer in moe_layers(model)]
    of_experts = {p for layer in layers for p in layer.experts.parameters(recurse=False)}
    gradients = {p: _local(p.grad, group) for p in model.parameters() if p.grad is not None}
    dense = torch.nn.utils.get_total_norm([g for p, g in gradients.items() if p not in of_experts])
    device = next(iter(gradients.values())).device
    squares = [dense.to(device).double().square()[None] * counts_dense]
    squares += [_expert_squares(layer, gradients, device) * counts_experts for layer in layers]
    square = torch.cat(squares)
    dist.all_reduce(square, group=group)
    norm = square.sum().sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient.mul_(scale.to(gradient.dtype))
    return norm


def _expert_squares(
    layer: ExpertParallel, gradients: Mapping[nn.Parameter, Tensor], device: torch.device
) -> Tensor:
    """Squared norms of what this rank holds of every expert's gradient, float64 [E]."""
    square_E = torch.zeros(layer.num_experts, dtype=torch.float64, device=device)
    trained = [p for p in layer.experts.parameters(recurse=False) if p in gradients]
    if trained:
        norms = [torch.linalg.vector_norm(gradients[p].flatten(1), dim=1) for p in trained]
        here = torch.tensor(layer.experts_in(trained[0]), device=device)
        square_E[here] = torch.stack(norms).double().square().sum(0)
    return square_E


def _local(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's shard of a gradient."""
    if isinstance(gradient, DTensor):
        assert any(placement.is_shard() for placement in gradient.placements)
        return gradient.to_local()
    assert dist.get_world_size(group) == 1, "a whole gradient would count once per rank"
    return gradient
