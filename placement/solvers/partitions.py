"""Exact placement by dynamic programming over layers, where a layer has few partitions.

L layers, E experts, R ranks; P placements of a layer, Q of them in canonical labelling.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from placement.problem import Problem
from placement.solvers.symmetry import symmetry

Floats = npt.NDArray[np.float64]
MOST_PARTITIONS = 50_000  # which also keeps R ** E, with more than one rank, within an integer
OPERATIONS_PER_SECOND = 4e9  # of one core on matrix products: decides what is tried
BLOCK_BYTES = 2**26


def operations(problem: Problem) -> float:
    """Floating-point operations that `viterbi` takes; infinite where it does not apply."""
    experts, ranks = problem.num_experts, problem.num_ranks
    partitions = math.factorial(experts) // math.factorial(problem.experts_per_rank) ** ranks
    if problem.max_moves is not None or partitions > MOST_PARTITIONS:
        return math.inf
    per_layer = 2 * partitions * (partitions / symmetry(problem).order) * experts * ranks
    return per_layer * problem.num_layers


def viterbi(problem: Problem) -> np.ndarray:
    """An optimal placement, int64 [L, E]: the cheapest path over all placements of every layer.

    Relabelling the ranks of all layers alike costs nothing, so only canonical labellings of a
    layer are ends of paths.

    Raises:
        ValueError: if `max_load_ratio` leaves no placement of a layer.
    """
    assert operations(problem) < math.inf
    group = symmetry(problem)
    home_PE = _placements(problem.num_experts, problem.num_ranks)
    label_PR = group.relabel(home_PE)
    home_QE = home_PE[(label_PR == np.arange(problem.num_ranks)).all(1)]
    # placements are in the order of their digits
    digit_E = problem.num_ranks ** np.arange(problem.num_experts)[::-1]
    canonical_PE = np.take_along_axis(label_PR, home_PE, 1)
    canonical_P = np.searchsorted(home_QE @ digit_E, canonical_PE @ digit_E)
    one_PX, one_QX = _one_hot(home_PE, problem.num_ranks), _one_hot(home_QE, problem.num_ranks)
    best_Q = _layer_costs(problem, 0, home_QE, one_QX)
    came_from: list[np.ndarray] = []
    for layer in range(1, problem.num_layers):
        before_P = best_Q[canonical_P]
        best_Q, from_Q = _cheapest(problem, layer - 1, one_PX, one_QX, before_P)
        best_Q = best_Q + _layer_costs(problem, layer, home_QE, one_QX)
        came_from.append(from_Q)
    return _path(int(best_Q.argmin()), came_from, home_PE, home_QE, label_PR, canonical_P)


def _placements(num_experts: int, num_ranks: int) -> np.ndarray:
    """Every way to give each rank as many experts, int64 [P, E], in lexicographic order."""
    held = num_experts // num_ranks
    home_PE = np.zeros((1, 0), dtype=np.int64)
    for _ in range(num_experts):
        used_PR = (home_PE[:, :, None] == np.arange(num_ranks)).sum(1)
        row, rank = np.nonzero(used_PR < held)
        home_PE = np.column_stack([home_PE[row], rank])
    return home_PE


def _one_hot(home_PE: np.ndarray, num_ranks: int) -> Floats:
    """1 where expert e is on rank r, at e * R + r."""
    one_PER = home_PE[:, :, None] == np.arange(num_ranks)
    return one_PER.reshape(len(home_PE), -1).astype(np.float64)


def _layer_costs(problem: Problem, layer: int, home_QE: np.ndarray, one_QX: Floats) -> Floats:
    """Cost of a layer's placements on their own, infinite outside the limits."""
    cost_Q = np.zeros(len(home_QE))
    if problem.linear_LER is not None:
        cost_Q += one_QX @ problem.linear_LER[layer].ravel()
    if problem.coactive_LEE is not None:
        pair_XX = np.kron(problem.coactive_LEE[layer], problem.distance_RR)
        cost_Q += ((one_QX @ pair_XX) * one_QX).sum(1) / 2
    load_QR = np.einsum(
        "qer,e->qr", one_QX.reshape(*home_QE.shape, problem.num_ranks), problem.load_LE[layer]
    )
    if problem.load_weight:
        slowness_R = 1.0 if problem.slowness_R is None else problem.slowness_R
        seconds_QR = load_QR * slowness_R
        cost_Q += problem.load_weight * (seconds_QR.max(1) - seconds_QR.mean(1))
    if problem.max_load_ratio is not None:
        ratio_Q = load_QR.max(1) / np.maximum(load_QR.mean(1), 1e-300)
        allowed_Q = ratio_Q <= problem.max_load_ratio * (1 + 1e-12)
        if not allowed_Q.any():
            raise ValueError(
                f"max_load_ratio ({problem.max_load_ratio}) leaves no placement of layer {layer}: "
                f"its most even one has {ratio_Q.min():.4f}; raise it to that"
            )
        cost_Q[~allowed_Q] = np.inf
    return cost_Q


def _cheapest(
    problem: Problem, layer: int, one_PX: Floats, one_QX: Floats, before_P: Floats
) -> tuple[Floats, np.ndarray]:
    """Least cost up to every placement of `layer + 1`, and the placement of `layer` before it."""
    pair_XX = np.kron(problem.pair_LEE[layer], problem.distance_RR)
    ahead_QX = one_QX @ pair_XX.T
    best_Q, from_Q = np.empty(len(one_QX)), np.empty(len(one_QX), dtype=np.int64)
    step = max(1, BLOCK_BYTES // (8 * len(one_PX)))
    for first in range(0, len(one_QX), step):
        block = slice(first, first + step)
        cost_QP = ahead_QX[block] @ one_PX.T
        cost_QP += before_P
        from_Q[block] = cost_QP.argmin(1)
        best_Q[block] = np.take_along_axis(cost_QP, from_Q[block, None], 1)[:, 0]
    return best_Q, from_Q


def _path(
    end: int,
    came_from: list[np.ndarray],
    home_PE: np.ndarray,
    home_QE: np.ndarray,
    label_PR: np.ndarray,
    canonical_P: np.ndarray,
) -> np.ndarray:
    """Follow the cheapest path back, in the labels of its last layer."""
    homes = [home_QE[end]]
    name_R = np.arange(label_PR.shape[1])  # this layer's canonical labels in the last one's
    for from_Q in reversed(came_from):
        before = int(from_Q[end])
        homes.append(name_R[home_PE[before]])
        name_R = name_R[label_PR[before].argsort()]
        end = int(canonical_P[before])
    return np.stack(homes[::-1])
