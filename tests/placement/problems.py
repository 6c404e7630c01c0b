"""Small placement problems with every term, and their optimum by trying all placements."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from placement.problem import Problem

SHAPES = [(1, 4, 2), (2, 4, 2), (3, 4, 2), (4, 4, 2), (1, 6, 2), (2, 6, 3), (3, 4, 4), (1, 6, 3)]
SHAPES += [(2, 4, 4), (2, 6, 2)]  # layers, experts, ranks


def all_placements(num_layers: int, num_experts: int, num_ranks: int) -> list[np.ndarray]:
    """Every placement, each int64 [L, E]."""
    held = num_experts // num_ranks
    layer = {*itertools.permutations(np.repeat(range(num_ranks), held).tolist())}
    return [np.array(home) for home in itertools.product(sorted(layer), repeat=num_layers)]


def brute_force(problem: Problem) -> float:
    """The least value within the limits; infinite if no placement keeps them."""
    size = problem.num_layers, problem.num_experts, problem.num_ranks
    return min(
        (problem.value(home) for home in all_placements(*size) if not problem.violations(home)),
        default=np.inf,
    )


def distances(kind: str, num_ranks: int, rng: np.random.Generator) -> np.ndarray:
    """Float64 [R, R]: `flat`, `two-level`, `lopsided` (nodes of 1 and R - 1 ranks), `general`."""
    rank_R = np.arange(num_ranks)
    if kind == "general":
        distance_RR = rng.integers(1, 6, (num_ranks, num_ranks)).astype(float)
        distance_RR = distance_RR + distance_RR.T
    else:
        node_R = {"flat": rank_R * 0, "two-level": rank_R // 2, "lopsided": rank_R.clip(0, 1)}[kind]
        distance_RR = np.where(node_R[:, None] == node_R, 1.0, 4.0)
    np.fill_diagonal(distance_RR, 0.0)
    return distance_RR


@st.composite
def problems(draw: st.DrawFn, limits: bool = True) -> Problem:
    """Random problems with some of the terms, and limits on load and moves where `limits`."""
    layers, experts, ranks = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["flat", "two-level", "lopsided", "general"]))
    terms = draw(st.sets(st.sampled_from(["pair", "coactive", "linear", "slow", "load"])))

    def weights(*shape: int) -> np.ndarray:
        sparse = rng.random(shape) < 0.6
        return rng.integers(0, 20, shape) * sparse.astype(float)

    coactive_LEE = weights(layers, experts, experts)
    coactive_LEE = np.triu(coactive_LEE, 1) + np.triu(coactive_LEE, 1).transpose(0, 2, 1)
    start_E = np.repeat(range(ranks), experts // ranks)
    problem = Problem(
        node_of_R=tuple(int(rank) // 2 for rank in range(ranks)),
        distance_RR=distances(kind, ranks, rng),
        pair_LEE=weights(layers - 1, experts, experts) * ("pair" in terms),
        load_LE=weights(layers, experts) + 1,
        start_LE=np.stack([rng.permutation(start_E) for _ in range(layers)]),
        coactive_LEE=coactive_LEE if "coactive" in terms else None,
        linear_LER=rng.integers(-9, 9, (layers, experts, ranks)) * 1.0
        if "linear" in terms
        else None,
        slowness_R=rng.choice([0.5, 1.0, 1.5], ranks) if "slow" in terms else None,
        load_weight=float(rng.choice([0.3, 2.0])) if "load" in terms else 0.0,
        max_load_ratio=draw(st.sampled_from([None, 1.5])) if limits else None,
        max_moves=draw(st.sampled_from([None, 0, 1, 2, 4])) if limits else None,
    )
    return problem


def traffic(num_layers: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Transitions with affinity, float64 [L-1, E, E]: a hidden permutation and noise."""
    rng = np.random.default_rng(seed)
    pair_LEE = rng.integers(0, 30, (num_layers - 1, num_experts, num_experts)).astype(float)
    for pair_EE in pair_LEE:
        pair_EE[np.arange(num_experts), rng.permutation(num_experts)] += 60
    return pair_LEE


def plain(pair_LEE: np.ndarray, distance_RR: np.ndarray) -> Problem:
    """Transitions alone, from a contiguous start, each expert with the rows that it receives."""
    layers, experts, ranks = len(pair_LEE) + 1, pair_LEE.shape[1], len(distance_RR)
    start_E = np.arange(experts) * ranks // experts
    load_LE = np.concatenate([pair_LEE.sum(2), pair_LEE[-1:].sum(1)])
    nodes = tuple(range(ranks))
    return Problem(nodes, distance_RR, pair_LEE, load_LE, np.tile(start_E, (layers, 1)))
