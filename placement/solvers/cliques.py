"""What experts of neighbouring layers cost together in a group, as variables of a relaxation.

L layers, E experts, G groups; K cliques of N vertices, V variables (unordered pairs of vertices).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.problem import Problem

Floats = npt.NDArray[Any]  # of floating-point numbers, single or double


@dataclass(frozen=True)
class Cliques:
    """Overlapping sets of vertices whose pairs have costs while they share a group.

    Attributes:
        num_groups: all of equal size within every part.
        parts: slices of a clique's vertices: its layers, and the terminals if there are any.
        owned: of each pair of parts (p, q), p <= q, the cliques that no earlier one shares it with.
        index_KNN: variable of every pair of vertices; symmetric.
        cost_V: what a variable of 1 costs. low_V, high_V: bounds of the variables.
    """

    num_groups: int
    parts: tuple[slice, ...]
    owned: dict[tuple[int, int], slice]
    index_KNN: np.ndarray
    cost_V: Floats
    low_V: Floats
    high_V: Floats

    def sums_V(self, matrix_KNN: Floats) -> Floats:
        """Sum over the entries of every variable."""
        weights = matrix_KNN.ravel()
        return np.bincount(self.index_KNN.ravel(), weights, minlength=len(self.cost_V))


def cliques_of(
    problem: Problem, num_groups: int, gain: float, linear_LEG: Floats | None
) -> Cliques:
    """Traffic costs `-gain` where it stays in a group, an expert in a group its linear cost.

    Cliques hold two neighbouring layers, or one where no traffic joins layers, and with linear
    costs a terminal per group.
    """
    layers, experts = problem.load_LE.shape
    width = 2 if problem.pair_LEE.any() else 1
    within = experts * (experts + 1) // 2
    blocks = [np.zeros((layers, within)), np.zeros((0,)), np.zeros((0,)), np.zeros((0,))]
    if problem.coactive_LEE is not None:
        rows, columns = np.triu_indices(experts)
        blocks[0] = -gain * problem.coactive_LEE[:, rows, columns]
    if width == 2:
        blocks[1] = -gain * problem.pair_LEE
    if linear_LEG is not None:
        blocks[2], blocks[3] = linear_LEG, np.zeros(num_groups * (num_groups + 1) // 2)
    _, pairs, tables, terminals = np.cumsum([0] + [block.size for block in blocks[:-1]])
    cost_V = np.concatenate([block.ravel() for block in blocks])
    low_V, high_V = np.zeros(len(cost_V)), np.ones(len(cost_V))

    parts = [slice(side * experts, (side + 1) * experts) for side in range(width)]
    if linear_LEG is not None:
        parts.append(slice(width * experts, width * experts + num_groups))
    layer_K11 = np.arange(layers - width + 1)[:, None, None]
    index_KNN = np.empty((len(layer_K11), parts[-1].stop, parts[-1].stop), dtype=np.int64)
    owned = {}
    for side in range(width):
        new = slice(None) if side == 0 else slice(-1, None)
        owned[side, side] = new
        index_KNN[:, parts[side], parts[side]] = (layer_K11 + side) * within + _symmetric(experts)
        if linear_LEG is not None:
            owned[side, width] = new
            table_EG = np.arange(experts * num_groups).reshape(experts, num_groups)
            table_KEG = tables + (layer_K11 + side) * table_EG.size + table_EG
            index_KNN[:, parts[side], parts[width]] = table_KEG
            index_KNN[:, parts[width], parts[side]] = table_KEG.transpose(0, 2, 1)
    if width == 2:
        owned[0, 1] = slice(None)
        pair_EE = np.arange(experts**2).reshape(experts, experts)
        pair_KEE = pairs + layer_K11 * experts**2 + pair_EE
        index_KNN[:, parts[0], parts[1]] = pair_KEE
        index_KNN[:, parts[1], parts[0]] = pair_KEE.transpose(0, 2, 1)
    if linear_LEG is not None:
        index_KNN[:, parts[width], parts[width]] = terminals + _symmetric(num_groups)
        high_V[terminals:] = 0
    itself_KN = index_KNN.diagonal(axis1=1, axis2=2)
    low_V[itself_KN] = high_V[itself_KN] = 1
    return Cliques(num_groups, tuple(parts), owned, index_KNN, cost_V, low_V, high_V)


def _symmetric(size: int) -> np.ndarray:
    """Numbers of the unordered pairs of `size` things, themselves included."""
    number_NN = np.zeros((size, size), dtype=np.int64)
    rows, columns = np.triu_indices(size)
    number_NN[rows, columns] = number_NN[columns, rows] = np.arange(len(rows))
    return number_NN
