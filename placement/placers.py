"""Placers: where experts live at the start. Called with the model's sizes, the ranks and links.

Every placer is called as `placer(num_layers, num_experts, num_ranks, topology=..., shape=...)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from placement.objective import AFFINITY, LOAD, MOETUNER, ExpertShape, Objective
from placement.solve import Solution, solve
from placement.stats import RoutingStats
from placement.table import ExpertPlacement
from placement.topology import Topology

OBJECTIVES: dict[str, Objective] = {
    "home": Objective(),
    "batched": Objective(mode="batched"),
    "affinity": AFFINITY,
    "moetuner": MOETUNER,
    "load": LOAD,
}
TWO_LEVEL = "parallel.two_level.TwoLevelDispatcher"


def contiguous(
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    *,
    topology: Topology | None = None,
    shape: ExpertShape | None = None,
) -> ExpertPlacement:
    """Neighbouring experts share a rank, whatever the links."""
    return ExpertPlacement.contiguous(num_layers, num_experts, num_ranks)


def random(
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    *,
    topology: Topology | None = None,
    shape: ExpertShape | None = None,
    seed: int = 0,
) -> ExpertPlacement:
    """Every layer's experts dealt out at random; the baseline that knows nothing."""
    start = ExpertPlacement.contiguous(num_layers, num_experts, num_ranks)
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(num_experts, generator=generator) for _ in range(num_layers)]
    return ExpertPlacement(start.home_LE.gather(1, torch.stack(order)), num_ranks)


@dataclass(frozen=True)
class Solved:
    """Places experts by routing statistics.

    Attributes:
        stats: file of `RoutingStats.save`, or the statistics themselves.
        objective: name in OBJECTIVES of what is minimised. home: traffic and load of training;
            batched: the same with sequences on the rank of most of their rows; affinity: traffic
            between layers alone (ExFlow); moetuner: that and load; load: the busiest rank alone.
        method: auto, exact or search; see `solve`.
        dispatcher: target of the dispatcher; two-level dispatch is minimised as such.
        load_weight: of the seconds for which ranks wait for the busiest one; None: as the
            objective has it, but in training 0 where the planner evens out the load.
        max_load_ratio: hard bound of max/mean rows per rank in every layer; None for none.
        time_limit_s: of wall time. seed: of the search.

    Raises:
        ValueError: for an unknown objective.
    """

    stats: str | Path | RoutingStats
    objective: str = "home"
    method: str = "auto"
    dispatcher: str = ""
    load_weight: float | None = None
    max_load_ratio: float | None = None
    time_limit_s: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"placement.objective ({self.objective!r}) must be one of {', '.join(OBJECTIVES)}"
            )

    def __call__(
        self,
        num_layers: int,
        num_experts: int,
        num_ranks: int,
        *,
        topology: Topology,
        shape: ExpertShape | None = None,
    ) -> ExpertPlacement:
        """The placement of `solution`."""
        solution = self.solution(num_layers, num_experts, num_ranks, topology=topology, shape=shape)
        return solution.placement

    def solution(
        self,
        num_layers: int,
        num_experts: int,
        num_ranks: int,
        *,
        topology: Topology,
        shape: ExpertShape | None = None,
    ) -> Solution:
        """The placement found, with its certificate; it starts from contiguous homes.

        Args:
            shape: of an expert; default that of Qwen3-30B-A3B.

        Raises:
            ValueError: before any work for statistics of another model; and what `solve` refuses.
        """
        stats = self._read(num_layers, num_experts)
        start = ExpertPlacement.contiguous(num_layers, num_experts, num_ranks)
        objective = OBJECTIVES[self.objective]
        objective = replace(
            objective,
            load_weight=objective.load_weight if self.load_weight is None else self.load_weight,
            two_level=self.dispatcher == TWO_LEVEL,
            max_load_ratio=self.max_load_ratio,
            shape=shape or ExpertShape(),
        )
        return solve(
            stats,
            topology,
            start,
            method=self.method,
            objective=objective,
            time_limit_s=self.time_limit_s,
            seed=self.seed,
        )

    def _read(self, num_layers: int, num_experts: int) -> RoutingStats:
        if isinstance(self.stats, RoutingStats):
            stats, where = self.stats, "placement.stats"
        else:
            stats, where = RoutingStats.load(self.stats), f"placement.stats ({self.stats})"
        try:
            stats.check_model(num_layers, num_experts)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return stats
