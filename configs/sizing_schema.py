"""The values of `python -m launch plan`: typed, documented, checked before anything is computed.

The text under a field is its documentation, as in configs/schema.py. Keys that the trainer has too
mean the same here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from configs.engine_rules import KEEPING, target_of
from configs.rules import out_of_bounds
from configs.schema import ClusterConfig, ModelConfig, Precision

SIZING_GROUPS = ("model", "cluster", "planner")
ENGINES = ("torch", "torch_keep", "torch_split", "zero1", "zero2", "zero3")


class Recomputed(Enum):
    """What the backward pass computes again; either: both are tried."""

    none = "none"
    full = "full"
    either = "either"


@dataclass
class SizingMesh:
    """How the ranks are arranged."""

    ep: int | None = None
    """Ranks of an expert-parallel group. null: every size that fits is tried."""


@dataclass
class SizingTrain:
    """The training that is planned."""

    batch_size: int = 4096
    """Sequences per optimizer step, over all ranks: a multiple of the ranks."""
    seq_len: int = 4096
    """Tokens per sequence."""
    precision: Precision = Precision.bf16
    """Number format of the forward and backward pass; master weights stay fp32."""
    activation_checkpointing: Recomputed = Recomputed.either
    """none, full (compute activations again in the backward pass), or either: try both."""
    refetch_borrowed: bool = False
    """Drop the weights of borrowed experts between forward and backward pass."""


@dataclass
class SizingConfig:
    """A model, a cluster and a batch: what fits and how long a step takes."""

    seed: int = 0
    """Seed of the made-up routing."""
    mesh: SizingMesh = field(default_factory=SizingMesh)
    train: SizingTrain = field(default_factory=SizingTrain)
    engines: list[str] = field(default_factory=lambda: list(ENGINES))
    """Engines to try: torch, torch_keep (reshard_after_forward=false), torch_split
    (shard_gradients=true, where a step has several micro-batches), zero1, zero2, zero3.
    Without zero1 for bf16, which DeepSpeed does not run."""
    compute_share: float = 0.4
    """Share of cluster.flops that matrix products reach: an assumption, not a measurement."""
    reserve: float = 0.1
    """Share of a GPU's memory for what is not counted: CUDA, NCCL, fragments. An assumption."""
    skew: float = 0.3
    """Exponent of the experts' popularity (Zipf) in the made-up routing. 0: all alike."""
    bucket_elements: int = 50_000_000
    """Elements that travel together under DeepSpeed, as engine.bucket_elements."""
    rows: int = 8
    """Lines of the table that fit; the best first. 0: all."""
    json: str | None = None
    """File for every choice with all its numbers. null: none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    planner: Any = MISSING
    """Decides which rank computes which rows, for every layer of every micro-batch."""


def check_sizing(config: SizingConfig) -> None:
    """Refuse values that are out of bounds or do not fit each other.

    Raises:
        ValueError: with one line per problem, each naming key, value, bound and remedy.
    """
    problems = [
        *out_of_bounds(config),
        *_shares(config),
        *_cluster(config),
        *_engines(config),
        *_model(config),
    ]
    if problems:
        raise ValueError("\n".join(problems))
    num_ranks = num_ranks_of(config)
    if config.train.batch_size % num_ranks:
        near = config.train.batch_size // num_ranks * num_ranks or num_ranks
        raise ValueError(
            f"train.batch_size ({config.train.batch_size}) must be a multiple of the ranks "
            f"(cluster.num_nodes x cluster.ranks_per_node = {num_ranks}); use {near}"
        )


def num_ranks_of(config: SizingConfig) -> int:
    """GPUs of the cluster."""
    assert config.cluster.num_nodes and config.cluster.ranks_per_node
    return config.cluster.num_nodes * config.cluster.ranks_per_node


def _shares(config: SizingConfig) -> Iterator[str]:
    if not 0 <= config.reserve < 1:
        yield f"reserve ({config.reserve}) must be >= 0 and < 1"
    if config.skew < 0:
        yield f"skew ({config.skew}) must be >= 0"
    for key in ("rows", "bucket_elements"):
        if getattr(config, key) < 0:
            yield f"{key} ({getattr(config, key)}) must be >= 0"


def _cluster(config: SizingConfig) -> Iterator[str]:
    """A plan needs every number, but nothing between nodes where there is one."""
    needed = ["num_nodes", "ranks_per_node", "intra_gbps", "flops", "memory_gib"]
    if config.cluster.num_nodes != 1:
        needed += ["inter_gbps", "latency_us"]
    unknown = [f"cluster.{name}" for name in needed if getattr(config.cluster, name) is None]
    if unknown:
        yield (
            f"{', '.join(unknown)}: not given, but a plan needs them; give {unknown[0]}=..., or "
            f"choose a cluster that has them, such as cluster=h100_8x8"
        )


def _engines(config: SizingConfig) -> Iterator[str]:
    for name in config.engines:
        if name not in ENGINES:
            yield f"engines ({name}): no such engine; use some of {', '.join(ENGINES)}"
    if config.engines == ["zero1"] and config.train.precision is Precision.bf16:
        yield "engines (zero1) does not run train.precision=bf16; use zero2, or precision fp32"
    if not config.engines:
        yield f"engines is empty; name some of {', '.join(ENGINES)}"


def _model(config: SizingConfig) -> Iterator[str]:
    model = config.model
    if (model.source is None) == (model.family is None):
        yield (
            "model.source and model.family: a plan needs one of them; use model=hf "
            "model.source=DIRECTORY, or a model that names its family, such as model=qwen3_30b_a3b"
        )
    if model.upcycle.recipe is not None:
        yield (
            "model.upcycle: a plan reads the finished model; convert with python -m "
            "trainer.upcycle and use model=hf model.source=DIRECTORY"
        )
    if target_of(config.planner) in KEEPING:
        name = target_of(config.planner).rpartition(".")[2]
        yield (
            f"planner ({name}) keeps experts over micro-batches, which a plan does not count; "
            f"use planner=quota"
        )
