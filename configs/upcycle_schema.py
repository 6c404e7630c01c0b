"""The values of `python -m trainer.upcycle`: typed, documented, checked before anything is read.

The text under a field is its documentation, as in configs/schema.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf

from configs.rules import out_of_bounds
from configs.secrets import masked

UPCYCLE_GROUPS = ("recipe", "router_init")
DTYPES = ("float32", "bfloat16", "float16")


class Routing(Enum):
    """How router scores become the weights of the chosen experts."""

    renormalised = "renormalised"
    softmax = "softmax"
    sigmoid = "sigmoid"


class Scale(Enum):
    """Where the factor goes that makes the experts' outputs add up to the dense FFN's."""

    auto = "auto"
    spread = "spread"
    down = "down"


@dataclass
class RecipeConfig:
    """What becomes of dense FFNs."""

    recipe: Any = None
    """What becomes of the dense FFN."""
    router_init: Any = None
    """How the routers begin."""
    target: str = "auto"
    """Family of the MoE (qwen2_moe, qwen3_moe, flex_olmo, glm4_moe, ernie4_5_moe, mixtral). auto:
    the first of these that computes what the dense model does."""
    routing: Routing = Routing.renormalised
    """How router scores become weights. renormalised: a softmax, then the chosen ones' are made to
    sum to 1. softmax: over all experts, whichever are chosen. sigmoid: of every score, then made
    to sum to 1 (glm4_moe)."""
    scale: Scale = Scale.auto
    """Where the factor goes that makes the experts' outputs add up to the dense FFN's. auto: a
    factor of the target's own where it has one, else spread. spread: its root on up and its root
    on down. down: all of it on down."""


@dataclass
class UpcycleConfig(RecipeConfig):
    """One conversion of a dense checkpoint, or of several, into an MoE."""

    source: Any = MISSING
    """Path or hub id of a dense Hugging Face checkpoint, or a list of them for recipe=merge."""
    target_dir: str = MISSING
    """Folder of the MoE; must be empty or absent, or hold the same conversion, interrupted."""
    dtype: str | None = None
    """Of the written weights: float32, bfloat16 or float16. null: that of the source; then what is
    copied keeps its bytes."""
    seed: int = 0
    """Seed of every random number; none depends on the order of the work."""
    max_shard_gb: float = 5.0
    """Size of a file of weights at most, 2**30 bytes; a larger tensor has a file of its own."""
    gpus: int = 8
    """GPUs of the training that the plan shows memory for."""
    dry_run: bool = False
    """Show the plan and write nothing."""
    verify: bool = True
    """Compare the result with the source after writing, layer by layer."""

    @property
    def sources(self) -> list[str]:
        """The dense checkpoints."""
        return [self.source] if isinstance(self.source, str) else list(self.source)

    @property
    def resolved(self) -> dict[str, Any]:
        """Every value as plain numbers, strings, lists and dicts; secrets are ***."""
        plain = OmegaConf.to_container(OmegaConf.structured(self), enum_to_str=True)
        assert isinstance(plain, dict)
        return {str(name): value for name, value in masked(plain).items()}


def check_upcycle(config: UpcycleConfig) -> None:
    """Refuse values that are out of bounds.

    Raises:
        ValueError: with one line per problem, each naming key, value, bound and remedy.
    """
    problems = [*out_of_bounds(config), *_own(config)]
    if problems:
        raise ValueError("\n".join(problems))


def _own(config: UpcycleConfig) -> Iterator[str]:
    source = config.source
    if not isinstance(source, str) and not (
        isinstance(source, list) and source and all(isinstance(one, str) for one in source)
    ):
        yield f"source ({source!r}) must be a path or hub id, or a list of them"
    if config.dtype is not None and config.dtype not in DTYPES:
        yield f"dtype ({config.dtype}) must be null or one of {', '.join(DTYPES)}"
