"""Put expert parallelism into a model of the `transformers` library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.dispatch import Dispatcher
from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.plan import Planner
from parallel.planners import home_plan
from parallel.shared import compute_shared_meanwhile
from placement.table import ExpertPlacement


def parallelize(
    model: nn.Module,
    mesh: ParallelMesh,
    *,
    placement: ExpertPlacement | None = None,
    planner: Planner = home_plan,
    dispatcher: Callable[..., Dispatcher] | None = None,
    num_chunks: int = 1,
    refetch: bool = False,
    shared_meanwhile: bool = True,
) -> nn.Module:
    """Replace the experts of every MoE block by `ExpertParallel`, in place, and return the model.

    Args:
        model: any causal LM of `transformers` whose MoE blocks call
            `experts(hidden_states, top_k_index, top_k_weights)`; also on the meta device.
        mesh: the ranks. placement: home rank per layer and expert; default contiguous.
        planner: decides who computes which rows; one with a memory (`for_layer`) is copied for
            every layer. dispatcher: makes a dispatcher; default the class itself.
        num_chunks, refetch: see `ExpertParallel`.
        shared_meanwhile: compute shared experts while tokens travel, where the family allows it.

    Raises:
        ValueError: if the model has no such block or one whose experts cannot be split, if the
            placement does not fit model and mesh, or if ranks disagree on it.
    """
    blocks = find_experts(model)
    num_experts = _num_experts(model, blocks)
    if placement is None:
        placement = ExpertPlacement.contiguous(len(blocks), num_experts, mesh.ep_size)
    _check_placement(placement, len(blocks), num_experts, mesh)
    dispatcher_class = dispatcher or Dispatcher
    nodes = mesh.node_of_ep_ranks()
    for index, (name, experts) in enumerate(blocks):
        layer = ExpertParallel(
            experts,
            layer_index=index,
            home_E=placement.home_LE[index].clone(),
            planner=planner.for_layer(index) if hasattr(planner, "for_layer") else planner,
            dispatcher=dispatcher_class(mesh.ep_group, num_experts, nodes, mesh.weights_group),
            num_chunks=num_chunks,
            refetch=refetch,
        )
        model.set_submodule(name, layer)
        if shared_meanwhile:
            compute_shared_meanwhile(model.get_submodule(name.rpartition(".")[0]), layer.path)
    return model


def moe_layers(model: nn.Module) -> list[tuple[str, ExpertParallel]]:
    """Name and module of every expert-parallel layer, in layer order."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, ExpertParallel)]
    return sorted(layers, key=lambda layer: layer[1].layer_index)


def moe_blocks(model: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of every MoE block (the parent of `experts`), in layer order."""
    names = [name.rpartition(".")[0] for name, _ in moe_layers(model)]
    return [(name, model.get_submodule(name)) for name in names]


def router_of(block: nn.Module) -> nn.Module | None:
    """The child of a MoE block that returns (logits, weights, ids)."""
    for name in ("gate", "router"):
        child = getattr(block, name, None)
        if isinstance(child, nn.Module):
            return child
    return None


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of the stacked experts of every MoE block, in module order.

    Raises:
        ValueError: if there is none, naming the model and what is missing.
    """
    found, refused = [], []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts":
            continue
        reason = _why_not(module)
        if reason is None:
            found.append((name, module))
        else:
            refused.append(f"{name} ({type(module).__name__}): {reason}")
    if refused or not found:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        why = "; ".join(refused[:1]) or "it has no MoE block with a submodule `experts`"
        raise ValueError(
            f"model {kind} ({type(model).__name__}) cannot be run with expert parallelism: {why}. "
            f"Supported are transformers models whose blocks call "
            f"experts(hidden_states, top_k_index, top_k_weights) on stacked weights."
        )
    return found


def _why_not(module: Any) -> str | None:
    if not hasattr(module, "_apply_gate") or not hasattr(module, "has_gate"):
        return "not a stacked experts module of the transformers experts interface"
    if module.has_post_expert_norm:
        return "a norm after every expert is not supported"
    if list(module.children()) and any(list(c.parameters()) for c in module.children()):
        return "its experts have parameters outside of the stacks"
    sizes = {p.shape[0] for p in module.parameters(recurse=False)}
    if sizes != {module.num_experts}:
        return f"its parameters are not stacks of {module.num_experts} experts"
    return None


def _num_experts(model: nn.Module, blocks: list[tuple[str, Any]]) -> int:
    numbers = {experts.num_experts for _, experts in blocks}
    if len(numbers) > 1:
        raise ValueError(
            f"model {type(model).__name__} has layers of different numbers of experts "
            f"({sorted(numbers)}); one placement table needs one number"
        )
    return numbers.pop()


def _check_placement(
    placement: ExpertPlacement, num_layers: int, num_experts: int, mesh: ParallelMesh
) -> None:
    have = (placement.num_layers, placement.num_experts, placement.num_ranks)
    need = (num_layers, num_experts, mesh.ep_size)
    if have != need:
        raise ValueError(
            f"placement is for (layers, experts, EP ranks) = {have}, model and mesh have {need}"
        )
    check_same_on_all_ranks(placement, mesh)


def check_same_on_all_ranks(placement: ExpertPlacement, mesh: ParallelMesh) -> None:
    """Compare the ranks' tables; a collective.

    Raises:
        ValueError: on all ranks, naming those that hold another table than rank 0.
    """
    digest = torch.tensor([int(placement.digest()[:15], 16)], device=mesh.device)
    digests = [torch.empty_like(digest) for _ in range(mesh.world_size)]
    dist.all_gather(digests, digest, group=mesh.dp_group)
    differing = [rank for rank, other in enumerate(digests) if bool(other != digests[0])]
    if differing:
        raise ValueError(f"placement: ranks {differing} hold another table than rank 0")
