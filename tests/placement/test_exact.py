"""Exact solvers against brute force and each other, their time limits and their absence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pulp
import pytest
from hypothesis import given, settings

from placement.exact import installed_solver, is_small, solve_exact
from placement.problem import Problem
from placement.solvers.partitions import operations, viterbi
from placement.solvers.program import savings
from placement.solvers.symmetry import symmetry
from tests.placement.problems import all_placements, brute_force, distances, plain, problems
from tests.placement.problems import traffic as transitions

RNG = np.random.default_rng(0)


def check_optimal(problem: Problem, solver: str) -> None:
    optimum = brute_force(problem)
    if optimum == np.inf:
        with pytest.raises(ValueError, match=r"max_load_ratio \(1.5\).* leave"):
            solve_exact(problem, solver=solver)
        return
    result = solve_exact(problem, solver=solver)
    value = problem.value(result.home_LE)
    assert result.proven and not problem.violations(result.home_LE)
    assert value == pytest.approx(optimum, rel=1e-9, abs=1e-9)
    assert result.lower_bound == value


@settings(max_examples=100, deadline=None)
@given(problems())
def test_optimum_is_the_one_of_brute_force(problem: Problem) -> None:
    check_optimal(problem, "auto")


@settings(max_examples=60, deadline=None)
@given(problems())
def test_optimum_of_the_integer_program_is_the_one_of_brute_force(problem: Problem) -> None:
    check_optimal(problem, "highs")


@settings(max_examples=25, deadline=None)
@given(problems())
def test_cbc_agrees(problem: Problem) -> None:
    check_optimal(problem, "cbc")


@pytest.mark.parametrize("kind", ["flat", "two-level", "general"])
def test_dynamic_programming_and_integer_program_agree_on_larger_problems(kind: str) -> None:
    experts, ranks = (8, 4) if kind == "flat" else (6, 3)
    problem = plain(transitions(3, experts), distances(kind, ranks, RNG))
    value = problem.value(viterbi(problem))
    for solver in ("highs", "cbc"):
        result = solve_exact(problem, solver=solver)
        assert result.proven
        assert problem.value(result.home_LE) == pytest.approx(value, rel=1e-9)


def test_deep_problems_of_few_experts_are_proven_at_once() -> None:
    problem = plain(transitions(32, 8), distances("two-level", 4, RNG))
    assert is_small(problem)
    result = solve_exact(problem, time_limit_s=20)
    assert result.proven and result.seconds < 20


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_time_limit_keeps_the_start_and_a_valid_bound(solver: str) -> None:
    problem = plain(transitions(12, 8), distances("two-level", 4, RNG))
    optimum = problem.value(viterbi(problem))
    start_LE = np.random.default_rng(1).permuted(problem.start_LE, axis=1)
    result = solve_exact(problem, start_LE=start_LE, solver=solver, time_limit_s=1.0)
    assert not problem.violations(result.home_LE)
    value = problem.value(result.home_LE)
    assert value <= problem.value(start_LE)
    assert 0 < result.lower_bound <= optimum * (1 + 1e-9) <= value * (1 + 2e-9)


def test_a_start_that_is_optimal_is_returned() -> None:
    problem = plain(transitions(3, 8), distances("flat", 4, RNG))
    best_LE = viterbi(problem)
    result = solve_exact(problem, start_LE=best_LE, solver="highs")
    assert result.proven and (result.home_LE == best_LE).all()


def test_moves_count_in_the_labels_of_the_start() -> None:
    problem = plain(transitions(2, 6), distances("flat", 3, RNG))
    problem = replace(problem, max_moves=3)
    assert operations(problem) == np.inf
    result = solve_exact(problem)
    assert (result.home_LE != problem.start_LE).sum() <= 3
    assert problem.value(result.home_LE) == pytest.approx(brute_force(problem))


def test_limits_that_no_placement_meets_are_named() -> None:
    problem = plain(transitions(2, 4), distances("flat", 2, RNG))
    problem = replace(problem, load_LE=np.array([[9.0, 1, 1, 1]] * 2), max_load_ratio=1.2)
    with pytest.raises(ValueError, match=r"max_load_ratio \(1.2\) leaves no placement of layer 0"):
        solve_exact(problem)
    with pytest.raises(ValueError, match=r"max_load_ratio \(1.2\) and max_moves \(None\) leave no"):
        solve_exact(problem, solver="highs")


def test_missing_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(plain(transitions(2, 4), distances("flat", 2, RNG)), max_moves=4)
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    assert installed_solver("auto") == "cbc"
    assert solve_exact(problem).proven
    with pytest.raises(ValueError, match=r"solver highs is not installed: pip install highspy"):
        solve_exact(problem, solver="highs")
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "available", lambda self: False)
    with pytest.raises(ValueError, match=r"solver highs or cbc is not installed"):
        solve_exact(problem)


def test_refusals() -> None:
    problem = plain(transitions(2, 4), distances("flat", 2, RNG))
    with pytest.raises(ValueError, match=r"solver \('gurobi'\) must be one of auto, highs, cbc"):
        solve_exact(problem, solver="gurobi")
    wide = plain(np.ones((40, 64, 64)), distances("two-level", 8, RNG))
    with pytest.raises(ValueError, match=r"1,966,080 products, too many .* 393 s"):
        solve_exact(wide)


@pytest.mark.parametrize(
    ("kind", "num_ranks", "order"),
    [("flat", 4, 24), ("two-level", 4, 8), ("lopsided", 4, 6), ("two-level", 6, 48)],
)
def test_symmetry_of_ranks(kind: str, num_ranks: int, order: int) -> None:
    problem = plain(transitions(2, 12), distances(kind, num_ranks, RNG))
    group = symmetry(problem)
    assert group.order == order
    home_NE = np.stack([RNG.permutation(problem.start_LE[0]) for _ in range(200)])
    label_NR = group.relabel(home_NE)
    for label_R in label_NR:
        assert sorted(label_R) == list(range(num_ranks))
        moved_RR = problem.distance_RR[np.ix_(label_R, label_R)]
        assert (moved_RR == problem.distance_RR).all()
    canonical_NE = np.take_along_axis(label_NR, home_NE, 1)
    for earlier, later in group.before():
        first_N = (canonical_NE == earlier).argmax(1)
        assert (first_N < (canonical_NE == later).argmax(1)).all()
    again_NR = group.relabel(canonical_NE)
    assert (again_NR == np.arange(num_ranks)).all()


def test_canonical_labellings_are_one_per_orbit() -> None:
    problem = plain(transitions(2, 4), distances("two-level", 4, RNG))
    home_PE = np.concatenate(all_placements(1, 4, 4))
    label_PR = symmetry(problem).relabel(home_PE)
    canonical = {tuple(home) for home in np.take_along_axis(label_PR, home_PE, 1).tolist()}
    assert len(canonical) == len(home_PE) / symmetry(problem).order == 3


def test_ranks_that_costs_tell_apart_are_not_interchanged() -> None:
    problem = plain(transitions(2, 4), distances("flat", 4, RNG))
    slow = replace(problem, slowness_R=np.array([1.0, 1, 1, 2]))
    assert symmetry(slow).order == 24  # slowness costs nothing without a weight
    assert symmetry(replace(slow, load_weight=1.0)).order == 6
    linear_LER = np.zeros((2, 4, 4))
    linear_LER[1, 2, 0] = 1
    assert symmetry(replace(problem, linear_LER=linear_LER)).order == 6
    assert symmetry(replace(problem, max_moves=3)).order == 1


@pytest.mark.parametrize("kind", ["flat", "two-level", "lopsided", "general"])
def test_savings_are_what_the_distance_leaves(kind: str) -> None:
    distance_RR = distances(kind, 4, RNG)
    left_RR = np.full((4, 4), distance_RR.max())
    for saving in savings(distance_RR):
        left_RR[np.ix_(saving.left, saving.right)] -= saving.gain
    np.testing.assert_allclose(left_RR, distance_RR, atol=1e-12)
