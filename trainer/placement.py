"""Living placement: routing statistics while training, and better homes for experts when they pay.

T tokens, K choices, S sequences, L MoE layers, E experts, R ranks of an EP group, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import ParallelMesh
from placement.objective import Objective
from placement.solve import Solution, solve
from placement.stats import COUNTS, KINDS, RoutingStats
from placement.table import ExpertPlacement
from placement.topology import Topology
from trainer.assign import SequenceAssigner
from trainer.data.packing import PackedDataset
from trainer.ranks import RankZeroFirst

LEAST_GAIN = 1e-9  # as a share of what the current placement costs


class Recorder:
    """Counts on every rank what its own tokens chose; together they are the job's statistics.

    Args:
        by_token: also count which experts every token id chooses.
        decay: factor on the counts before each recording, so that the past fades.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        num_layers: int,
        num_experts: int,
        *,
        by_token: bool = False,
        decay: float = 1.0,
    ) -> None:
        self.mesh, self.by_token, self.decay = mesh, by_token, decay
        self.stats = RoutingStats(num_layers, num_experts, mesh.ep_size)

    def record(
        self,
        routing: Sequence[tuple[int, Tensor]],
        micro_batches: Sequence[dict[str, Tensor]],
        dataset: PackedDataset,
    ) -> None:
        """Count one optimizer step of this rank.

        Args:
            routing: from `collect_routing`: layer and ids [T, K], micro-batch by micro-batch.
            micro_batches: of the step. dataset: they are from; its sources are the domains.
        """
        if self.decay < 1:
            self.stats.decay(self.decay)
        batches = iter(micro_batches)
        for layer, ids_TK in routing:
            if layer == 0:
                batch = next(batches)
                tokens_ST = batch["input_ids"]
                domain_T = np.repeat(dataset.sources_of(batch["sequence_ids"]), tokens_ST.shape[1])
            self.stats.observe(
                layer,
                ids_TK,
                self.mesh.ep_rank,
                token_T=tokens_ST.flatten() if self.by_token else None,
                domain_T=domain_T,
            )

    def merged(self) -> RoutingStats | None:
        """The statistics of all ranks, on rank 0; None elsewhere. A collective."""
        mine, mesh = self.stats, self.mesh
        merged = RoutingStats(mine.num_layers, mine.num_experts, mine.num_ranks)
        for name in COUNTS:
            counts = getattr(mine, name).to(mesh.device, copy=True)
            if counts.numel():
                dist.reduce(counts, group=mesh.dp_group, group_dst=0)
            getattr(merged, name).copy_(counts)
        sparse = [getattr(mine, name) for name in KINDS]
        everyones = [None] * mesh.world_size if mesh.rank == 0 else None
        scalars = (mine.tokens, mine.top_k)
        dist.gather_object((sparse, scalars), everyones, group=mesh.dp_group, group_dst=0)
        if everyones is None:
            return None
        for theirs in everyones:
            assert theirs is not None
            for name, preferences in zip(KINDS, theirs[0], strict=True):
                getattr(merged, name).add(preferences)
            merged.tokens += theirs[1][0]
            merged.top_k = max(merged.top_k, theirs[1][1])
        return merged

    def start_from(self, path: Path) -> None:
        """Begin with the statistics in a file: rank 0 counts on from them.

        Raises:
            ValueError: if they are of another model.
        """
        if self.mesh.rank != 0:
            return
        stats = RoutingStats.load(path)
        stats.check_model(self.stats.num_layers, self.stats.num_experts)
        if stats.num_ranks != self.stats.num_ranks:  # another EP size: sources mean nothing now
            stats = stats.with_sources(self.stats.num_ranks)
        self.stats = stats


class Relocator:
    """Looks for a better placement and says when the moves pay.

    Args:
        objective: what placements are judged by, in seconds of the tokens counted.
        tokens_per_step: of the whole job. pays_within: optimizer steps in which a move must earn
            its time; None: whatever is better.
        max_moves: most experts that move at once; None for no limit.
        time_limit_s: of a search.
    """

    def __init__(
        self,
        topology: Topology,
        objective: Objective,
        *,
        tokens_per_step: int,
        pays_within: int | None,
        max_moves: int | None,
        time_limit_s: float,
        seed: int,
    ) -> None:
        self.topology, self.objective = topology, objective
        self.tokens_per_step, self.pays_within = tokens_per_step, pays_within
        self.max_moves, self.time_limit_s, self.seed = max_moves, time_limit_s, seed

    def better(self, stats: RoutingStats, current: ExpertPlacement) -> Solution | None:
        """A placement whose moves pay; None if there is none.

        Args:
            stats: of at least one step. current: where experts live now.
        """
        steps = max(1.0, stats.tokens / self.tokens_per_step)
        move_weight = 0.0 if self.pays_within is None else steps / self.pays_within
        solution = solve(
            stats,
            self.topology,
            current,
            objective=replace(self.objective, move_weight=move_weight),
            max_moves=self.max_moves,
            time_limit_s=self.time_limit_s,
            seed=self.seed,
        )
        pays = solution.saved > LEAST_GAIN * solution.judged
        return solution if pays and solution.moves else None

    def describe(self, solution: Solution, stats: RoutingStats) -> str:
        """A relocation in one line: how many experts move and what is expected of it."""
        steps = max(1.0, stats.tokens / self.tokens_per_step)
        saved_ms = 1e3 * solution.saved / steps
        return f"placement: {solution.describe()}: {saved_ms:.3g} ms per step"


@dataclass
class LivingPlacement:
    """What a run does with its statistics: saves them, moves experts, assigns sequences.

    Attributes:
        folder: of the statistics. every: steps between two recordings. review_every: steps between
            two searches for a better placement; 0 for never.
        relocator, assigner: None for what is not wanted.
    """

    recorder: Recorder
    rank_zero: RankZeroFirst
    folder: Path
    every: int
    review_every: int
    relocator: Relocator | None
    assigner: SequenceAssigner | None

    def due(self, step: int) -> bool:
        """Whether this step's routing is recorded."""
        return bool(self.every) and step % self.every == 0

    def review_due(self, step: int) -> bool:
        """Whether placement and assignment are looked at after this step."""
        return bool(self.review_every) and step % self.review_every == 0

    def review(self, current: ExpertPlacement) -> tuple[ExpertPlacement, str]:
        """The placement from now on, and on rank 0 in words why it is another one. A collective.

        Sequences are assigned by it from the next batch on.
        """
        stats, placement, why = self.recorder.merged(), current, ""
        if stats is not None and self.relocator is not None:
            solution = self.relocator.better(stats, current)
            if solution is not None:
                placement, why = solution.placement, self.relocator.describe(solution, stats)
        placement = self.rank_zero.value(placement)
        self._assign_by(stats, placement)
        return placement, why

    def begin(self, current: ExpertPlacement) -> None:
        """Assign sequences by the statistics that the run begins with, if any. A collective."""
        if self.assigner is not None:
            self._assign_by(self.recorder.merged(), current)

    def _assign_by(self, stats: RoutingStats | None, placement: ExpertPlacement) -> None:
        """Give all ranks the rows to expect of every token id. Args: stats: on rank 0."""
        if self.assigner is None:
            return
        rows_VR = None
        if stats is not None:
            home_LE = placement.home_LE.numpy()
            rows_VR = stats.by_token.rows_per_rank(home_LE, placement.num_ranks)
        rows_VR = self.rank_zero.value(rows_VR)
        if len(rows_VR):
            self.assigner.update(rows_VR)

    def save(self, step: int, keep: int) -> None:
        """Write the statistics of all ranks for a checkpoint, and drop the oldest. A collective."""
        stats = self.recorder.merged()
        if stats is not None:
            stats.save(self._path(step))
            for old in sorted(self.folder.glob("step-*.npz"))[:-keep]:
                old.unlink()

    def restore(self, step: int) -> None:
        """Go on from the statistics that were saved with a checkpoint, if they were.

        Raises:
            ValueError: on every rank, if they are not readable or of another model.
        """

        def read() -> None:
            if self._path(step).exists():
                self.recorder.start_from(self._path(step))

        self.rank_zero.result(read)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}.npz"
