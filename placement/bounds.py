"""Certified lower bounds of what any placement of a problem costs.

L layers, E experts, R ranks, G groups of a level.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment, linprog

from placement.problem import Problem
from placement.solvers.cliques import Cliques, cliques_of
from placement.solvers.levels import Level, levels, ultrametric
from placement.solvers.relaxation import relax

Floats = npt.NDArray[np.float64]
SAFETY = 1e-9  # of all costs together, for rounding
LINEAR_PROGRAM_SAFETY = 1e-6  # of a layer's load, for the tolerances of the solver


def lower_bound(
    problem: Problem, *, time_limit_s: float = 20.0, known_value: float | None = None
) -> float:
    """A value that no placement of a problem beats, within the limits or not.

    Traffic is split into levels (`levels.py`), each bounded by a semidefinite relaxation with
    triangle inequalities (`relaxation.py`) that starts from transportation problems; the bounds of
    levels, load and what linear costs are left are added. A limit on moves has a bound of its own,
    taken where it is better. More time improves the bound; it takes at least the time of its first
    step, a few seconds for 58 layers of 256 experts.

    Args:
        known_value: of a placement within the limits: the work ends where the bound reaches it.
    """
    deadline = time.monotonic() + time_limit_s
    scale = _scale(problem)
    bound = sum(_load_bound(problem, layer) for layer in range(problem.num_layers))
    linear_LER = np.zeros((problem.num_layers, problem.num_experts, problem.num_ranks))
    if problem.linear_LER is not None:
        linear_LER += problem.linear_LER
    relaxed: list[Cliques] = []
    for level in reversed(_levels(problem)):  # nodes before ranks
        if not level.is_even:
            bound += _uneven_bound(problem, level)
            continue
        bound += level.gain * _traffic(problem)
        linear_LEG = _means(linear_LER, level)
        linear_LER -= linear_LEG[:, :, level.group_R]
        if float(np.ptp(linear_LEG, axis=2).max()) > 1e-12 * scale:
            relaxed.append(cliques_of(problem, level.num_groups, level.gain, linear_LEG))
        else:
            relaxed.append(cliques_of(problem, level.num_groups, level.gain, None))
            bound += float(linear_LEG.min(2).sum())
    bound += _assignment_bound(linear_LER)

    weights = [float(np.abs(cliques.cost_V).sum()) for cliques in relaxed]
    while relaxed:
        left_s = deadline - time.monotonic()
        share = weights[-1] / max(sum(weights), 1e-300)
        last = len(relaxed) == 1 and known_value is not None
        enough = known_value - bound if last and known_value is not None else np.inf
        bound += relax(relaxed.pop(), time.monotonic() + left_s * share, enough)
        weights.pop()
    if problem.max_moves is not None:
        bound = max(bound, _moves_bound(problem))
    bound -= SAFETY * scale
    return bound if known_value is None else min(bound, known_value)


def _levels(problem: Problem) -> list[Level]:
    """Levels of the distances, none where nothing has to be sent."""
    return levels(ultrametric(problem.distance_RR)) if _traffic(problem) else []


def _traffic(problem: Problem) -> float:
    """Cost of all pairs at distance 1."""
    coactive = 0.0 if problem.coactive_LEE is None else float(problem.coactive_LEE.sum()) / 2
    return float(problem.pair_LEE.sum()) + coactive


def _scale(problem: Problem) -> float:
    """The size of every term of the value at most, added."""
    total = _traffic(problem) * float(problem.distance_RR.max())
    if problem.linear_LER is not None:
        total += float(np.abs(problem.linear_LER).max(2).sum())
    slowest = 1.0 if problem.slowness_R is None else float(problem.slowness_R.max())
    return total + problem.load_weight * slowest * float(problem.load_LE.sum())


def _means(linear_LER: Floats, level: Level) -> Floats:
    """Mean linear cost over the ranks of every group, [L, E, G]."""
    groups = range(level.num_groups)
    return np.stack([linear_LER[:, :, level.group_R == group].mean(2) for group in groups], axis=2)


def _assignment_bound(linear_LER: Floats) -> float:
    """Least linear cost: an assignment problem per layer."""
    total = 0.0
    if linear_LER.any():
        for cost_ER in linear_LER:
            slots_ES = np.repeat(cost_ER, len(cost_ER) // cost_ER.shape[1], axis=1)
            total += float(slots_ES[linear_sum_assignment(slots_ES)].sum())
    return total


def _uneven_bound(problem: Problem, level: Level) -> float:
    """Least cost of a level with groups of several sizes: an expert stays with as many others as
    the largest group holds."""
    most = int(np.bincount(level.group_R).max()) * problem.experts_per_rank
    total = 0.0
    for pair_EE in problem.pair_LEE:
        kept = min(_largest(pair_EE, most), _largest(pair_EE.T, most))
        total += float(pair_EE.sum()) - kept
    if problem.coactive_LEE is not None:
        for coactive_EE in problem.coactive_LEE:
            total += (float(coactive_EE.sum()) - _largest(coactive_EE, most - 1)) / 2
    return level.gain * total


def _largest(matrix_EE: Floats, count: int) -> float:
    """Sum of the `count` largest entries of every row."""
    return float(np.sort(matrix_EE, 1)[:, matrix_EE.shape[1] - count :].sum())


def _load_bound(problem: Problem, layer: int) -> float:
    """Least excess of a layer's busiest rank: of its busiest expert and the idlest beside it, or
    of rows spread over ranks of several speeds as if an expert could be split."""
    if not problem.load_weight:
        return 0.0
    load_E = np.sort(problem.load_LE[layer])
    ranks, held = problem.num_ranks, problem.experts_per_rank
    slowness_R = np.ones(ranks) if problem.slowness_R is None else problem.slowness_R
    total = float(load_E.sum())
    if np.ptp(slowness_R) == 0:
        busiest = float(load_E[-1] + load_E[: held - 1].sum())
        excess = float(slowness_R[0]) * (busiest - total / ranks)
        return problem.load_weight * max(0.0, excess)
    if total == 0:
        return 0.0
    # variables: share of the rows per rank, and the busiest rank's seconds
    least, most = load_E[:held].sum() / total, load_E[-held:].sum() / total
    result = linprog(
        np.append(-slowness_R / ranks, 1.0),
        A_ub=np.column_stack([np.diag(slowness_R), -np.ones(ranks)]),
        b_ub=np.zeros(ranks),
        A_eq=np.append(np.ones(ranks), 0.0)[None],
        b_eq=[1.0],
        bounds=[(least, most)] * ranks + [(None, None)],
    )
    assert result.status == 0, result.message
    excess = float(result.fun) - LINEAR_PROGRAM_SAFETY * float(slowness_R.max())
    return problem.load_weight * total * max(0.0, excess)


def _moves_bound(problem: Problem) -> float:
    """The start's value, less all that the experts with most to gain cost there."""
    start_LE = problem.start_LE
    gain_LE = np.zeros(start_LE.shape)
    for layer, home_E in enumerate(start_LE):
        if layer + 1 < problem.num_layers:
            apart_EE = problem.distance_RR[home_E[:, None], start_LE[layer + 1][None, :]]
            cost_EE = problem.pair_LEE[layer] * apart_EE
            gain_LE[layer] += cost_EE.sum(1)
            gain_LE[layer + 1] += cost_EE.sum(0)
        if problem.coactive_LEE is not None:
            apart_EE = problem.distance_RR[home_E[:, None], home_E[None, :]]
            gain_LE[layer] += (problem.coactive_LEE[layer] * apart_EE).sum(1)
        if problem.linear_LER is not None:
            linear_ER = problem.linear_LER[layer]
            gain_LE[layer] += linear_ER[np.arange(len(home_E)), home_E] - linear_ER.min(1)
    assert problem.max_moves is not None
    movable = np.sort(gain_LE.ravel())[::-1][: problem.max_moves]
    load = sum(_load_bound(problem, layer) for layer in range(problem.num_layers))
    if problem.max_moves < 2:  # a single expert cannot leave: every rank holds as many
        movable, load = movable[:0], problem.load_cost(start_LE)
    return problem.value(start_LE) - problem.load_cost(start_LE) + load - float(movable.sum())
