"""Placement as an integer program: products of assignments, with cardinality rows.

L layers, E experts, R ranks; C experts of a layer on every rank. x[l][e][r] is 1 where expert e of
layer l is on rank r. A product is 1 where a pair of experts keeps a saving; an expert shares a rank
(or node) with as many others as that has places, which makes a transportation problem of every
pair of layers and rank.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pulp

from placement.problem import Problem
from placement.solvers.levels import levels, ultrametric
from placement.solvers.symmetry import symmetry

Term = tuple[pulp.LpVariable, float]
At = tuple[int, int]  # layer and expert


@dataclass(frozen=True)
class Saving:
    """What a pair of experts saves with its first on one of `left` and its second on `right`.

    The two are the same ranks or have none in common.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    gain: float


def savings(distance_RR: np.ndarray) -> list[Saving]:
    """Gains that, subtracted from the greatest distance, are the distance of every two ranks.

    One per group of ranks where the distances form levels, else one per ordered pair of ranks.
    """
    if np.array_equal(ultrametric(distance_RR), distance_RR):
        gain_of: dict[tuple[int, ...], float] = defaultdict(float)
        for level in levels(distance_RR):
            for group in range(level.num_groups):
                ranks = tuple(np.flatnonzero(level.group_R == group).tolist())
                gain_of[ranks] += level.gain  # a rank alone on its node is a group of two levels
        return [Saving(ranks, ranks, gain) for ranks, gain in gain_of.items()]
    gain_RR = distance_RR.max() - distance_RR
    pairs = np.argwhere(gain_RR > 0).tolist()
    return [Saving((left,), (right,), float(gain_RR[left, right])) for left, right in pairs]


def num_products(problem: Problem) -> int:
    """Products of the integer program."""
    pairs = int(np.count_nonzero(problem.pair_LEE))
    if problem.coactive_LEE is not None:
        pairs += int(np.count_nonzero(problem.coactive_LEE)) // 2
    return pairs * len(savings(problem.distance_RR))


class Program:
    """The integer program of a problem and what its variables mean.

    Attributes:
        lp: to be minimised; its costs are the problem's divided by `unit`, less `constant`.
        scale: the size of all costs together, in the problem's unit.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        layers, experts = problem.num_layers, problem.num_experts
        self.lp = pulp.LpProblem("placement", pulp.LpMinimize)
        self.x = [
            [
                [
                    self.lp.add_variable(f"x_{layer}_{expert}_{rank}", cat=pulp.LpBinary)
                    for rank in range(problem.num_ranks)
                ]
                for expert in range(experts)
            ]
            for layer in range(layers)
        ]
        self.product_of: list[tuple[pulp.LpVariable, At, At, Saving]] = []
        self.busiest: dict[int, pulp.LpVariable] = {}
        self.costs: list[Term] = []
        self.constant = 0.0
        self._assign()
        self._save_traffic()
        self._charge_linear()
        self._limit_load()
        self._limit_moves()
        self._break_symmetry()
        self.scale = abs(self.constant) + sum(abs(cost) for _, cost in self.costs)
        self.unit = (self.scale or 1.0) / (layers * experts)
        objective = pulp.LpAffineExpression()
        for variable, cost in self.costs:
            objective.addterm(variable, cost / self.unit)
        self.lp.setObjective(objective)

    def begin(self, home_LE: np.ndarray) -> None:
        """Set all variables to a placement, relabelled as the program wants it."""
        home_LE = symmetry(self.problem).relabel(home_LE[:1])[0][home_LE]
        for layer, home_E in enumerate(home_LE.tolist()):
            for expert, home in enumerate(home_E):
                for rank, variable in enumerate(self.x[layer][expert]):
                    variable.setInitialValue(int(rank == home))
        for variable, first, second, saving in self.product_of:
            kept = home_LE[first] in saving.left and home_LE[second] in saving.right
            variable.setInitialValue(int(kept))
        seconds_LR = self._relative_load(home_LE)
        for layer, variable in self.busiest.items():
            variable.setInitialValue(float(seconds_LR[layer].max()))

    def placement(self) -> np.ndarray | None:
        """The placement that the variables describe, int64 [L, E]; None if they describe none."""
        value_LER = np.array(
            [[[v.varValue for v in row] for row in layer] for layer in self.x], dtype=np.float64
        )
        if not np.isfinite(value_LER).all():
            return None
        home_LE = value_LER.argmax(2)
        held_LR = (home_LE[:, :, None] == np.arange(self.problem.num_ranks)).sum(1)
        return home_LE if (held_LR == self.problem.experts_per_rank).all() else None

    def _row(self, terms: list[Term], sense: int, bound: float) -> None:
        row = pulp.LpConstraint(pulp.LpAffineExpression(terms), sense, rhs=bound)
        self.lp.addConstraint(row)

    def _at_most(self, terms: list[Term], bound: float = 0.0) -> None:
        self._row(terms, pulp.LpConstraintLE, bound)

    def _on(self, at: At, ranks: tuple[int, ...], factor: float) -> list[Term]:
        """`factor` where an expert is on one of some ranks."""
        layer, expert = at
        return [(self.x[layer][expert][rank], factor) for rank in ranks]

    def _assign(self) -> None:
        """Every expert on one rank, every rank as many."""
        for layer in self.x:
            for row in layer:
                self._row([(variable, 1) for variable in row], pulp.LpConstraintEQ, 1)
            for column in zip(*layer, strict=True):
                held = self.problem.experts_per_rank
                self._row([(variable, 1) for variable in column], pulp.LpConstraintEQ, held)

    def _save_traffic(self) -> None:
        """Products for all pairs with traffic: between layers, and within one."""
        problem, offers = self.problem, savings(self.problem.distance_RR)
        farthest = float(problem.distance_RR.max())
        self.constant += farthest * float(problem.pair_LEE.sum())
        for layer, pair_EE in enumerate(problem.pair_LEE):
            pairs = [
                ((layer, first), (layer + 1, second), float(pair_EE[first, second]))
                for first, second in np.argwhere(pair_EE > 0).tolist()
            ]
            self._products(pairs, offers, within=False)
        if problem.coactive_LEE is None:
            return
        self.constant += farthest * float(problem.coactive_LEE.sum()) / 2
        for layer, coactive_EE in enumerate(problem.coactive_LEE):
            pairs = [
                ((layer, first), (layer, second), float(coactive_EE[first, second]))
                for first, second in np.argwhere(np.triu(coactive_EE) > 0).tolist()
            ]
            self._products(pairs, offers, within=True)

    def _products(
        self, pairs: list[tuple[At, At, float]], offers: list[Saving], within: bool
    ) -> None:
        """Products per pair and saving, all those of one factor below it, and cardinality rows."""
        held = self.problem.experts_per_rank
        # of an expert on `here`, the products with others on `there`
        partners: dict[tuple[At, bool, tuple[int, ...], tuple[int, ...]], list[Term]]
        partners = defaultdict(list)
        for first, second, weight in pairs:
            below: dict[tuple[At, tuple[int, ...]], list[Term]] = defaultdict(list)
            for saving in offers:
                product = self.lp.add_variable(f"z_{len(self.product_of)}", 0, 1)
                self.product_of.append((product, first, second, saving))
                self.costs.append((product, -weight * saving.gain))
                below[first, saving.left].append((product, 1))
                below[second, saving.right].append((product, 1))
                partners[first, True, saving.left, saving.right].append((product, 1))
                # within a layer an expert is first of some pairs and second of others
                partners[second, within, saving.right, saving.left].append((product, 1))
            for (at, here), terms in below.items():
                self._at_most([*terms, *self._on(at, here, -1)])
        for (at, _, here, there), terms in partners.items():
            places = held * len(there) - (within and here == there)
            self._at_most([*terms, *self._on(at, here, -places)])

    def _charge_linear(self) -> None:
        if self.problem.linear_LER is not None:
            for at, cost in np.ndenumerate(self.problem.linear_LER):
                layer, expert, rank = at
                self.costs.append((self.x[layer][expert][rank], float(cost)))

    def _slowness(self) -> np.ndarray:
        """Relative to the slowest rank, [R]."""
        slowness_R = self.problem.slowness_R
        return np.ones(self.problem.num_ranks) if slowness_R is None else slowness_R

    def _relative_load(self, home_LE: np.ndarray) -> np.ndarray:
        """Seconds of every rank in units of the slowest rank's at the mean rows, [L, R]."""
        rows_LR = self.problem.rank_load(home_LE)
        mean_L1 = np.maximum(rows_LR.mean(1, keepdims=True), 1e-300)
        return rows_LR / mean_L1 * self._slowness() / self._slowness().max()

    def _limit_load(self) -> None:
        """Cost of the busiest rank above the mean, and the hard limit on it."""
        problem, slowness_R = self.problem, self._slowness()
        ranks, slowest = problem.num_ranks, float(slowness_R.max())
        for layer, load_E in enumerate(problem.load_LE):
            mean = float(load_E.sum()) / ranks
            if not mean:
                continue
            share_E = load_E / mean
            if problem.load_weight:
                busiest = self.busiest[layer] = self.lp.add_variable(f"busiest_{layer}", 0)
                unit = problem.load_weight * mean * slowest
                self.costs.append((busiest, unit))
            for rank in range(ranks):
                column = [row[rank] for row in self.x[layer]]
                shares = list(zip(column, share_E.tolist(), strict=True))
                if problem.max_load_ratio is not None:
                    self._at_most(shares, problem.max_load_ratio * (1 + 1e-12))
                if problem.load_weight:
                    slowness = float(slowness_R[rank]) / slowest
                    seconds = [(variable, share * slowness) for variable, share in shares]
                    self._at_most([*seconds, (busiest, -1)])
                    self.costs += [(variable, -unit / ranks * cost) for variable, cost in seconds]

    def _limit_moves(self) -> None:
        if self.problem.max_moves is not None:
            start_LE = self.problem.start_LE
            stays = [
                (self.x[layer][expert][home], -1.0)
                for (layer, expert), home in np.ndenumerate(start_LE)
            ]
            self._at_most(stays, self.problem.max_moves - start_LE.size)

    def _break_symmetry(self) -> None:
        """Number interchangeable ranks by their lowest experts in the first layer."""
        for earlier, later in symmetry(self.problem).before():
            for expert, row in enumerate(self.x[0]):
                lower = [(self.x[0][other][earlier], -1) for other in range(expert)]
                self._at_most([(row[later], 1), *lower])
