"""Triangle inequalities between pairs that share a group, as cutting planes with multipliers.

K cliques of N vertices, V variables (unordered pairs), T inequalities found so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]  # of floating-point numbers, single or double
SIGNS = np.array([[1, 1, -1], [-1, -1, -1]])  # of y_ij, y_ik, y_jk, by kind
STEP = 0.2  # of the multipliers, in units of the penalty
PER_VERTEX = 20  # most violated inequalities taken at a time, per vertex of a clique
VIOLATION = 1e-3  # worth an inequality
BATCH = 2**21  # triples looked at together
Multipliers = tuple[np.ndarray, np.ndarray, Floats]


class Triangles:
    """Inequalities sum of sign * y <= bound, and their multipliers, which are never negative.

    y_ij + y_ik - y_jk <= 1 for every three vertices, and with two groups
    y_ij + y_ik + y_jk >= 1: of three vertices two share a group.
    """

    def __init__(self, index_KNN: np.ndarray, num_groups: int) -> None:
        self.index_KNN = index_KNN
        self.num_variables = int(index_KNN.max()) + 1
        self.num_groups = num_groups
        none_T = np.zeros(0, dtype=np.int64)
        self.restore((none_T.reshape(0, 3), none_T, np.zeros(0)))

    def __len__(self) -> int:
        return len(self.multiplier_T)

    def multipliers(self) -> Multipliers:
        """What `restore` takes."""
        return self.edge_T3, self.kind_T, self.multiplier_T

    def restore(self, multipliers: Multipliers) -> None:
        self.edge_T3, self.kind_T, self.multiplier_T = multipliers
        self.sign_T3 = SIGNS[self.kind_T]
        self.bound_T = (1 + self.sign_T3.sum(1)) / 2
        self.degree_V = np.bincount(self.edge_T3.ravel(), minlength=self.num_variables)

    def step(self, ahead_V: Floats, penalty: float) -> tuple[Floats, Floats]:
        """Move the multipliers by what `ahead_V` violates; returns their pull on the variables,
        and how much each variable must be held to its last value for that."""
        if len(self):
            excess_T = (self.sign_T3 * ahead_V[self.edge_T3]).sum(1) - self.bound_T
            self.multiplier_T = np.maximum(0, self.multiplier_T + STEP * penalty * excess_T)
        return self.pull()[0], 3 * STEP * penalty * self.degree_V

    def pull(self) -> tuple[Floats, float]:
        """Costs that the multipliers add to the variables, and the constant they subtract."""
        weight_T3 = self.sign_T3 * self.multiplier_T[:, None]
        pull_V = np.bincount(self.edge_T3.ravel(), weight_T3.ravel(), minlength=self.num_variables)
        return pull_V, float((self.multiplier_T * self.bound_T).sum())

    def separate(self, y_V: Floats) -> int:
        """Add the most violated inequalities, drop idle ones; returns how many were found."""
        found = [self._violated(index_NN, y_V) for index_NN in self.index_KNN]
        edge_T3 = np.concatenate([edges for edges, _ in found])
        kind_T = np.concatenate([kinds for _, kinds in found])
        used_T = self.multiplier_T > 1e-9
        edge_T3 = np.concatenate([self.edge_T3[used_T], edge_T3])
        kind_T = np.concatenate([self.kind_T[used_T], kind_T])
        multiplier_T = np.zeros(len(kind_T))
        multiplier_T[: used_T.sum()] = self.multiplier_T[used_T]
        # two edges of a triangle name the third
        key_T = (edge_T3[:, 0] * self.num_variables + edge_T3[:, 1]) * len(SIGNS) + kind_T
        first = np.sort(np.unique(key_T, return_index=True)[1])
        self.restore((edge_T3[first], kind_T[first], multiplier_T[first]))
        return sum(len(kinds) for _, kinds in found)

    def _violated(self, index_NN: np.ndarray, y_V: Floats) -> tuple[np.ndarray, np.ndarray]:
        """Variables and kinds of the most violated inequalities of a clique."""
        y_NN = y_V[index_NN].astype(np.float32)
        size = len(y_NN)
        rank_N = np.arange(size)
        most, found = PER_VERTEX * size, []
        later_NN = np.triu(np.ones((size, size), dtype=bool), 1)
        step = max(1, BATCH // size**2)
        for first in range(0, size, step):
            i = rank_N[first : first + step]
            ij_MN1, ik_M1N = y_NN[i, :, None], y_NN[i, None, :]
            found.append(_largest(ij_MN1 + ik_M1N - y_NN - 1, later_NN, most, first, kind=0))
            if self.num_groups == 2:
                last_MNN = later_NN & (rank_N > i[:, None])[:, :, None]
                found.append(_largest(1 - y_NN - ij_MN1 - ik_M1N, last_MNN, most, first, kind=1))
        excess_T = np.concatenate([excess for excess, _ in found])
        place_T4 = np.concatenate([places for _, places in found])
        if len(excess_T) > most:
            place_T4 = place_T4[np.argpartition(-excess_T, most)[:most]]
        i, j, k, kind_T = place_T4.T
        edges = index_NN[i, j], index_NN[i, k], index_NN[j, k]
        return np.stack(edges, 1).astype(np.int64), kind_T


def _largest(
    excess_MNN: Floats, among: np.ndarray, most: int, first: int, kind: int
) -> tuple[Floats, np.ndarray]:
    """Largest violations, and vertices i (counted from `first`), j, k and kind of each."""
    flat_T = np.flatnonzero((excess_MNN > VIOLATION) & among)
    excess_T = excess_MNN.ravel()[flat_T]
    if len(flat_T) > most:
        best = np.argpartition(-excess_T, most)[:most]
        flat_T, excess_T = flat_T[best], excess_T[best]
    i, j, k = np.unravel_index(flat_T, excess_MNN.shape)
    return excess_T, np.stack([i + first, j, k, np.full(len(flat_T), kind)], 1)
