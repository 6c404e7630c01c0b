"""Certified bounds of what experts in equal groups can keep together: a semidefinite relaxation.

Experts (and ranks, as terminals, where costs name them) are vertices; y of a pair is 1 where the
two share a group. Of every placement the matrix of all y minus 1/n, for n groups, is positive
semidefinite and sums to zero over every layer, and y[i,j] + y[i,k] - y[j,k] <= 1. The relaxation
keeps that for cliques of vertices, two neighbouring layers each, which share variables; an
alternating direction method solves it (after Oliveira, Wolkowicz, Xu, arXiv:1512.05448). Whatever
its multipliers are, they give a valid bound; iterations only make it better.

K cliques of N vertices, V variables (unordered pairs), T triangles.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from placement.solvers.cliques import Cliques
from placement.solvers.triangles import Triangles

Floats = npt.NDArray[Any]  # of floating-point numbers, single or double
ASCENTS = 12  # sweeps over the duals of a transportation problem
OVER_RELAXATION = 1.8
FIRST_PENALTY = 8.0  # in units of the mean cost of a pair of vertices
CHECK_EVERY, SEPARATE_EVERY = 10, 20
LARGEST_CLIQUE_WITH_TRIANGLES = 260
SINGLE_PRECISION_FROM = 100  # vertices of a clique
FEW = 4  # eigenvectors are found alone where they are less than one in so many
TOLERANCE = 3e-6  # progress of the bound, as a share of all costs, that is still worth a check


def relax(cliques: Cliques, deadline: float, enough: float = np.inf) -> float:
    """A lower bound of the costs of every placement, better the later the deadline.

    Args:
        deadline: by time.monotonic(). enough: a bound at which to stop.
    """
    scale = float(np.abs(cliques.cost_V).sum()) / len(cliques.cost_V) or 1.0
    return scale * Iteration(cliques, scale).run(deadline, enough / scale)


class Iteration:
    """State of the alternating direction method on costs divided by `scale`."""

    def __init__(self, cliques: Cliques, scale: float) -> None:
        self.cliques = cliques
        self.cost_V = cliques.cost_V / scale
        shape = cliques.index_KNN.shape
        self.dtype = np.float32 if shape[1] >= SINGLE_PRECISION_FROM else np.float64
        self.count_V = cliques.sums_V(np.ones(shape, dtype=self.dtype))
        self.penalty = FIRST_PENALTY
        self.psd_KNN: Floats = np.full(shape, 1 / cliques.num_groups, dtype=self.dtype)
        self.scaled_KNN: Floats = (self._first_multipliers() / self.penalty).astype(self.dtype)
        self.y_V = self.before_V = np.full(len(self.cost_V), 1 / cliques.num_groups)
        self.rank_K = np.full(shape[0], shape[1])  # of the positive parts
        self.triangles = Triangles(cliques.index_KNN, cliques.num_groups)

    def run(self, deadline: float, enough: float) -> float:
        """Iterate until the bound is enough, stands still, or time is up; returns the best."""
        started = time.monotonic()
        best = self.bound(self.penalty * self.scaled_KNN, exact=False)
        kept = self.penalty * self.scaled_KNN, self.triangles.multipliers()
        certify_s = 2 * (time.monotonic() - started)
        with_triangles = self.cliques.index_KNN.shape[1] <= LARGEST_CLIQUE_WITH_TRIANGLES
        tolerance = TOLERANCE * float(np.abs(self.cost_V).sum())
        step, checked, waited = 0, best, 0
        while best < enough:
            step += 1
            step_started = time.monotonic()
            primal, dual = self._step()
            if step % CHECK_EVERY == 0 and (step <= 150 or step % 50 == 0):
                self._adapt(primal, dual)
            step_s = time.monotonic() - step_started
            if step == 1:
                certify_s += step_s
            last = time.monotonic() + 2 * step_s + certify_s > deadline
            if step % CHECK_EVERY == 0 or last:
                bound = self.bound(self.penalty * self.scaled_KNN, exact=False)
                if bound > best:
                    best = bound
                    kept = self.penalty * self.scaled_KNN, self.triangles.multipliers()
            if last:
                break
            if step % SEPARATE_EVERY == 0:
                added = self.triangles.separate(self.y_V) if with_triangles else 0
                waited = 0 if best > checked + tolerance else waited + 1
                checked = max(checked, best)
                if waited >= (4 if added else 2):
                    break
        multipliers_KNN, triangles = kept
        self.triangles.restore(triangles)
        return self.bound(multipliers_KNN.astype(np.float64), exact=True)

    def _step(self) -> tuple[float, float]:
        """One iteration; returns the primal and the dual residual."""
        cliques = self.cliques
        target_V = cliques.sums_V(self.psd_KNN - self.scaled_KNN)
        weight_V = self.penalty * self.count_V
        pull_V, hold_V = self.triangles.step(2 * self.y_V - self.before_V, self.penalty)
        self.before_V = self.y_V
        y_V = self.penalty * target_V + hold_V * self.y_V - self.cost_V - pull_V
        y_V /= weight_V + hold_V
        self.y_V = np.clip(y_V, cliques.low_V, cliques.high_V)
        y_V = self.y_V.astype(self.dtype)
        mixing = 1.0 if len(self.triangles) else OVER_RELAXATION
        primal = dual = 0.0
        for clique, index_NN in enumerate(cliques.index_KNN):
            y_NN, before_NN = y_V[index_NN], self.psd_KNN[clique]
            mixed_NN = mixing * y_NN + (1 - mixing) * before_NN + self.scaled_KNN[clique]
            centred_NN = _centred(mixed_NN, cliques.parts)
            psd_NN, self.rank_K[clique] = _positive_part(centred_NN, self.rank_K[clique])
            psd_NN += 1 / cliques.num_groups
            primal += _squares(y_NN - psd_NN)
            dual += _squares(psd_NN - before_NN)
            self.psd_KNN[clique] = psd_NN
            self.scaled_KNN[clique] = mixed_NN - psd_NN
        return primal**0.5, self.penalty * dual**0.5

    def _adapt(self, primal: float, dual: float) -> None:
        """Keep both residuals of one order."""
        factor = 1.5 if primal > 3 * dual else 1 / 1.5 if dual > 3 * primal else 1.0
        self.penalty *= factor
        self.scaled_KNN /= factor

    def _first_multipliers(self) -> Floats:
        """Those of a transportation problem per pair of parts, so that its bound is the first."""
        cliques = self.cliques
        first_KNN = np.zeros(cliques.index_KNN.shape)
        for p, q in cliques.owned:
            left, right = cliques.parts[p], cliques.parts[q]
            index_KPQ = cliques.index_KNN[:, left, right]
            row_KP, column_KQ = _duals(self.cost_V[index_KPQ], *self._sizes(p, q))
            if p == q:
                row_KP = column_KQ = (row_KP + column_KQ) / 2
            shared_KPQ = (
                -(row_KP[:, :, None] + column_KQ[:, None, :]) / self.count_V[index_KPQ[:, :1, -1:]]
            )
            first_KNN[:, left, right] = shared_KPQ
            first_KNN[:, right, left] = shared_KPQ.transpose(0, 2, 1)
        return first_KNN

    def _sizes(self, p: int, q: int) -> tuple[int, int, bool]:
        """How many of part q share the group of one of part p, and the other way; whether p is q,
        without itself then."""
        parts, groups = self.cliques.parts, self.cliques.num_groups
        left, right = (part.stop - part.start for part in (parts[p], parts[q]))
        return right // groups - (p == q), left // groups - (p == q), p == q

    def bound(self, multipliers_KNN: Floats, exact: bool) -> float:
        """The Lagrangian's minimum: valid to rounding where `exact`, else nearly."""
        cliques, num_groups = self.cliques, self.cliques.num_groups
        total = -float(multipliers_KNN.sum(dtype=np.float64)) / num_groups
        if exact:
            trace = multipliers_KNN.shape[1] * (1 - 1 / num_groups)  # of what is semidefinite
            for multipliers_NN in multipliers_KNN:
                centred_NN = _centred(multipliers_NN, cliques.parts)
                top = float(np.linalg.eigvalsh(centred_NN)[-1])
                rounding = 1e-13 * float(np.linalg.norm(multipliers_NN))
                total -= trace * (max(0.0, top) + rounding)
        pull_V, offset = self.triangles.pull()
        cost_V = self.cost_V + cliques.sums_V(multipliers_KNN) + pull_V
        total -= offset
        seen_V = np.zeros(len(cost_V), dtype=bool)
        for (p, q), owned in cliques.owned.items() if exact else ():
            index_KPQ = cliques.index_KNN[owned, cliques.parts[p], cliques.parts[q]]
            total += _transport_bound(cost_V[index_KPQ], *self._sizes(p, q))
            seen_V[index_KPQ] = True
            if p == q:  # but for the diagonal
                seen_V[index_KPQ.diagonal(axis1=1, axis2=2)] = False
        rest_V = ~seen_V
        low_V, high_V = cost_V * cliques.low_V, cost_V * cliques.high_V
        return total + float(np.minimum(low_V, high_V)[rest_V].sum())


def _centred(matrix_NN: Floats, parts: tuple[slice, ...]) -> Floats:
    """The matrix on the vectors that sum to zero over every part."""
    rows_NN = np.empty_like(matrix_NN)
    for part in parts:
        rows_NN[part] = matrix_NN[part] - matrix_NN[part].mean(0, keepdims=True)
    for part in parts:
        rows_NN[:, part] -= rows_NN[:, part].mean(1, keepdims=True)
    return rows_NN


def _squares(matrix_NN: Floats) -> float:
    return float(np.vdot(matrix_NN, matrix_NN))


def _positive_part(matrix_NN: Floats, rank: int) -> tuple[Floats, int]:
    """The matrix less its negative eigenvalues, and the number of positive ones.

    Args:
        rank: about how many are positive; a few of a large matrix are found alone.
    """
    if FEW * rank < len(matrix_NN) and len(matrix_NN) >= SINGLE_PRECISION_FROM:
        value_P, vector_NP = linalg.eigh(
            matrix_NN, driver="evr", subset_by_value=(0, np.inf), check_finite=False
        )
    else:
        value_N, vector_NN = linalg.eigh(matrix_NN, driver="evd", check_finite=False)
        first = int(np.searchsorted(value_N, 0))
        value_P, vector_NP = value_N[first:], vector_NN[:, first:]
    return (vector_NP * value_P) @ vector_NP.T, len(value_P)


def _duals(
    cost_KPQ: Floats, per_row: int, per_column: int, without_diagonal: bool
) -> tuple[Floats, Floats]:
    """Duals of rows and columns of K transportation problems, by alternating exact ascent."""
    rows, columns = cost_KPQ.shape[1:]
    row_KP, column_KQ = np.zeros(cost_KPQ.shape[:2]), np.zeros((len(cost_KPQ), columns))
    if per_row == 0 or per_column == 0 or not cost_KPQ.any():
        return row_KP, column_KQ
    if without_diagonal:
        cost_KPQ = cost_KPQ + _diagonal(cost_KPQ)
    for _ in range(ASCENTS):
        left_KPQ = cost_KPQ - column_KQ[:, None, :]
        places = per_row - 1, min(per_row, columns - 1)
        row_KP = np.partition(left_KPQ, places, axis=2)[:, :, places].mean(2)
        left_KPQ = cost_KPQ - row_KP[:, :, None]
        places = per_column - 1, min(per_column, rows - 1)
        column_KQ = np.partition(left_KPQ, places, axis=1)[:, places].mean(1)
    return row_KP, column_KQ


def _diagonal(cost_KPQ: Floats) -> Floats:
    """What keeps the diagonal out of the cheapest entries."""
    return np.eye(cost_KPQ.shape[1]) * (4 * float(np.abs(cost_KPQ).max()) + 1)


def _transport_bound(
    cost_KPQ: Floats, per_row: int, per_column: int, without_diagonal: bool
) -> float:
    """Lower bound of K transportation problems with entries in 0..1, summed over all K.

    Without the diagonal the costs are symmetric and every pair counts once.
    """
    if per_row == 0 or per_column == 0:
        return 0.0
    row_KP, column_KQ = _duals(cost_KPQ, per_row, per_column, without_diagonal)
    reduced_KPQ = np.minimum(cost_KPQ - row_KP[:, :, None] - column_KQ[:, None, :], 0)
    plain_KPQ = np.minimum(cost_KPQ, 0)
    if without_diagonal:
        off_PP = 1 - np.eye(cost_KPQ.shape[1])
        reduced_KPQ, plain_KPQ = reduced_KPQ * off_PP, plain_KPQ * off_PP
    dual_K = per_row * row_KP.sum(1) + per_column * column_KQ.sum(1) + reduced_KPQ.sum((1, 2))
    best_K = np.maximum(dual_K, plain_KPQ.sum((1, 2)))
    return float(best_K.sum()) / (2 if without_diagonal else 1)
