"""Find a placement: exactly where that is possible, else by search, always with a certificate."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from placement.bounds import lower_bound
from placement.exact import is_small, solve_exact
from placement.formulate import problem_of
from placement.objective import Cost, Objective, cost
from placement.search import search
from placement.stats import RoutingStats
from placement.table import ExpertPlacement
from placement.topology import Topology

METHODS = ("auto", "exact", "search")
BOUND_SHARE = 0.5  # of the time limit, at most, for the bound of a searched placement


@dataclass(frozen=True)
class Solution:
    """A placement, what it costs, and how much better any other could be.

    Attributes:
        cost: expected, by `objective.cost`; in `batched` without statistics by domain, as if
            sequences were dealt out at random.
        value: the objective's weighted seconds; start_value: of `start`. lower_bound: certified,
            of the value of every placement within the limits. Values leave out what no placement
            changes, so only their differences count.
        judged: the objective's weighted seconds of `cost`: what differences are measured against.
        method: "exact" or "search". proven: the placement is optimal. finished: the solver was
            not stopped by the time limit.
        moves: experts that leave their rank in `start`.
    """

    placement: ExpertPlacement
    cost: Cost
    value: float
    start_value: float
    lower_bound: float
    judged: float
    method: str
    seconds: float
    proven: bool
    finished: bool
    moves: int

    @property
    def saved(self) -> float:
        """Weighted seconds by which the placement is better than `start`."""
        return self.start_value - self.value

    @property
    def gap(self) -> float:
        """The share of the judged seconds that any other placement could save at most."""
        if self.proven or self.value <= self.lower_bound:
            return 0.0
        return (self.value - self.lower_bound) / max(self.judged, 1e-300)

    def describe(self) -> str:
        """In one line: moves, what they save, and how much more is possible."""
        certificate = "proven optimal" if self.proven else f"at most {self.gap:.1%} from optimal"
        share = self.saved / max(self.judged + self.saved, 1e-300)
        out_of_time = "" if self.finished else ", out of time"
        return (
            f"{self.moves:,} of {self.placement.home_LE.numel():,} experts move and save "
            f"{share:.1%}; {certificate} ({self.method}, {self.seconds:.1f} s{out_of_time})"
        )


def solve(
    stats: RoutingStats,
    topology: Topology,
    start: ExpertPlacement,
    *,
    method: str = "auto",
    objective: Objective | None = None,
    max_moves: int | None = None,
    time_limit_s: float = 60.0,
    seed: int = 0,
) -> Solution:
    """A placement at least as good as `start`, with a certified bound.

    Args:
        start: the current placement; its limits count from it.
        method: `exact` (proven, or the best found with its gap when time runs out), `search`, or
            `auto`, which takes `exact` where it is quick.
        objective: default `Objective()`: training without a planner.
        max_moves: most experts that may leave their rank in `start`; None for no limit.
        time_limit_s: of wall time. seed: of the search; the same seed finds the same placement
            unless time runs out.

    Raises:
        ValueError: for an unknown method, and whatever `formulate.problem_of` refuses.
    """
    if method not in METHODS:
        raise ValueError(f"method ({method!r}) must be one of {', '.join(METHODS)}")
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s ({time_limit_s}) must be > 0")
    started = time.monotonic()
    objective = objective or Objective()
    problem, constant = problem_of(stats, topology, start, objective, max_moves)
    exact = method == "exact" or (method == "auto" and is_small(problem))
    searching_s = time_limit_s * (0.2 if exact else 1 - BOUND_SHARE)
    home_LE = search(problem, seed=seed, time_limit_s=searching_s)
    proven = False
    if exact:
        left_s = max(1.0, time_limit_s - (time.monotonic() - started))
        result = solve_exact(problem, start_LE=home_LE, time_limit_s=left_s)
        bound, proven = result.lower_bound, result.proven
        if problem.value(result.home_LE) < problem.value(home_LE):
            home_LE = result.home_LE
    else:
        left_s = max(1.0, time_limit_s - (time.monotonic() - started))
        bound = lower_bound(problem, time_limit_s=min(left_s, time_limit_s * BOUND_SHARE))
    found = ExpertPlacement(torch.from_numpy(home_LE.astype(np.int64)), topology.num_ranks)
    by_domain = bool(stats.by_domain.tokens_G.sum())
    expected = cost(
        found,
        stats,
        topology,
        mode="home" if objective.mode == "batched" and not by_domain else objective.mode,
        two_level=objective.two_level,
        shape=objective.shape,
    )
    value = problem.value(home_LE)
    return Solution(
        placement=found,
        cost=expected,
        value=value + constant,
        start_value=problem.value(problem.start_LE) + constant,
        lower_bound=min(bound, value) + constant,
        judged=objective.judge(expected),
        method="exact" if exact else "search",
        seconds=time.monotonic() - started,
        proven=proven,
        finished=proven or time.monotonic() - started < time_limit_s,
        moves=len(start.moves_to(found)),
    )
