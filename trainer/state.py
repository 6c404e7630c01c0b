"""Model and optimizer state under logical keys: one per expert, whatever rank holds it.

A logical key is the parameter's name in `transformers`, with the expert's id before the
parameter's own name: `model.layers.0.mlp.experts.3.down_proj`. It does not depend on the number
of ranks or the placement, so a checkpoint loads on any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from parallel.layer import ExpertParallel
from parallel.model import moe_layers


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by logical key, as views: writing them writes the model.

    Tied parameters appear once. Sharded dense parameters are DTensors; experts are whole plain
    tensors on the ranks that hold them, or DTensors where the expert-data-parallel group splits
    every expert.
    """
    state: dict[str, Tensor] = {}
    for name, value, layer in parameters(model):
        if layer is None:
            state[name] = value.detach()
        else:
            state.update(expert_slices(name, value.detach(), layer))
    state.update(buffers(model))
    return state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Per-element optimizer state by `<field>.<logical key>`, as views. Empty before a step."""
    state: dict[str, Tensor] = {}
    for name, parameter, layer in parameters(model):
        for field, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if layer is None:
                state[f"{field}.{name}"] = value
            else:
                slices = expert_slices(name, value, layer)
                state.update({f"{field}.{key}": part for key, part in slices.items()})
    return state


def logical_layout(model: nn.Module) -> dict[str, Tensor]:
    """Shape and dtype of the whole model by logical key, all experts included, on the meta device.

    The same on every rank.
    """
    layout: dict[str, Tensor] = {}
    for name, value, layer in parameters(model):
        layout.update(layout_of(name, value.shape, value.dtype, layer))
    layout.update({name: buffer.to("meta") for name, buffer in buffers(model)})
    return layout


def layout_of(
    name: str, shape: torch.Size, dtype: torch.dtype, layer: ExpertParallel | None
) -> dict[str, Tensor]:
    """What is stored of one parameter, by logical key, on the meta device.

    Args:
        shape: whole, or of this rank's stack [S, ...] of experts.
    """
    if layer is None:
        return {name: torch.empty(shape, dtype=dtype, device="meta")}
    one = torch.empty(shape[1:], dtype=dtype, device="meta")
    return dict.fromkeys(_expert_keys(name, range(layer.num_experts)), one)


def expert_slices(name: str, stack: Tensor, layer: ExpertParallel) -> dict[str, Tensor]:
    """Views of the experts in a stack [S, ...] of one layer that this rank holds, by logical key.

    Args:
        name: of the stack in the model. stack: plain, or a DTensor sharded over EDP by experts
            (dim 0) or within every expert (dim 1).
    """
    keys = _expert_keys(name, layer.experts_in(stack))
    if not isinstance(stack, DTensor):
        return dict(zip(keys, stack, strict=True))
    (placement,) = stack.placements
    local = stack.to_local()
    assert isinstance(placement, Shard)
    if placement.dim == 0:
        return dict(zip(keys, local, strict=True))
    inner = [Shard(placement.dim - 1)]
    mesh = stack.device_mesh
    return {
        key: DTensor.from_local(part, mesh, inner, run_check=False)
        for key, part in zip(keys, local, strict=True)
    }


def parameters(model: nn.Module) -> Iterator[tuple[str, Any, ExpertParallel | None]]:
    """Every parameter once, at rest, with its expert-parallel layer if it is a stack of experts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation may have left it gathered, in the compute dtype
    layers = {f"{name}.experts": layer for name, layer in moe_layers(model)}
    for name, parameter in model.named_parameters():
        yield name, parameter, layers.get(name.rpartition(".")[0])


def buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The persistent buffers."""
    persistent = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]


def _expert_keys(name: str, experts: Iterable[int]) -> list[str]:
    """Logical keys of experts of the stack that has this name in the model."""
    prefix, _, parameter = name.rpartition(".")
    prefix = prefix.removesuffix(".experts")
    return [f"{prefix}.{expert}.{parameter}" for expert in experts]
