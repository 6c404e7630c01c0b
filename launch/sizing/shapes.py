"""Sizes of a model's parameters and how they divide over the ranks of a mesh.

W ranks in all, EP of them in an expert-parallel group, EDP = W / EP hold the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from configs.rules import TOP_K
from launch.sizing.activations import FakeModel
from trainer.metrics import model_flops_per_token, parameter_counts

Sizes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Mesh:
    """Ranks, those of an EP group, and those of a node."""

    num_ranks: int
    ep: int
    ranks_per_node: int

    @property
    def edp(self) -> int:
        return self.num_ranks // self.ep


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together: a decoder layer, or what lies outside of all layers.

    Attributes:
        dense: shapes of the parameters that every rank shares. experts: of the stacks [E, ...].
        frozen: elements that are never sharded.
    """

    dense: Sizes
    experts: Sizes = ()
    frozen: int = 0

    def whole(self, mesh: Mesh) -> tuple[int, int]:
        """Elements of a rank before they are sharded: dense ones, and of its experts."""
        return _total(self.dense), _total(self.experts) // mesh.ep

    def sharded(self, mesh: Mesh) -> tuple[int, int]:
        """Elements of rank 0, which has the most: FSDP2 splits every parameter along its first dim
        and experts along the first or second one (`trainer.sharding.shard`)."""
        dense = sum(
            -(-shape[0] // mesh.num_ranks) * math.prod(shape[1:]) if shape else 1
            for shape in self.dense
        )
        return dense, _total(self.experts) // mesh.num_ranks


@dataclass(frozen=True)
class ModelShape:
    """What a plan has to know of a model.

    Attributes:
        units: decoder layers, then the rest. num_moe: layers with experts.
        expert: parameters of one expert. parameters, active: all, and those that a token passes.
        flops_per_token: of a forward and backward pass, nothing recomputed.
    """

    units: tuple[Unit, ...]
    num_moe: int
    num_experts: int
    top_k: int
    hidden: int
    vocabulary: int
    expert: int
    parameters: int
    active: int
    flops_per_token: float

    @property
    def expert_flops_per_token(self) -> float:
        """Share of the experts in `flops_per_token`."""
        return 6.0 * self.top_k * self.expert * self.num_moe

    def fitting_ep(self, num_ranks: int, ranks_per_node: int) -> list[int]:
        """EP sizes that the engines take: they divide ranks and experts, lie evenly on nodes, and
        the experts of a rank can be split over EDP (`trainer.sharding.check_divisible`)."""
        return [
            ep
            for ep in range(1, num_ranks + 1)
            if num_ranks % ep == 0
            and self.num_experts % ep == 0
            and (ep % ranks_per_node == 0 or ranks_per_node % ep == 0)
            and all(self._splits(unit, ep, num_ranks // ep) for unit in self.units)
        ]

    def _splits(self, unit: Unit, ep: int, edp: int) -> bool:
        if (self.num_experts // ep) % edp == 0:
            return True
        return all(shape[1] % edp == 0 for shape in unit.experts)


def shape_of(fake: FakeModel, seq_len: int) -> ModelShape:
    """The sizes of a model.

    Raises:
        ValueError: if its configuration does not say how many experts a token chooses.
    """
    stacks = {p for block in fake.blocks for p in block.experts.parameters()}
    in_layers: set[Any] = set()
    units = []
    for layer in fake.layers:
        units.append(_unit(layer, stacks, ()))
        in_layers |= set(layer.parameters())
    units.append(_unit(fake.model, stacks, in_layers))
    experts = fake.blocks[0].experts
    config = fake.config.get_text_config()
    total, active = parameter_counts(fake.model)
    top_k = next(getattr(config, name) for name in TOP_K if getattr(config, name, None))
    width = fake.model.get_input_embeddings().weight
    return ModelShape(
        units=tuple(units),
        num_moe=len(fake.blocks),
        num_experts=experts.num_experts,
        top_k=top_k,
        hidden=width.shape[1],
        vocabulary=width.shape[0],
        expert=sum(p.numel() for p in experts.parameters()) // experts.num_experts,
        parameters=total,
        active=active,
        flops_per_token=model_flops_per_token(fake.model, seq_len),
    )


def _unit(module: nn.Module, stacks: set[Any], apart: Iterable[Any]) -> Unit:
    apart = set(apart)
    parameters = [p for p in module.parameters() if p not in apart]
    trained = [p for p in parameters if p.requires_grad]
    return Unit(
        dense=tuple(tuple(p.shape) for p in trained if p not in stacks),
        experts=tuple(tuple(p.shape) for p in trained if p in stacks),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
    )


def _total(shapes: Sizes) -> int:
    return sum(math.prod(shape) for shape in shapes)
