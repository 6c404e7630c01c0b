"""Where parameters lie: FSDP2 over every rank, or over the ranks of a node and once per node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, moe_layers, router_of
from trainer.routers.learned import ROUTING


@dataclass(frozen=True)
class Sharding:
    """The ranks over which FSDP2 splits parameters, and those that hold the same parts.

    Attributes:
        dense: for all but experts. One axis: split over all ranks. Two, "node" and "dp": split
            over the ranks of a node and replicated over nodes, FSDP2's hybrid sharding (HSDP).
        experts: whose EDP group splits experts: the mesh of the job, or that of this node.
        copies: the ranks of all nodes with the same part of the same experts; None where
            `experts` is the mesh of the job. FSDP2 sees one node, so that a stack of experts is
            split along one axis everywhere, and a hook adds up gradients over this group.
    """

    dense: DeviceMesh
    experts: ParallelMesh
    copies: dist.ProcessGroup | None = None

    @classmethod
    def over_all_ranks(cls, mesh: ParallelMesh) -> Sharding:
        return cls(mesh.dense, mesh)

    @classmethod
    def within_nodes(cls, mesh: ParallelMesh) -> Sharding:
        """Dense parameters within every node; experts too if whole EP groups share a node.

        With one EP group per node or less, an EDP group has one rank on a node and nothing to
        split there: experts stay split over the whole EDP group.

        Raises:
            ValueError: for a single node, or nodes of one rank.
        """
        per_node, ep, kind = mesh.ranks_per_node, mesh.ep_size, mesh.device.type
        if not 1 < per_node < mesh.world_size:
            raise ValueError(
                f"engine.shard_within_node (true) needs several nodes of several ranks, but "
                f"mesh.ranks_per_node is {per_node} of {mesh.world_size} ranks; set it to false"
            )
        nodes = mesh.world_size // per_node
        dense = init_device_mesh(kind, (nodes, per_node), mesh_dim_names=("node", "dp"))
        if per_node % ep or per_node == ep:
            return cls(dense, mesh)
        expert = init_device_mesh(
            kind, (nodes, per_node // ep, ep), mesh_dim_names=("node", "edp", "ep")
        )
        of_node = replace(mesh, dense=dense["dp"], expert=expert["edp", "ep"])
        return cls(dense, of_node, expert.get_group("node"))

    @property
    def counts_dense(self) -> bool:
        """Whether this rank's dense shards are the copies that count, where each counts once."""
        return self.dense.ndim == 1 or self.dense.get_local_rank("node") == 0

    @property
    def counts_experts(self) -> bool:
        """As `counts_dense`, of experts."""
        return self.copies is None or dist.get_rank(self.copies) == 0


def shard(
    model: Any,
    mesh: ParallelMesh,
    *,
    bf16: bool,
    reshard_after_forward: bool,
    within_nodes: bool = False,
    cpu_offload: bool = False,
) -> Sharding:
    """Shard in place with FSDP2; gradients are sums over all ranks.

    Args:
        within_nodes: over the ranks of every node, see `Sharding`; else over all ranks.
        cpu_offload: keep shards, their gradients and so the optimizer's state in CPU memory.
    """
    sharding = Sharding.within_nodes(mesh) if within_nodes else Sharding.over_all_ranks(mesh)
    compute = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if bf16 else None)
    routing = MixedPrecisionPolicy(param_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    pin = mesh.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pin) if cpu_offload else OffloadPolicy()
    # Buffers that a family declares as parameters (a selection bias) stay whole on every rank.
    frozen = {p for p in model.parameters() if not p.requires_grad}
    dense, experts = sharding.dense, sharding.experts

    def wrap(module: nn.Module, over: Any, mp_policy: MixedPrecisionPolicy, **kwargs: Any) -> None:
        fully_shard(
            module,
            mesh=over,
            mp_policy=mp_policy,
            offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
            ignored_params=frozen,
            **kwargs,
        )

    layer: Any
    for _, layer in moe_layers(model):
        dim = 0 if len(layer.local_experts) % experts.edp_size == 0 else 1
        check_divisible(layer, experts.edp_size, dim)
        wrap(
            layer,
            experts.expert["edp"],
            policy,
            shard_placement_fn=lambda parameter, dim=dim: Shard(dim),
        )
        if sharding.copies is not None:
            layer.set_all_reduce_hook(partial(dist.all_reduce, group=sharding.copies))
    if bf16:
        for _, moe_block in moe_blocks(model):
            router = router_of(moe_block)
            if router is not None:
                wrap(router, dense, routing)
    if hasattr(model, ROUTING):
        wrap(getattr(model, ROUTING), dense, routing)
    for block in decoder_layers(model):
        wrap(block, dense, policy)
    wrap(model, dense, policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True)
    return sharding


def decoder_layers(model: nn.Module) -> list[Any]:
    """The repeated blocks of a causal LM: the module list that contains the MoE layers."""
    return module_list_of(model, moe_layers(model)[0][0])


def module_list_of(model: nn.Module, name: str) -> list[Any]:
    """The innermost module list that contains a named module."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        parent = model.get_submodule(".".join(parts[:end]))
        if isinstance(parent, nn.ModuleList):
            return list(parent)
    raise ValueError(f"model {type(model).__name__} has no list of decoder layers")


def check_divisible(layer: ExpertParallel, edp_size: int, dim: int) -> None:
    """Refuse expert stacks that cannot be split evenly over the EDP group.

    Raises:
        ValueError: naming the stack, its size and the remedy.
    """
    for name in layer.experts.names:
        shape = tuple(getattr(layer.experts, name).shape)
        if shape[dim] % edp_size:
            raise ValueError(
                f"{name} {shape} cannot be split over {edp_size} expert-data-parallel ranks: "
                f"neither experts per rank ({shape[0]}) nor width ({shape[1]}) is divisible; "
                f"choose a larger mesh.ep"
            )
