"""Lower bounds against the optimum of brute force, and how near they come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.bounds import lower_bound
from placement.exact import solve_exact
from placement.problem import Problem
from placement.solvers.cliques import cliques_of
from placement.solvers.levels import levels, ultrametric
from placement.solvers.partitions import viterbi
from placement.solvers.relaxation import Iteration
from tests.placement.problems import brute_force, distances, plain, problems, traffic

RNG = np.random.default_rng(0)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_placement_beats_the_bound(problem: Problem) -> None:
    optimum = brute_force(problem)
    for time_limit_s in (0.0, 0.1):
        assert lower_bound(problem, time_limit_s=time_limit_s) <= optimum + 1e-12 * abs(optimum)


@pytest.mark.parametrize("kind", ["flat", "two-level"])
@pytest.mark.parametrize("seed", range(4))
def test_no_placement_beats_the_bound_of_deeper_problems(kind: str, seed: int) -> None:
    problem = plain(traffic(6, 8, seed), distances(kind, 4, RNG))
    optimum = problem.value(viterbi(problem))
    bound = lower_bound(problem, time_limit_s=1.0)
    assert 0.98 * optimum <= bound <= optimum


def test_many_vertices_take_single_precision_and_stay_below() -> None:
    # 108 vertices a clique; the hidden partition is not optimal, but no bound may exceed it
    rng = np.random.default_rng(3)
    home_LE = np.stack([rng.permutation(np.repeat(range(6), 9)) for _ in range(3)])
    pair_LEE = rng.random((2, 54, 54)) + 3 * (home_LE[:-1, :, None] == home_LE[1:, None, :])
    problem = plain(pair_LEE, distances("flat", 6, rng))
    hidden = problem.value(home_LE)
    assert 0.97 * hidden <= lower_bound(problem, time_limit_s=2.0) <= hidden


@settings(max_examples=40, deadline=None)
@given(problems(limits=False), st.integers(0, 2**32), st.sampled_from([0.01, 0.3, 3.0]))
def test_any_multipliers_give_a_valid_bound(problem: Problem, seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    problem = replace(
        problem, load_weight=0.0, distance_RR=distances("flat", problem.num_ranks, rng)
    )
    cliques = cliques_of(problem, problem.num_ranks, 1.0, problem.linear_LER)
    iteration = Iteration(cliques, scale=1.0)
    iteration.triangles.separate(rng.random(len(cliques.cost_V)))
    edge_T3, kind_T, multiplier_T = iteration.triangles.multipliers()
    multiplier_T = size * rng.random(len(multiplier_T)) / len(multiplier_T)
    iteration.triangles.restore((edge_T3, kind_T, multiplier_T))
    multipliers_KNN = size * rng.normal(size=cliques.index_KNN.shape)
    multipliers_KNN += multipliers_KNN.transpose(0, 2, 1)
    all_traffic = problem.pair_LEE.sum()
    if problem.coactive_LEE is not None:
        all_traffic += problem.coactive_LEE.sum() / 2
    bound = all_traffic + iteration.bound(multipliers_KNN, exact=True)
    assert bound <= brute_force(problem) + 1e-9


def test_bounds_of_easy_problems_are_tight() -> None:
    blocks_EE = np.kron(np.eye(4), np.ones((2, 2)))
    problem = plain(np.stack([blocks_EE] * 3), distances("two-level", 4, RNG))
    assert -1e-6 <= lower_bound(problem, time_limit_s=0.5) <= 0.0  # everything stays at home
    even = plain(np.ones((2, 8, 8)), distances("flat", 4, RNG))
    assert lower_bound(even, time_limit_s=0.5) == pytest.approx(even.value(even.start_LE))
    coactive_LEE = np.stack([blocks_EE - np.eye(8)] * 4)
    alone = replace(problem, pair_LEE=0 * problem.pair_LEE, coactive_LEE=coactive_LEE)
    assert lower_bound(alone, time_limit_s=0.5) == pytest.approx(0.0, abs=1e-4)


def test_bound_of_linear_costs_alone_is_their_optimum() -> None:
    linear_LER = RNG.normal(size=(3, 8, 4))
    problem = replace(plain(np.zeros((2, 8, 8)), distances("flat", 4, RNG)), linear_LER=linear_LER)
    optimum = problem.value(viterbi(problem))
    assert lower_bound(problem, time_limit_s=0.1) == pytest.approx(optimum, rel=1e-7)


def test_bound_joins_linear_costs_and_traffic() -> None:
    # traffic wants experts 0 and 1 together, linear costs want them apart
    coactive_LEE = np.zeros((1, 4, 4))
    coactive_LEE[0, 0, 1] = coactive_LEE[0, 1, 0] = 10.0
    linear_LER = np.zeros((1, 4, 2))
    linear_LER[0, 0, 0] = linear_LER[0, 1, 1] = 8.0
    problem = Problem(
        node_of_R=(0, 1),
        distance_RR=distances("flat", 2, RNG),
        pair_LEE=np.zeros((0, 4, 4)),
        load_LE=np.ones((1, 4)),
        start_LE=np.array([[0, 0, 1, 1]]),
        coactive_LEE=coactive_LEE,
        linear_LER=linear_LER,
    )
    assert brute_force(problem) == 8.0
    assert 7.9 <= lower_bound(problem, time_limit_s=1.0) <= 8.0


def test_bounds_of_few_moves() -> None:
    problem = plain(traffic(3, 8), distances("flat", 4, RNG))
    for max_moves in (0, 1):
        still = replace(problem, max_moves=max_moves)
        value = still.value(still.start_LE)
        assert lower_bound(still, time_limit_s=0.1) == pytest.approx(value)
    two = replace(problem, max_moves=2)
    assert lower_bound(two, time_limit_s=0.1) <= solve_exact(two).lower_bound * (1 + 1e-6)


def test_bound_of_load_is_the_busiest_expert_with_the_idlest() -> None:
    problem = replace(
        plain(np.zeros((1, 4, 4)), distances("flat", 2, RNG)),
        load_LE=np.array([[8.0, 1.0, 2.0, 1.0]] * 2),
        load_weight=2.0,
    )
    assert lower_bound(problem) == pytest.approx(brute_force(problem)) == 2 * 2.0 * (9 - 6)
    fast = replace(problem, slowness_R=np.array([1.0, 0.05]))
    assert 0.1 < lower_bound(fast) <= brute_force(fast)


def test_the_search_for_a_bound_ends_at_a_known_value() -> None:
    problem = plain(traffic(4, 8), distances("flat", 4, RNG))
    optimum = problem.value(viterbi(problem))
    assert lower_bound(problem, known_value=0.5 * optimum) == 0.5 * optimum


def test_levels_add_up_to_the_distances() -> None:
    for kind in ("flat", "two-level", "lopsided"):
        distance_RR = distances(kind, 6, RNG)
        assert (ultrametric(distance_RR) == distance_RR).all()
        total_RR = sum(
            level.gain * (level.group_R[:, None] != level.group_R) for level in levels(distance_RR)
        )
        assert (total_RR == distance_RR).all()
    general_RR = distances("general", 6, RNG)
    below_RR = ultrametric(general_RR)
    assert (below_RR <= general_RR).all() and (ultrametric(below_RR) == below_RR).all()
