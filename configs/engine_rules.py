"""What an engine cannot do: rules between the choice of the engine and other fields."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.schema import Config

TORCH = "trainer.engine.TorchEngine"
DEEPSPEED = "trainer.engine_deepspeed.DeepSpeedEngine"
HOME_PLAN = "parallel.planners.home_plan"
KEEPING = {"parallel.planners.Sticky", "parallel.planners.Replicated"}
MERGING = "trainer.balance.merging.MergeExperts"
OF_WEIGHTS = {"trainer.balance.coupling.Coupling", MERGING}


def engine_problems(config: Config, world_size: int) -> Iterator[str]:
    """What a configuration asks of its engine in vain, one line each.

    Args:
        world_size: number of ranks of the job.
    """
    if target_of(config.engine) == DEEPSPEED:
        yield from (f"{refused}, or use engine=torch" for refused in _deepspeed(config))
    if target_of(config.engine) == TORCH and config.engine.get("shard_within_node"):
        yield from _hybrid(config, world_size)
    if target_of(config.engine) == TORCH and config.engine.get("cpu_offload"):
        yield from _offloaded(config)


def _hybrid(config: Config, world_size: int) -> Iterator[str]:
    """What does not go with parameters that every node has a copy of."""
    per_node = config.mesh.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    key = "engine.shard_within_node (true)"
    if per_node == 1:
        yield (
            f"{key} needs mesh.ranks_per_node (1) to be >= 2: a node of one rank has nothing to "
            f"split; set it to false"
        )
    elif per_node and world_size <= per_node:
        yield (
            f"{key} needs several nodes, but mesh.ranks_per_node ({per_node}) puts all "
            f"{world_size} ranks on one; set it to false"
        )
    for name, node in config.balance.items():
        if target_of(node) == MERGING:
            yield (
                f"balance ({name}) would count the experts of every node with {key}; leave it "
                f"out, or set engine.shard_within_node=false"
            )


def _offloaded(config: Config) -> Iterator[str]:
    """What needs parameters and gradients on the GPU."""
    if target_of(config.planner) != HOME_PLAN:
        name = target_of(config.planner).rpartition(".")[2]
        yield (
            f"engine.cpu_offload (true) is not supported with planner ({name}): gradients of "
            f"borrowed experts come home on the GPU; use planner=home, or set it to false"
        )


def _deepspeed(config: Config) -> Iterator[str]:
    train, stage = config.train, config.engine.get("zero_stage", 1)
    if stage not in (1, 2, 3):
        yield f"engine.zero_stage ({stage}) must be 1, 2 or 3"
    if train.precision.value == "bf16" and stage == 1:
        yield (
            "train.precision (bf16) is not supported by engine=deepspeed with "
            "engine.zero_stage=1, where DeepSpeed has another optimizer; use engine.zero_stage=2"
        )
    if train.compile:
        yield "train.compile (true) is not supported by engine=deepspeed; set it to false"
    if train.dispatch_chunks == 0:
        yield (
            "train.dispatch_chunks (0, chosen in the first steps) is not supported by "
            "engine=deepspeed; give a number, such as 1"
        )
    if config.relocate.every:
        yield (
            f"relocate.every ({config.relocate.every}) is not supported by engine=deepspeed, "
            f"which cannot move experts; set it to 0"
        )
    if config.optim.only_routers:
        yield (
            "optim.only_routers (true) is not supported by engine=deepspeed, which must train "
            "experts; set it to false"
        )
    if target_of(config.planner) in KEEPING:
        name = target_of(config.planner).rpartition(".")[2]
        yield (
            f"planner ({name}) is not supported by engine=deepspeed, which sums gradients while "
            f"borrowed experts are still kept; use planner=quota"
        )
    for name, node in config.balance.items():
        if target_of(node) in OF_WEIGHTS:
            yield (
                f"balance ({name}) is not supported by engine=deepspeed, which splits the weights "
                f"that it needs; leave it out"
            )


def target_of(node: Any) -> str:
    """The `_target_` of a slot; empty if it has none."""
    return str(node.get("_target_", "")) if isinstance(node, dict) else ""
