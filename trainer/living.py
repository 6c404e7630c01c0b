"""From the configuration to where experts live, at first and while a run trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config, Precision
from parallel.mesh import ParallelMesh
from parallel.model import find_experts
from parallel.probe import measure_topology
from placement.objective import ExpertShape, Objective
from placement.placers import OBJECTIVES, TWO_LEVEL, Solved
from placement.table import ExpertPlacement
from placement.topology import Topology
from trainer.assign import SequenceAssigner
from trainer.checkpoint_files import placement_of
from trainer.data.packing import PackedDataset
from trainer.placement import LivingPlacement, Recorder, Relocator
from trainer.ranks import RankZeroFirst

STATE_BYTES = 12  # of a parameter: fp32 master weight and two moments
HOME_PLAN = "parallel.planners.home_plan"


def first_placement(
    placer: Any,
    sizes: tuple[int, int, int],
    topology: Topology | None,
    expert: ExpertShape,
    rank_zero: RankZeroFirst,
) -> ExpertPlacement:
    """A loaded table, or one that rank 0 makes for these layers, experts and ranks."""
    if isinstance(placer, ExpertPlacement):
        return placer
    if sizes[2] == 1:
        return ExpertPlacement.contiguous(*sizes)

    def make() -> ExpertPlacement:
        if not isinstance(placer, Solved):
            return placer(*sizes, topology=topology, shape=expert)
        assert topology is not None, "it is measured for placements that are solved"
        solution = placer.solution(*sizes, topology=topology, shape=expert)
        print(f"placement: {solution.describe()}")
        return solution.placement

    return rank_zero.result(make)


def where_it_was(
    resume: Path, configured: ExpertPlacement, rank_zero: RankZeroFirst
) -> ExpertPlacement:
    """The placement that a run with relocation had when it was saved; another EP size begins as
    configured."""
    saved = rank_zero.result(lambda: placement_of(resume))
    return saved if saved.num_ranks == configured.num_ranks else configured


def measured_topology(
    config: Config, mesh: ParallelMesh, planner: Any, placer: Any
) -> Topology | None:
    """The ranks and their speeds, measured where they are not given; None if nobody asks."""
    wanted = (
        hasattr(planner, "for_topology"),
        isinstance(placer, Solved),
        config.relocate.every > 0,
        config.train.assign_sequences,
    )
    if mesh.ep_size == 1 or not any(wanted):
        return None
    cluster, bf16 = config.cluster, config.train.precision is Precision.bf16
    return measure_topology(
        mesh,
        torch.bfloat16 if bf16 else torch.float32,
        intra_gbps=cluster.intra_gbps,
        inter_gbps=cluster.inter_gbps,
        flops=cluster.flops,
        latency_us=cluster.latency_us,
    )


def living_placement(
    config: Config,
    mesh: ParallelMesh,
    topology: Topology | None,
    dataset: PackedDataset,
    shape: Any,
    rank_zero: RankZeroFirst,
) -> LivingPlacement | None:
    """Statistics, relocation and assignment as configured; None if nothing of it is wanted.

    Args:
        topology: None with one rank, where nothing can move. shape: the model on the meta device.

    Raises:
        ValueError: if the statistics to begin with are of another model.
    """
    stats, relocate, train = config.stats, config.relocate, config.train
    if not (stats.every or stats.path):
        return None
    blocks = find_experts(shape)
    experts: Any = blocks[0][1]
    recorder = Recorder(
        mesh,
        len(blocks),
        experts.num_experts,
        by_token=stats.by_token,
        decay=stats.decay,
    )
    if stats.path is not None:
        path = Path(stats.path)
        rank_zero.result(lambda: recorder.start_from(path))
    relocator, assigner = None, None
    if topology is not None and relocate.every:
        relocator = Relocator(
            topology,
            _objective(config, expert_shape(config, shape)),
            tokens_per_step=train.batch_size * train.seq_len,
            pays_within=relocate.pays_within,
            max_moves=relocate.max_moves,
            time_limit_s=relocate.time_limit_s,
            seed=config.seed,
        )
    if topology is not None and train.assign_sequences:
        assigner = SequenceAssigner(dataset, mesh, topology)
    return LivingPlacement(
        recorder,
        rank_zero,
        Path(config.run.dir) / "stats",
        every=stats.every,
        review_every=relocate.every,
        relocator=relocator,
        assigner=assigner,
    )


def fitted_placer(config: Config, placer: Any) -> Any:
    """A solved placement that counts waiting for the busiest rank only where the run waits."""
    if not isinstance(placer, Solved) or placer.load_weight is not None:
        return placer
    return replace(placer, load_weight=_load_weight(config, OBJECTIVES[placer.objective]))


def _objective(config: Config, expert: ExpertShape) -> Objective:
    relocate = config.relocate
    objective = OBJECTIVES[relocate.objective.value]
    load_weight = relocate.load_weight
    if load_weight is None:
        load_weight = _load_weight(config, objective)
    two_level = config.dispatcher.get("_target_") == TWO_LEVEL
    return replace(objective, load_weight=load_weight, two_level=two_level, shape=expert)


def _load_weight(config: Config, objective: Objective) -> float:
    """0 where the planner evens out the load and there is traffic to judge by instead."""
    waits = config.planner["_target_"] == HOME_PLAN
    return objective.load_weight if waits or not objective.traffic_weight else 0.0


def expert_shape(config: Config, shape: Any) -> ExpertShape:
    """Sizes of an expert of the model in this run. Args: shape: the model on the meta device."""
    _, experts = find_experts(shape)[0]
    return ExpertShape(
        hidden=shape.config.get_text_config().hidden_size,
        parameters=sum(stack[0].numel() for stack in experts.parameters(recurse=False)),
        bytes_per_value=2 if config.train.precision is Precision.bf16 else 4,
        state_bytes=STATE_BYTES,
    )
