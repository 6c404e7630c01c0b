"""Bytes on the fullest GPU, by what they are for.

Counted are tensors of the engines, at the moment of a step when most of them are alive. What CUDA,
NCCL and the allocator take beside them is not; `reserve` of the plan leaves room for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum

from launch.sizing.activations import Activations
from launch.sizing.shapes import Mesh, ModelShape

MASTER, MOMENTS, SUMMED = 4, 8, 4  # bytes per element: fp32 weights, AdamW's two, fp32 gradients


class Engine(Enum):
    """An engine with the setting that decides what is sharded when."""

    torch = "torch"
    torch_keep = "torch_keep"
    torch_split = "torch_split"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"

    @property
    def overrides(self) -> str:
        """For `trainer.train`."""
        if self is Engine.torch:
            return "engine=torch"
        if self is Engine.torch_keep:
            return "engine=torch engine.reshard_after_forward=false"
        if self is Engine.torch_split:
            return "engine=torch engine.shard_gradients=true"
        return f"engine=deepspeed engine.zero_stage={self.name[-1]}"


@dataclass(frozen=True)
class Parts:
    """Activations of all parts of a model in one forward and backward pass.

    Attributes:
        layers: of every decoder layer. head: last norm, output layer and loss.
        shared: bytes that layers share. input: bytes of the input of one layer.
    """

    layers: tuple[Activations, ...]
    head: Activations
    shared: int
    input: int

    def kept(self, recompute: bool) -> int:
        """Bytes that wait for the backward pass; of a recomputed layer its input alone."""
        each = [self.input if recompute else layer.kept for layer in self.layers]
        return sum(each) + self.shared

    def extra(self, recompute: bool) -> tuple[int, int]:
        """Most bytes beside these: while the loss is computed, and while a layer runs backward."""
        layers = [layer.peak - (self.input if recompute else layer.kept) for layer in self.layers]
        return self.head.peak, max(layers)


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank.

    Attributes:
        parameters: fp32 weights, and whole working copies that stay. gradients: at their most.
        optimizer: AdamW's moments. gathered: what is gathered for a while, with its gradients.
        borrowed: weights and gradients of borrowed experts.
        activations: that wait for the backward pass. loss: logits and what the loss makes of them,
            or what one layer needs to run, whichever is more.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    borrowed: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        parts = asdict(self)
        return max(parts, key=lambda name: parts[name])


def memory(
    model: ModelShape,
    mesh: Mesh,
    engine: Engine,
    parts: Parts,
    *,
    value: int,
    micro_batches: int,
    recompute: bool,
    borrowed: int,
    refetch: bool,
    bucket: int,
) -> Memory:
    """Bytes of the fullest rank.

    Args:
        value: bytes of a working weight: 2 for bf16, 4 for fp32.
        micro_batches: of an optimizer step. From two on the torch engine sums whole gradients in
            fp32 and shards them only after the last, unless `engine.shard_gradients` is set.
        borrowed: experts that the busiest rank borrows in a layer. refetch: their weights are
            dropped between forward and backward.
        bucket: elements that travel together under DeepSpeed.
    """
    states, gathered = (
        _torch(model, mesh, engine, value, micro_batches)
        if engine in (Engine.torch, Engine.torch_keep, Engine.torch_split)
        else _deepspeed(model, mesh, engine, value, bucket)
    )
    layers_kept = 1 if refetch or not borrowed else model.num_moe
    lent = borrowed * model.expert * (value * layers_kept + SUMMED)
    return Memory(
        *states,
        gathered=gathered,
        borrowed=lent,
        activations=parts.kept(recompute),
        loss=max(parts.extra(recompute)),
    )


def _torch(
    model: ModelShape, mesh: Mesh, engine: Engine, value: int, micro_batches: int
) -> tuple[tuple[int, int, int], int]:
    """FSDP2: shards at rest; gathered is the unit outside of the layers with its gradient, two
    layers (one ahead of time), and gradients of one, twice: as they come, and as they are summed.
    """
    own = sum(sum(unit.sharded(mesh)) + unit.frozen for unit in model.units)
    frozen = sum(unit.frozen for unit in model.units)
    wholes = [sum(unit.whole(mesh)) for unit in model.units]
    splits = micro_batches == 1 or engine is Engine.torch_split
    gradients = SUMMED * (own - frozen if splits else sum(wholes))
    layer, rest = max(wholes[:-1]), wholes[-1]
    copies = sum(wholes) if engine is Engine.torch_keep else rest + 2 * layer
    gathered = value * (copies + rest) + (value + SUMMED) * layer
    states = (MASTER * own, gradients, MOMENTS * (own - frozen))
    return states, gathered


def _deepspeed(
    model: ModelShape, mesh: Mesh, engine: Engine, value: int, bucket: int
) -> tuple[tuple[int, int, int], int]:
    """ZeRO: working weights whole (1, 2) or split (3) beside split fp32 masters and moments;
    gathered are gradients of a bucket or layer, as they come and as they are summed, and under
    ZeRO 3 two layers and the unit outside of them.
    """
    dense, experts = (sum(both) for both in zip(*(u.whole(mesh) for u in model.units), strict=True))
    whole, own = dense + experts, -(-dense // mesh.num_ranks) + -(-experts // mesh.edp)
    working = own if engine is Engine.zero3 else whole
    gradients = SUMMED * (whole if engine is Engine.zero1 else own)
    wholes = [sum(unit.whole(mesh)) for unit in model.units]
    layer, rest = max(wholes[:-1]), wholes[-1]
    gathered = (value + SUMMED) * max(bucket, layer)
    if engine is Engine.zero3:
        gathered += value * (2 * layer + rest)
    return (value * working + MASTER * own, gradients, MOMENTS * own), gathered
