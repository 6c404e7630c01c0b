"""Find a placement: exactly where that is possible, else by search, always with a certificate.

L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from placement.bounds import lower_bound
from placement.exact import is_small, solve_exact
from placement.formulate import TOKEN_SHARES, move_seconds, problem_of
from placement.objective import Cost, Objective, cost
from placement.problem import Problem
from placement.search import search
from placement.stats import RoutingStats
from placement.table import ExpertPlacement
from placement.topology import Topology

METHODS = ("auto", "exact", "search")
BOUND_SHARE = 0.5  # of the time limit, at most, for the bound of a searched placement
ROUNDS, LEAST_GAIN = 4, 1e-4  # of formulating anew; the gain as a share of what is judged
ROUNDING = 1e-12  # of a value


@dataclass(frozen=True)
class Solution:
    """A placement, what it costs, and how much better any other could be.

    Attributes:
        cost: expected, by `objective.cost`; in `batched` without statistics by domain, as if
            sequences were dealt out at random.
        judged: the objective's weighted seconds of `cost`, and of the moves.
        saved: weighted seconds by which the placement is better than `start`, moves paid: the
            difference of what is judged, never below 0 where `start` is within the limits. In
            `batched` with fewer than two domains no cost tells where sequences go, and placements
            are chosen by the formulated problem; what is saved is counted as if sequences were
            dealt out at random, so it is the least that they save and may be below 0.
        value: of the problem that was formulated last (`formulate.problem_of`), near this
            placement where that is no exact image of the cost; start_value: of `start`.
            lower_bound: certified, of that problem's value for every placement within the limits.
            Values leave out what no placement changes, so only their differences count.
        method: "exact" or "search". proven: no placement has a lower value. finished: the solver
            was not stopped by the time limit.
        moves: experts that leave their rank in `start`.
    """

    placement: ExpertPlacement
    cost: Cost
    judged: float
    saved: float
    value: float
    start_value: float
    lower_bound: float
    method: str
    seconds: float
    proven: bool
    finished: bool
    moves: int

    @property
    def gap(self) -> float:
        """What any other placement could save at most by the formulated problem, as a share of
        the judged seconds."""
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

    A problem is formulated and solved, what was found is judged by its expected cost, and unless
    the problem is an exact image of that, it is formulated anew near the best placement so far, up
    to four times. In `batched` that gives every domain's sequences their ranks, and then moves
    experts to where their rows come from; there it begins from the best of several first problems.

    Args:
        start: the current placement; its limits count from it.
        method: `exact` (the last problem's optimum, or the best found with its gap when time runs
            out), `search`, or `auto`, which takes `exact` where it is quick.
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
    limits = stats, topology, start, objective, max_moves
    problem, constant = problem_of(*limits)
    exact = method == "exact" or (method == "auto" and is_small(problem))
    judged = _judge(stats, topology, start, objective, problem)
    best = start
    best_judged = np.inf if problem.violations(problem.start_LE) else judged(start)
    searching_s = time_limit_s * (0.2 if exact else 1 - BOUND_SHARE)
    firsts = TOKEN_SHARES if _goes_by_domain(stats, objective) else TOKEN_SHARES[:1]
    rounds = len(firsts) + (ROUNDS if _is_refined(stats, objective) else 0)
    for number in range(rounds):
        if 0 < number < len(firsts):
            problem, constant = problem_of(*limits, token_share=firsts[number])
        elif number:
            problem, constant = problem_of(*limits, around=best)
        near = problem
        if max_moves is None:
            near = replace(problem, start_LE=best.home_LE.numpy())
        left_s = max(0.0, started + searching_s - time.monotonic())
        home_LE = search(near, seed=seed, time_limit_s=left_s / min(3, rounds - number))
        found = ExpertPlacement(torch.from_numpy(home_LE.astype(np.int64)), topology.num_ranks)
        gain = best_judged - judged(found)
        if gain > 0:
            best, best_judged = found, judged(found)
        if number >= len(firsts) and gain <= LEAST_GAIN * best_judged:
            break

    left_s = max(1.0, started + time_limit_s - time.monotonic())
    if exact:
        result = solve_exact(problem, start_LE=best.home_LE.numpy(), time_limit_s=left_s)
        bound = result.lower_bound
        found = ExpertPlacement(torch.from_numpy(result.home_LE), topology.num_ranks)
        if not problem.violations(result.home_LE) and judged(found) < best_judged:
            best, best_judged = found, judged(found)
    else:
        bound = lower_bound(problem, time_limit_s=min(left_s, time_limit_s * BOUND_SHARE))
    value = problem.value(best.home_LE.numpy())
    proven = exact and result.proven and value <= bound + ROUNDING * abs(bound)
    expected = _expected(best, stats, topology, objective)
    spent = objective.judge(expected) + _moving(start, best, topology, objective)
    at_start = objective.judge(_expected(start, stats, topology, objective))
    return Solution(
        placement=best,
        cost=expected,
        judged=spent,
        saved=at_start - spent,
        value=value + constant,
        start_value=problem.value(problem.start_LE) + constant,
        lower_bound=min(bound, value) + constant,
        method="exact" if exact else "search",
        seconds=time.monotonic() - started,
        proven=proven,
        finished=proven or time.monotonic() - started < time_limit_s,
        moves=len(start.moves_to(best)),
    )


def _is_refined(stats: RoutingStats, objective: Objective) -> bool:
    """Whether a problem formulated near a placement says more about its cost."""
    return _goes_by_domain(stats, objective) or (objective.mode == "home" and stats.top_k > 1)


def _goes_by_domain(stats: RoutingStats, objective: Objective) -> bool:
    """Whether the cost is that of sequences which go where their domain's rows are."""
    tells_apart = np.count_nonzero(stats.by_domain.tokens_G) > 1
    return objective.mode == "batched" and bool(tells_apart)


def _judge(
    stats: RoutingStats,
    topology: Topology,
    start: ExpertPlacement,
    objective: Objective,
    problem: Problem,
) -> Callable[[ExpertPlacement], float]:
    """What is to be small: expected cost and moves, or where no cost knows, the problem's value."""

    def judged(placement: ExpertPlacement) -> float:
        if objective.mode == "batched" and not _goes_by_domain(stats, objective):
            return problem.value(placement.home_LE.numpy())
        expected = _expected(placement, stats, topology, objective)
        return objective.judge(expected) + _moving(start, placement, topology, objective)

    return judged


def _expected(
    placement: ExpertPlacement, stats: RoutingStats, topology: Topology, objective: Objective
) -> Cost:
    """The cost by the objective's mode, or as near to that as the statistics know."""
    by_domain = bool(stats.by_domain.tokens_G.sum())
    return cost(
        placement,
        stats,
        topology,
        mode="home" if objective.mode == "batched" and not by_domain else objective.mode,
        two_level=objective.two_level,
        shape=objective.shape,
    )


def _moving(
    start: ExpertPlacement, placement: ExpertPlacement, topology: Topology, objective: Objective
) -> float:
    """Weighted seconds of the moves."""
    seconds_LER = move_seconds(start, topology, objective.shape)
    home_LE1 = placement.home_LE.numpy()[:, :, None]
    return objective.move_weight * float(np.take_along_axis(seconds_LER, home_LE1, 2).sum())
