"""What an engine cannot do: rules between the choice of the engine and other fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.schema import Config

DEEPSPEED = "trainer.engine_deepspeed.DeepSpeedEngine"
KEEPING = {"parallel.planners.Sticky", "parallel.planners.Replicated"}
OF_WEIGHTS = {"trainer.balance.coupling.Coupling", "trainer.balance.merging.MergeExperts"}


def engine_problems(config: Config) -> Iterator[str]:
    """What a configuration asks of its engine in vain, one line each."""
    if target_of(config.engine) == DEEPSPEED:
        yield from (f"{refused}, or use engine=torch" for refused in _deepspeed(config))


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
