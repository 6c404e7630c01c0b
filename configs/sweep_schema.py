"""The values of `python -m placement.sweep`: typed, documented, checked before anything runs.

The text under a field is its documentation, as in configs/schema.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf

from configs.rules import out_of_bounds
from configs.schema import ClusterConfig
from configs.secrets import masked

GROUPS = ("placement", "planner", "dispatcher", "cluster")


class Strength(Enum):
    """How strongly made-up routing is structured."""

    none = "none"
    low = "low"
    medium = "medium"
    high = "high"
    domain = "domain"


@dataclass
class SyntheticConfig:
    """Made-up routing, for a sweep without stats and trace."""

    layers: int = 8
    """MoE layers."""
    experts: int = 64
    """Experts per layer: a multiple of the ranks."""
    top_k: int = 4
    """Experts per token."""
    strength: Strength = Strength.medium
    """How much routing follows the layer before, the token and the domain of its text."""
    skew: float = 0.3
    """Exponent of the experts' popularity (Zipf). 0: all alike."""
    domains: int = 8
    """Kinds of text."""
    seq_len: int = 256
    """Tokens per sequence, a divisor of micro_batch."""
    stats_tokens: int = 65536
    """Tokens that placements are solved from; others than those simulated."""
    steps: int = 2
    """Optimizer steps simulated."""


@dataclass
class ShapeConfig:
    """Sizes of the model, which turn rows into bytes and seconds; default: Qwen3-30B-A3B."""

    hidden: int = 2048
    """Width of a token."""
    width: int = 768
    """Width of an expert: three matrices of hidden x width."""
    bytes_per_value: int = 2
    """Bytes of a value of tokens and weights under way: 2 for bf16, 4 for fp32."""


@dataclass
class SweepConfig:
    """One cell of a sweep: a placement, planner and dispatcher, simulated on a cluster."""

    dir: str = "runs/sweep"
    """Folder of the results: finished cells in it are not run again."""
    seed: int = 0
    """Seed of made-up routing, random placement and search."""
    n_jobs: int | None = None
    """Processes, one core each. null: as many as there are cores."""
    stats: str | None = None
    """Routing statistics (.npz) that placements are solved from; without trace, steps are
    simulated from them too."""
    trace: str | None = None
    """Recorded routing to simulate: a file, or a folder such as <run.dir>/routing. Without stats,
    the first half of every rank's tokens is what placements are solved from, and the second half
    is simulated."""
    micro_batch: int = 2048
    """Tokens per rank and forward pass."""
    micro_batches: int = 1
    """Micro-batches per optimizer step."""
    assign_sequences: bool = False
    """Give every rank those sequences of a step whose experts it has, predicted from the
    statistics of token ids where there are some."""
    compute_share: float = 0.5
    """Share of cluster.flops that products of experts reach."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    placement: Any = MISSING
    """Decides on which rank every expert lives."""
    planner: Any = MISSING
    """Decides which rank computes which rows, for every layer of every micro-batch."""
    dispatcher: Any = MISSING
    """Brings tokens to the ranks that compute them, and the outputs back."""

    @property
    def resolved(self) -> dict[str, Any]:
        """Every value as plain numbers, strings, lists and dicts; secrets are ***."""
        plain = OmegaConf.to_container(OmegaConf.structured(self), enum_to_str=True)
        assert isinstance(plain, dict)
        return {str(name): value for name, value in masked(plain).items()}


def check_sweep(config: SweepConfig, choices: Mapping[str, str]) -> None:
    """Refuse a cell whose values are out of bounds or do not fit each other.

    Args:
        choices: chosen file of every group, for the messages.

    Raises:
        ValueError: with one line per problem, each naming key, value, bound and remedy.
    """
    problems = [*out_of_bounds(config), *_cluster(config, choices), *_source(config)]
    if problems:
        raise ValueError("\n".join(problems))


def _cluster(config: SweepConfig, choices: Mapping[str, str]) -> Iterator[str]:
    """A simulation needs every number, but nothing between nodes where there is one."""
    needed = ["num_nodes", "ranks_per_node", "intra_gbps", "flops"]
    if config.cluster.num_nodes != 1:
        needed += ["inter_gbps", "latency_us"]
    unknown = [f"cluster.{name}" for name in needed if getattr(config.cluster, name) is None]
    if unknown:
        file = f"configs/cluster/{choices.get('cluster')}.yaml"
        yield (
            f"{', '.join(unknown)}: null in {file}, but a simulation needs them; give "
            f"{unknown[0]}=..., or choose a cluster that has them, such as cluster=h100_2x8"
        )


def _source(config: SweepConfig) -> Iterator[str]:
    made = config.synthetic
    if config.assign_sequences and config.trace is None and config.stats is not None:
        yield (
            "assign_sequences (true) needs the tokens themselves, stats has only counts; give "
            "trace=... too, or leave stats out for made-up routing"
        )
    if config.stats is not None or config.trace is not None:
        return
    if made.top_k > made.experts:
        yield f"synthetic.top_k ({made.top_k}) must be <= synthetic.experts ({made.experts})"
    for key, tokens in (
        ("micro_batch", config.micro_batch),
        ("synthetic.stats_tokens", made.stats_tokens),
    ):
        if made.seq_len >= 1 and tokens % made.seq_len:
            yield (
                f"{key} ({tokens}) must be a multiple of synthetic.seq_len ({made.seq_len}); "
                f"change either"
            )
