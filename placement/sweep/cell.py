"""One cell of a sweep: load or make routing, place experts, simulate; and write what came of it.

T tokens, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate

from configs.sweep_schema import SweepConfig
from placement.batches import assigned
from placement.objective import ExpertShape
from placement.placers import TWO_LEVEL, Solved
from placement.simulate import Planner, simulate_stats, simulate_trace
from placement.solve import Solution
from placement.stats import RoutingStats
from placement.step_time import GRADIENT_BYTES, Simulation
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace, joined, load_trace

FORMAT = 1  # of results; a change of what they mean makes all cells run again


@dataclass(frozen=True)
class Cell:
    """A combination of a sweep's values.

    Attributes:
        digest: of all that its result depends on; group: of all but planner and dispatcher, so
            that cells of one group share a placement.
        choices: chosen file of every group. name: the overrides that tell it from other cells.
    """

    digest: str
    group: str
    choices: dict[str, str]
    name: dict[str, str]
    config: SweepConfig

    def path(self, folder: Path) -> Path:
        """Of its result."""
        return folder / "cells" / f"{self.digest}.json"


@dataclass(frozen=True)
class Routing:
    """What placements are solved from, and what is simulated: a trace, or else the statistics."""

    stats: RoutingStats
    trace: Trace | None


def run_group(cells: Sequence[Cell], folder: Path) -> None:
    """Simulate cells that share a placement; writes each result when it is there."""
    try:
        config = cells[0].config
        topology, shape = topology_of(config), shape_of(config)
        routing = load_routing(config, topology.num_ranks)
        placement, solution = place(config, routing.stats, topology, shape)
    except Exception as error:
        for cell in cells:
            write(cell, folder, failure(error))
        return
    for cell in cells:
        try:
            step = simulate(cell.config, placement, routing, topology, shape)
            write(cell, folder, result_of(step, placement, solution, topology))
        except Exception as error:
            write(cell, folder, failure(error))


def topology_of(config: SweepConfig) -> Topology:
    """The cluster of a cell; products reach `compute_share` of its peak."""
    cluster = config.cluster
    assert cluster.num_nodes and cluster.ranks_per_node and cluster.intra_gbps and cluster.flops
    return Topology.even(
        cluster.num_nodes,
        cluster.ranks_per_node,
        intra_gbps=cluster.intra_gbps,
        inter_gbps=cluster.inter_gbps or cluster.intra_gbps,  # nowhere used if it is null
        flops=cluster.flops * config.compute_share,
        latency_us=cluster.latency_us or 0.0,
        node_gbps=cluster.node_gbps,
    )


def shape_of(config: SweepConfig) -> ExpertShape:
    """The sizes of a cell's experts."""
    shape = config.shape
    return ExpertShape(shape.hidden, 3 * shape.hidden * shape.width, shape.bytes_per_value)


def load_routing(config: SweepConfig, num_ranks: int) -> Routing:
    """Routing as the configuration says: from files, or made up.

    Raises:
        ValueError: for files that are not readable or not of one model.
    """
    stats = None if config.stats is None else RoutingStats.load(config.stats)
    if config.trace is not None:
        trace = _with_sources(read_trace(Path(config.trace)), num_ranks)
        if stats is None:
            first_T = _first_half(trace)
            stats = RoutingStats.of_trace(trace.take(first_T), num_ranks)
            trace = trace.take(~first_T)
        try:
            stats.check_model(trace.num_layers, trace.num_experts)
        except ValueError as error:
            raise ValueError(f"stats ({config.stats}), trace ({config.trace}): {error}") from error
        return Routing(stats, trace)
    return _made_up(config, num_ranks) if stats is None else Routing(stats, None)


def read_trace(path: Path) -> Trace:
    """A trace from a file, or from all of a folder, in the order of their names.

    Raises:
        ValueError: if there is none, or they are not of one model.
    """
    if not path.is_dir():
        return load_trace(path)
    files = sorted(path.glob("*.npz"))
    if not files:
        raise ValueError(f"trace ({path}): no .npz files; record some (train.record_routing_every)")
    traces = [load_trace(file) for file in files]
    models = {(trace.num_layers, trace.num_experts, trace.top_k) for trace in traces}
    if len(models) > 1:
        raise ValueError(
            f"trace ({path}): its files are of models with (layers, experts, choices) = "
            f"{sorted(models)}; give a folder of one model"
        )
    return joined(traces)


def place(
    config: SweepConfig, stats: RoutingStats, topology: Topology, shape: ExpertShape
) -> tuple[ExpertPlacement, Solution | None]:
    """The placement of a cell, and how it was found, if it was solved.

    Raises:
        ValueError: for experts that the ranks cannot share evenly, and as the placer.
    """
    num_layers, num_experts, num_ranks = stats.num_layers, stats.num_experts, topology.num_ranks
    if num_experts % num_ranks:
        raise ValueError(
            f"the experts ({num_experts}) must be a multiple of the ranks ({num_ranks} = "
            f"cluster.num_nodes x cluster.ranks_per_node); use another cluster"
        )
    node = dict(config.placement)
    if "stats" in node and node["stats"] is None:
        del node["stats"]
        placer = instantiate(node | {"_partial_": True})(stats=stats)
    else:
        placer = instantiate(node)
    if isinstance(placer, ExpertPlacement):
        return placer, None
    sizes = (num_layers, num_experts, num_ranks)
    if isinstance(placer, Solved):
        solution = placer.solution(*sizes, topology=topology, shape=shape)
        return solution.placement, solution
    return placer(*sizes, topology=topology, shape=shape), None


def simulate(
    config: SweepConfig,
    placement: ExpertPlacement,
    routing: Routing,
    topology: Topology,
    shape: ExpertShape,
) -> Simulation:
    """Simulate a cell, sequences assigned to ranks if it says so."""
    run: Any = {
        "micro_batch": config.micro_batch,
        "micro_batches": config.micro_batches,
        "two_level": config.dispatcher["_target_"] == TWO_LEVEL,
        "shape": shape,
    }
    planner = fitted(instantiate(config.planner), topology, shape, config.micro_batches)
    if routing.trace is None:
        return simulate_stats(placement, routing.stats, topology, planner, **run)
    trace = routing.trace
    if config.assign_sequences:
        trace = _assigned(config, trace, routing.stats, placement, topology)
    return simulate_trace(placement, trace, topology, planner, **run)


def fitted(planner: Any, topology: Topology, shape: ExpertShape, micro_batches: int) -> Planner:
    """A planner that knows links and sizes, as the trainer fits it."""
    bytes_per_parameter: float = shape.bytes_per_value + GRADIENT_BYTES
    if hasattr(planner, "next_step"):  # what it borrows stays for a step
        bytes_per_parameter /= micro_batches
    if hasattr(planner, "for_widths"):
        planner = planner.for_widths(
            shape.hidden,
            shape.parameters,
            bytes_per_value=shape.bytes_per_value,
            bytes_per_parameter=bytes_per_parameter,
        )
    if hasattr(planner, "for_topology"):
        planner = planner.for_topology(topology, bytes_per_parameter)
    fits: Planner = planner
    return fits


def write(cell: Cell, folder: Path, content: dict[str, Any]) -> None:
    """Write a cell's result; a file is there in whole or not at all."""
    path = cell.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FORMAT,
        "digest": cell.digest,
        "choices": cell.choices,
        "config": cell.config.resolved,
        **content,
    }
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(partial_path, path)


def _made_up(config: SweepConfig, num_ranks: int) -> Routing:
    """Two samples of one synthetic model."""
    made = config.synthetic
    router = SyntheticRouter(
        made.layers, made.experts, made.strength.value, made.skew, made.domains, config.seed
    )
    sample = partial(router.sample, seq_len=made.seq_len, top_k=made.top_k)
    tokens = config.micro_batch * config.micro_batches * num_ranks * made.steps
    known = sample(made.stats_tokens // made.seq_len, seed=2 * config.seed + 1)
    unseen = sample(tokens // made.seq_len, seed=2 * config.seed + 2)
    stats = RoutingStats.of_trace(_with_sources(known, num_ranks), num_ranks)
    return Routing(stats, _with_sources(unseen, num_ranks))


def _with_sources(trace: Trace, num_ranks: int) -> Trace:
    """A trace from so many ranks: dealt out in order, evenly, unless it was recorded on as many."""
    source_T = trace.source_T
    if source_T is not None and trace.num_tokens and int(source_T.max()) + 1 == num_ranks:
        return trace
    return replace(trace, source_T=np.arange(trace.num_tokens) * num_ranks // trace.num_tokens)


def _first_half(trace: Trace) -> np.ndarray:
    """Which tokens are in the first half of their rank's, bool [T]."""
    assert trace.source_T is not None
    order_T = np.argsort(trace.source_T, kind="stable")
    tokens_R = np.bincount(trace.source_T)
    first_T = np.zeros(trace.num_tokens, dtype=bool)
    place_T = np.arange(trace.num_tokens) - np.repeat(np.cumsum(tokens_R) - tokens_R, tokens_R)
    first_T[order_T] = place_T < np.repeat(tokens_R // 2, tokens_R)
    return first_T


def _assigned(
    config: SweepConfig,
    trace: Trace,
    stats: RoutingStats,
    placement: ExpertPlacement,
    topology: Topology,
) -> Trace:
    """The trace with the sequences of every step on the ranks that have their experts."""
    if trace.sequence_T is None:
        raise ValueError(
            f"assign_sequences (true) needs to know the sequences, but trace ({config.trace}) has "
            f"none; record it with train.record_routing_every"
        )
    num_sequences = len(np.unique(trace.sequence_T))
    step = config.micro_batch * config.micro_batches * topology.num_ranks
    per_step, rest = divmod(step * num_sequences, trace.num_tokens)
    if rest or not per_step or num_sequences % per_step:
        raise ValueError(
            f"assign_sequences (true): a step of {step:,} tokens (micro_batch x micro_batches x "
            f"ranks) must hold whole sequences and the trace whole steps, but it has "
            f"{num_sequences} sequences of {trace.num_tokens / num_sequences:,.0f} tokens; change "
            f"micro_batch"
        )
    known = stats.by_token if trace.token_T is not None and stats.by_token.tokens_G.sum() else None
    return assigned(trace, placement, topology, preferences=known, batch_size=per_step)


def result_of(
    step: Simulation,
    placement: ExpertPlacement,
    solution: Solution | None,
    topology: Topology,
) -> dict[str, Any]:
    plain = {field.name: getattr(step, field.name) for field in fields(step)}
    start = ExpertPlacement.contiguous(
        placement.num_layers, placement.num_experts, placement.num_ranks
    )
    return {
        "status": "done",
        "step": {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in plain.items()},
        "node_of_R": list(topology.node_of_R),
        "home_LE": placement.home_LE.tolist(),
        "moved": len(start.moves_to(placement)),
        "solver": None if solution is None else _certificate(solution),
    }


def _certificate(solution: Solution) -> dict[str, Any]:
    return {
        "method": solution.method,
        "seconds": solution.seconds,
        "proven": solution.proven,
        "finished": solution.finished,
        # seconds that another placement could save at most, of those expected
        "gap": solution.gap,
    }


def failure(error: Exception) -> dict[str, Any]:
    """What the user reads, and where it was raised."""
    expected = isinstance(error, ValueError)
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    return {"status": "failed", "message": message, "traceback": trace}
