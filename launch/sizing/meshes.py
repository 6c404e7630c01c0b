"""Every mesh and engine with the largest micro-batch that fits, and the fastest of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from configs.schema import ClusterConfig
from launch.sizing.activations import Activations, FakeModel, Routed
from launch.sizing.memory import Engine, Memory, Parts, memory
from launch.sizing.shapes import Mesh, ModelShape, shape_of
from launch.sizing.step import MoELayer, Step, ep_topology, made_up_routing, moe_layer, step
from parallel.mesh import divisors
from parallel.plan import Planner

GIB = 2**30


@dataclass(frozen=True)
class Given:
    """What is planned for.

    Attributes:
        num_ranks, ranks_per_node, memory_gib: GPUs, those of a node, memory of each.
        batch_size, seq_len: sequences of an optimizer step over all ranks, and their tokens.
        recompute: choices of activation checkpointing to try. ep: sizes to try; None for all.
        reserve: share of a GPU's memory for what is not counted.
        compute_share: share of the peak that products reach.
    """

    num_ranks: int
    ranks_per_node: int
    memory_gib: float
    cluster: ClusterConfig
    batch_size: int
    seq_len: int
    bf16: bool
    recompute: tuple[bool, ...]
    refetch: bool
    ep: tuple[int, ...] | None
    engines: tuple[Engine, ...]
    planner: Planner
    skew: float
    seed: int
    reserve: float
    compute_share: float
    bucket: int

    @property
    def budget(self) -> int:
        """Bytes that the counted tensors may take."""
        return int(self.memory_gib * GIB * (1 - self.reserve))

    @property
    def value(self) -> int:
        """Bytes of a working weight and an activation."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Choice:
    """An engine and a mesh with their largest micro-batch that fits, or with one sequence if none
    does.

    Attributes:
        sequences: of a rank and micro-batch. step: None if it does not fit.
        tokens_per_s: of a GPU, and utilisation of its peak: if nothing and if all overlaps.
    """

    engine: Engine
    mesh: Mesh
    recompute: bool
    sequences: int
    micro_batches: int
    memory: Memory
    layer: MoELayer
    step: Step | None
    tokens_per_s: tuple[float, float] = (0.0, 0.0)
    utilisation: tuple[float, float] = (0.0, 0.0)

    @property
    def fits(self) -> bool:
        return self.step is not None

    @property
    def overrides(self) -> str:
        """For `trainer.train`."""
        how = "full" if self.recompute else "none"
        return (
            f"{self.engine.overrides} mesh.ep={self.mesh.ep} "
            f"train.micro_batch_size={self.sequences} train.activation_checkpointing={how}"
        )


class Sizing:
    """The choices for one model on one cluster."""

    def __init__(self, config: Any, given: Given) -> None:
        self.given = given
        self.fake = FakeModel(config, torch.bfloat16 if given.bf16 else torch.float32)
        self.model: ModelShape = shape_of(self.fake, given.seq_len)
        self.stats = made_up_routing(self.model, given.skew, given.seed)
        self.layer = cache(self._layer)
        self.parts = cache(self._parts)
        self._dense = cache(self._activations)
        self._head = self.fake.head(1, given.seq_len)
        self._shared = self.fake.shared(1, given.seq_len)

    def choices(self) -> list[Choice]:
        """One for every engine, EP size and kind of activation checkpointing, fastest first; then
        those that do not fit, by their memory."""
        found = list(self._choices())
        return sorted(found, key=lambda c: (not c.fits, -c.tokens_per_s[0], c.memory.total))

    def fitting_ep(self) -> list[int]:
        """EP sizes that are tried."""
        fitting = self.model.fitting_ep(self.given.num_ranks, self.given.ranks_per_node)
        wanted = self.given.ep
        return fitting if wanted is None else [ep for ep in fitting if ep in wanted]

    def _choices(self) -> Iterator[Choice]:
        given = self.given
        for ep in self.fitting_ep():
            mesh = Mesh(given.num_ranks, ep, given.ranks_per_node)
            for engine in given.engines:
                for recompute in given.recompute:
                    choice = self.largest(engine, mesh, recompute)
                    if engine is not Engine.torch_split or choice.micro_batches > 1:
                        yield choice  # with one micro-batch it is torch

    def largest(self, engine: Engine, mesh: Mesh, recompute: bool) -> Choice:
        """The choice with the largest micro-batch that fits."""
        for sequences in reversed(divisors(self.given.batch_size // self.given.num_ranks)):
            choice = self.choice(engine, mesh, recompute, sequences)
            if choice.memory.total <= self.given.budget:
                return self._timed(choice)
        return choice

    def choice(self, engine: Engine, mesh: Mesh, recompute: bool, sequences: int) -> Choice:
        """A choice without its step."""
        given = self.given
        micro_batches = given.batch_size // given.num_ranks // sequences
        layer = self.layer(mesh, sequences)
        fullest = memory(
            self.model,
            mesh,
            engine,
            self.parts(layer.routed, sequences),
            value=given.value,
            micro_batches=micro_batches,
            recompute=recompute,
            borrowed=layer.borrowed,
            refetch=given.refetch,
            bucket=given.bucket,
        )
        return Choice(engine, mesh, recompute, sequences, micro_batches, fullest, layer, None)

    def _timed(self, choice: Choice) -> Choice:
        given, cluster = self.given, self.given.cluster
        assert cluster.flops
        seconds = step(
            self.model,
            choice.mesh,
            choice.engine,
            choice.layer,
            cluster,
            tokens=choice.sequences * given.seq_len,
            micro_batches=choice.micro_batches,
            value=given.value,
            recompute=choice.recompute,
            refetch=given.refetch,
            compute_share=given.compute_share,
        )
        tokens = given.batch_size * given.seq_len / given.num_ranks
        rates = tokens / seconds.slowest, tokens / seconds.fastest
        peak = self.model.flops_per_token / cluster.flops
        return replace(
            choice,
            step=seconds,
            tokens_per_s=rates,
            utilisation=(rates[0] * peak, rates[1] * peak),
        )

    def _layer(self, mesh: Mesh, sequences: int) -> MoELayer:
        given = self.given
        return moe_layer(
            self.model,
            ep_topology(mesh, given.cluster, given.compute_share),
            given.planner,
            self.stats,
            tokens=sequences * given.seq_len,
            value=given.value,
        )

    def _parts(self, routed: Routed, sequences: int) -> Parts:
        """Activations of a micro-batch, which are those of one sequence times their number."""
        layers: list[Activations] = []
        for first, number in self.fake.kinds().items():
            layers += [_times(self._dense(first, routed), sequences)] * number
        width = self.model.hidden * self.given.value * self.given.seq_len * sequences
        head = _times(self._head, sequences)
        return Parts(tuple(layers), head, self._shared * sequences, width)

    def _activations(self, first: int, routed: Routed) -> Activations:
        return self.fake.layer(first, 1, self.given.seq_len, routed)


def _times(one: Activations, number: int) -> Activations:
    return Activations(one.kept * number, one.peak * number)
