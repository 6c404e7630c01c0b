"""Bounds of every number of a run, sweep or launch, and rules between the fields of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from configs.engine_rules import KEEPING, engine_problems, target_of

if TYPE_CHECKING:
    from configs.launch_schema import LaunchConfig
    from configs.schema import Config
    from configs.sizing_schema import SizingConfig
    from configs.sweep_schema import SweepConfig
    from configs.upcycle_schema import UpcycleConfig

AT_LEAST: dict[str, float] = {
    "seed": 0,
    "mesh.ep": 1,
    "mesh.ranks_per_node": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.micro_batch_size": 1,
    "train.seq_len": 2,
    "train.max_grad_norm": 0,
    "train.eval_every": 0,
    "train.eval_batches": 0,
    "train.log_every": 1,
    "train.time_layers_every": 0,
    "train.record_routing_every": 0,
    "train.dispatch_chunks": 0,
    "train.generate": 0,
    "stats.every": 0,
    "relocate.every": 0,
    "relocate.load_weight": 0,
    "relocate.pays_within": 1,
    "relocate.max_moves": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "data.num_bytes": 1,
    "data.validation_fraction": 0,
    "optim.weight_decay": 0,
    "optim.warmup_steps": 0,
    "optim.decay_steps": 0,
    "optim.min_lr_ratio": 0,
    "micro_batch": 1,
    "micro_batches": 1,
    "n_jobs": 1,
    "synthetic.layers": 1,
    "synthetic.experts": 1,
    "synthetic.top_k": 1,
    "synthetic.skew": 0,
    "synthetic.domains": 1,
    "synthetic.seq_len": 1,
    "synthetic.stats_tokens": 1,
    "synthetic.steps": 1,
    "shape.hidden": 1,
    "shape.width": 1,
    "shape.bytes_per_value": 1,
    "gpus": 1,
    "nodes": 1,
    "ranks_per_node": 1,
    "threads": 1,
    "max_restarts": 0,
    "rdzv_port": 1,
    "join_timeout_s": 1,
    "min_nodes": 1,
    "grace_s": 1,
    "cluster.num_nodes": 1,
    "cluster.ranks_per_node": 1,
    "cluster.latency_us": 0,
}
ABOVE: dict[str, float] = {
    "max_shard_gb": 0,
    "mesh.timeout_s": 0,
    "train.stop_after_s": 0,
    "stats.decay": 0,
    "relocate.time_limit_s": 0,
    "optim.lr": 0,
    "optim.eps": 0,
    "cluster.intra_gbps": 0,
    "cluster.inter_gbps": 0,
    "cluster.node_gbps": 0,
    "cluster.flops": 0,
    "cluster.memory_gib": 0,
    "compute_share": 0,
}
AT_MOST: dict[str, float] = {"optim.min_lr_ratio": 1, "stats.decay": 1, "compute_share": 1}
BELOW: dict[str, float] = {"data.validation_fraction": 1, "seed": 2**63, "rdzv_port": 2**16}

TWO_LEVEL = "parallel.two_level.TwoLevelDispatcher"
NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
MAX_POSITIONS = ("max_position_embeddings",)


def check(
    config: Config,
    world_size: int,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    max_positions: int | None = None,
) -> None:
    """Refuse a configuration whose values are out of bounds or do not fit each other.

    Args:
        world_size: number of ranks of the job.
        num_experts, top_k, max_positions: of the model, once it is known; before that, what
            `model.overrides` says about them is used.

    Raises:
        ValueError: with one line per problem, each naming key, value, bound and remedy.
    """
    problems = [
        *out_of_bounds(config),
        *_betas(config),
        *_names(config),
        *_compile(config),
        *_borrowed(config),
        *engine_problems(config, world_size),
        *_levels(config, world_size),
        *_living(config),
        *_mesh(config, world_size, num_experts or _override(config, NUM_EXPERTS)),
        *_batch(config, world_size),
        *_schedule(config),
        *_model(
            config,
            num_experts or _override(config, NUM_EXPERTS),
            top_k or _override(config, TOP_K),
            max_positions or _override(config, MAX_POSITIONS),
        ),
        *_data(config),
    ]
    if problems:
        raise ValueError("\n".join(problems))


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def bounds_text(key: str) -> str:
    """The bounds of a field in words, such as `> 0` or `>= 0, <= 1`; empty without bounds."""
    tables = ((">=", AT_LEAST), (">", ABOVE), ("<=", AT_MOST), ("<", BELOW))
    return ", ".join(f"{sign} {table[key]}" for sign, table in tables if key in table)


def out_of_bounds(
    config: Config | SweepConfig | UpcycleConfig | LaunchConfig | SizingConfig,
) -> Iterator[str]:
    """Numbers of a configuration that are outside their bounds, one line each."""
    for key in sorted({*AT_LEAST, *ABOVE, *AT_MOST, *BELOW}):
        value = _value(config, key)
        if value is None:
            continue
        inside = (
            math.isfinite(value)
            and value >= AT_LEAST.get(key, -math.inf)
            and value > ABOVE.get(key, -math.inf)
            and value <= AT_MOST.get(key, math.inf)
            and value < BELOW.get(key, math.inf)
        )
        if not inside:
            yield f"{key} ({value}) must be {bounds_text(key)}"


def _betas(config: Config) -> Iterator[str]:
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas ({betas}) must be two numbers, each >= 0 and < 1"


def _names(config: Config) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9][A-Za-z0-9._-]*", config.run.name):
        yield f"run.name ({config.run.name!r}) must be made of letters, digits and . _ -"
    for key in ("run.dir", "checkpoint.export_dir", "checkpoint.resume"):
        if not _value(config, key).strip():
            yield f"{key} is empty; leave it out for its default"


def _compile(config: Config) -> Iterator[str]:
    if config.train.compile and config.train.activation_checkpointing.value != "none":
        yield (
            "train.compile (true) has not been proven with train.activation_checkpointing (full); "
            "use one of the two"
        )


def _borrowed(config: Config) -> Iterator[str]:
    target = target_of(config.planner)
    if config.train.refetch_borrowed and target in KEEPING:
        name = target.rpartition(".")[2]
        yield (
            f"train.refetch_borrowed (true) contradicts planner ({name}), which keeps borrowed "
            f"weights for the whole optimizer step; set it to false, or use planner=quota"
        )


def _living(config: Config) -> Iterator[str]:
    stats, relocate, assign = config.stats, config.relocate, config.train.assign_sequences
    if relocate.every and not stats.every and stats.path is None:
        yield (
            f"relocate.every ({relocate.every}) needs statistics; set stats.every, such as "
            f"stats.every={max(1, relocate.every // 10)}, or stats.path"
        )
    if assign and not stats.by_token:
        yield (
            "train.assign_sequences (true) predicts by token id; set stats.by_token=true, so that "
            "they are counted"
        )
    if assign and stats.path is None and not relocate.every:
        yield (
            "train.assign_sequences (true) has no statistics to begin with and none are looked at "
            "later; set relocate.every, or stats.path"
        )
    if relocate.objective.value == "batched" and not assign:
        yield (
            "relocate.objective (batched) supposes train.assign_sequences=true; set it, or use "
            "relocate.objective=home"
        )


def _levels(config: Config, world_size: int) -> Iterator[str]:
    target = target_of(config.dispatcher)
    ep, per_node = config.mesh.ep, config.mesh.ranks_per_node
    if target != TWO_LEVEL or not ep or not per_node or ep < 1 or per_node < 1:
        return
    if ep % per_node and per_node % ep:
        fitting = [d for d in divisors(world_size) if d % per_node == 0 or per_node % d == 0]
        yield (
            f"dispatcher (two_level) needs mesh.ep ({ep}) to be a multiple or a divisor of "
            f"mesh.ranks_per_node ({per_node}), so that its groups lie evenly on nodes; "
            f"use mesh.ep={_either(fitting)}, or dispatcher=direct"
        )


def _mesh(config: Config, world_size: int, num_experts: int | None) -> Iterator[str]:
    ep, ranks_per_node = config.mesh.ep, config.mesh.ranks_per_node
    fitting = divisors(math.gcd(world_size, num_experts or world_size))
    if ep is not None and ep >= 1:
        if world_size % ep:
            yield (
                f"mesh.ep ({ep}) must divide the world size ({world_size}); use {_either(fitting)}"
            )
        elif num_experts and num_experts % ep:
            yield (
                f"mesh.ep ({ep}) must divide the number of experts ({num_experts}); "
                f"use {_either(fitting)}"
            )
    if ranks_per_node is not None and ranks_per_node >= 1 and world_size % ranks_per_node:
        yield (
            f"mesh.ranks_per_node ({ranks_per_node}) must divide the world size ({world_size}); "
            f"use {_either(divisors(world_size))}"
        )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    unit = world_size * micro
    if batch >= 1 and micro >= 1 and batch % unit:
        below = batch // unit * unit
        near = [size for size in (below, below + unit) if size]
        yield (
            f"train.batch_size ({batch}) must be a multiple of the world size ({world_size}) x "
            f"train.micro_batch_size ({micro}) = {unit}; use {_either(near)}"
        )


def _schedule(config: Config) -> Iterator[str]:
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps > steps:
        yield f"optim.warmup_steps ({optim.warmup_steps}) must be <= train.steps ({steps})"
    if optim.schedule.name == "wsd":
        if optim.decay_steps == 0:
            yield "optim.decay_steps (0) must be >= 1 with optim.schedule=wsd"
        elif optim.warmup_steps + optim.decay_steps > steps:
            yield (
                f"optim.warmup_steps ({optim.warmup_steps}) + optim.decay_steps "
                f"({optim.decay_steps}) must be <= train.steps ({steps})"
            )
    elif optim.decay_steps:
        yield (
            f"optim.decay_steps ({optim.decay_steps}) has no meaning with "
            f"optim.schedule={optim.schedule.name}; use optim.schedule=wsd or leave it out"
        )


def _model(
    config: Config, num_experts: int | None, top_k: int | None, max_positions: int | None
) -> Iterator[str]:
    model = config.model
    if model.source is None and model.family is None:
        yield (
            "model.source and model.family are both null; give model.source, a path or hub id, "
            "to continue a checkpoint, or model.family for fresh weights"
        )
    if model.source is not None and model.family is not None:
        yield (
            f"model.family ({model.family}) is for fresh weights, model.source ({model.source}) "
            f"brings its own family; choose model=hf to continue a checkpoint"
        )
    if num_experts and top_k and top_k > num_experts:
        yield (
            f"model.top_k ({top_k}, experts per token) must be <= model.num_experts ({num_experts})"
        )
    if max_positions and config.train.seq_len > max_positions:
        yield (
            f"train.seq_len ({config.train.seq_len}) must be <= max_position_embeddings of the "
            f"model ({max_positions}); shorten it or raise model.overrides.max_position_embeddings"
        )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if not data.sources:
        yield "data.sources is empty; choose a data group such as data=stdlib or add a source"
    if not data.weights:
        return
    missing, unknown = data.sources.keys() - data.weights.keys(), data.weights.keys() - data.sources
    if missing or unknown:
        yield (
            f"data.weights names {sorted(data.weights)} but data.sources has "
            f"{sorted(data.sources)}; give every source a weight (0 leaves it out)"
        )
    bad = {n: w for n, w in data.weights.items() if not (w >= 0 and math.isfinite(w))}
    if bad or not any(data.weights.values()):
        yield f"data.weights ({data.weights}) must be >= 0, and one of them > 0"


def _value(
    config: Config | SweepConfig | UpcycleConfig | LaunchConfig | SizingConfig, key: str
) -> Any:
    """The value of a key; None where this kind of configuration has none."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _override(config: Config, names: tuple[str, ...]) -> int | None:
    found = [config.model.overrides[name] for name in names if name in config.model.overrides]
    return found[0] if found and isinstance(found[0], int) and found[0] > 0 else None


def _either(numbers: list[int]) -> str:
    text = [str(number) for number in numbers]
    return text[0] if len(text) == 1 else f"{', '.join(text[:-1])} or {text[-1]}"
