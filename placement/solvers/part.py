"""A part of a placement problem: some experts, the bins they share, all others staying put.

L MoE layers, N experts of a layer, B bins (ranks, nodes or strands) of N/B places each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.problem import Problem

Floats = npt.NDArray[np.float64]
Homes = npt.NDArray[np.int64]
ROUNDING = 1e-12  # of a load limit, as in `Problem.violations`


@dataclass(frozen=True)
class Part:
    """Experts to put in bins, and what that costs.

    The costs are those of `problem.Problem`. The hard limit on loads is a price on what exceeds
    it, so that every placement has a value.

    Attributes:
        distance_BB, pair_LNN, coactive_LNN, load_LN, slowness_B, load_weight: as in `Problem`, of
            these experts and bins.
        linear_LNB: as in `Problem`, with what the experts that stay put make of it.
        floor_L: seconds of the busiest bin outside the part.
        limit_L: most rows of a bin, inf for no limit. excess_price: of a row beyond.
        start_LN: bins that experts come from, -1 for one outside the part.
        max_moves: most experts that may be in another bin.
        scale: a typical cost of one layer, by which gains and losses are called small.
        deadline: `time.monotonic()` at which moves stop.
    """

    distance_BB: Floats
    pair_LNN: Floats
    coactive_LNN: Floats | None
    linear_LNB: Floats
    load_LN: Floats
    slowness_B: Floats
    load_weight: float
    floor_L: Floats
    limit_L: Floats
    excess_price: float
    start_LN: Homes
    max_moves: int
    scale: float
    deadline: float

    @property
    def num_layers(self) -> int:
        return self.load_LN.shape[0]

    @property
    def num_experts(self) -> int:
        return self.load_LN.shape[1]

    @property
    def num_bins(self) -> int:
        return len(self.distance_BB)

    @property
    def places(self) -> int:
        """Experts per bin and layer."""
        return self.num_experts // self.num_bins

    @cached_property
    def row_N(self) -> Homes:
        return np.arange(self.num_experts)

    @cached_property
    def pair_back_LNN(self) -> Floats:
        """Experts of a layer by those of the layer before."""
        return np.ascontiguousarray(self.pair_LNN.transpose(0, 2, 1))

    @cached_property
    def is_limited(self) -> bool:
        return bool(np.isfinite(self.limit_L).any())

    @cached_property
    def is_linear(self) -> bool:
        """A layer's cost is a sum over its experts, so that one assignment is its optimum."""
        return self.coactive_LNN is None and not self.load_weight and not self.is_limited

    @property
    def is_flat(self) -> bool:
        """All bins are equally far from each other."""
        apart_P = self.distance_BB[~np.eye(self.num_bins, dtype=np.bool_)]
        return len(apart_P) == 0 or float(np.ptp(apart_P)) == 0.0

    def back(self, home_LN: Homes, layer: int) -> Floats:
        """Cost of every bin for every expert towards the layer before, [N, B]."""
        if layer == 0:
            return np.zeros((self.num_experts, self.num_bins))
        return self.pair_back_LNN[layer - 1] @ self.distance_BB[home_LN[layer - 1]]

    def ahead(self, home_LN: Homes, layer: int) -> Floats:
        """Cost of every bin for every expert towards the next layer, [N, B]."""
        if layer == self.num_layers - 1:
            return np.zeros((self.num_experts, self.num_bins))
        return self.pair_LNN[layer] @ self.distance_BB[home_LN[layer + 1]]

    def layer_value(self, layer: int, cost_NB: Floats, home_N: Homes) -> float:
        """What a layer costs, given the cost of every bin for every expert on its own."""
        value = float(cost_NB[self.row_N, home_N].sum())
        if self.coactive_LNN is not None:
            apart_NN = self.distance_BB[home_N][:, home_N]
            value += float((self.coactive_LNN[layer] * apart_NN).sum()) / 2
        if self.load_weight:
            load_B = np.bincount(home_N, self.load_LN[layer], self.num_bins)
            busiest = float((load_B * self.slowness_B).max())
            value += self.load_weight * max(busiest, float(self.floor_L[layer]))
        if self.is_limited:
            value += self.excess_price * self.layer_excess(layer, home_N)
        return value

    def layer_excess(self, layer: int, home_N: Homes) -> float:
        """Rows beyond the limit, of all bins of a layer."""
        load_B = np.bincount(home_N, self.load_LN[layer], self.num_bins)
        return float(np.maximum(load_B - self.limit_L[layer], 0).sum())

    def value(self, home_LN: Homes) -> float:
        """What the part costs: `Problem.value` up to a constant, and the price of excess."""
        value = 0.0
        for layer in range(self.num_layers):
            cost_NB = self.linear_LNB[layer] + self.back(home_LN, layer)
            value += self.layer_value(layer, cost_NB, home_LN[layer])
        return value

    def moves(self, home_LN: Homes) -> int:
        """Experts that left their bin."""
        return int(np.count_nonzero(home_LN != self.start_LN))

    def load(self, home_LN: Homes) -> Floats:
        """Rows per layer and bin, [L, B]."""
        load_LB = np.zeros((self.num_layers, self.num_bins))
        np.add.at(load_LB, (np.arange(self.num_layers)[:, None], home_LN), self.load_LN)
        return load_LB

    def priced(self, price: float) -> Part:
        """This part with a price on every expert that leaves its bin."""
        leaves_LNB = self.start_LN[:, :, None] != np.arange(self.num_bins)
        return replace(self, linear_LNB=self.linear_LNB + price * leaves_LNB)

    def coarsen(self, node_B: Homes) -> Part:
        """Nodes as bins: distances between nodes, for the cheapest bin of each."""
        first_n = np.unique(node_B, return_index=True)[1]
        size = self.num_bins // len(first_n)
        linear_LNnb = self.linear_LNB[:, :, np.argsort(node_B, kind="stable")]
        linear_LNnb = linear_LNnb.reshape(self.num_layers, self.num_experts, -1, size)
        return replace(
            self,
            distance_BB=self.distance_BB[np.ix_(first_n, first_n)],
            linear_LNB=linear_LNnb.min(3),
            slowness_B=np.array(
                [self.slowness_B[node_B == node].mean() for node in node_B[first_n]]
            )
            / size,
            limit_L=self.limit_L * size,
            start_LN=node_B[self.start_LN],
        )

    def restrict(self, home_LN: Homes, bins: npt.ArrayLike) -> tuple[Part, Homes]:
        """The part of some bins, other experts staying put, and its experts' indices [L, n]."""
        bins_b = np.asarray(bins)
        inside_B = np.isin(np.arange(self.num_bins), bins_b)
        index_Ln = np.nonzero(inside_B[home_LN])[1].reshape(self.num_layers, -1)
        inner_B = np.where(inside_B, np.cumsum(inside_B) - 1, -1)
        start_Ln = np.take_along_axis(self.start_LN, index_Ln, 1)
        moved_Ln = np.take_along_axis(home_LN, index_Ln, 1) != start_Ln
        layer_L11 = np.arange(self.num_layers)[:, None, None]
        rows_Ln1, columns_L1n = index_Ln[:, :, None], index_Ln[:, None, :]
        coactive_Lnn, floor_L = None, self.floor_L
        if self.coactive_LNN is not None:
            coactive_Lnn = self.coactive_LNN[layer_L11, rows_Ln1, columns_L1n]
        if self.load_weight:
            outside_LB = self.load(home_LN) * self.slowness_B * ~inside_B
            floor_L = np.maximum(floor_L, outside_LB.max(1))
        part = replace(
            self,
            distance_BB=self.distance_BB[np.ix_(bins_b, bins_b)],
            pair_LNN=self.pair_LNN[layer_L11[:-1], rows_Ln1[:-1], columns_L1n[1:]],
            coactive_LNN=coactive_Lnn,
            linear_LNB=self.linear_LNB[layer_L11, rows_Ln1, bins_b]
            + self._outside(home_LN, index_Ln, self.distance_BB[:, bins_b] * ~inside_B[:, None]),
            load_LN=np.take_along_axis(self.load_LN, index_Ln, 1),
            slowness_B=self.slowness_B[bins_b],
            floor_L=floor_L,
            start_LN=np.where(start_Ln < 0, -1, inner_B[start_Ln]),
            max_moves=self.max_moves - self.moves(home_LN) + int(np.count_nonzero(moved_Ln)),
            scale=self.scale * len(bins_b) / self.num_bins,
        )
        return part, index_Ln

    def _outside(self, home_LN: Homes, index_Ln: Homes, outside_Bb: Floats) -> Floats:
        """Cost of b bins for n experts towards those outside, [L, n, b], up to a constant."""
        cost_Lnb = np.zeros((*index_Ln.shape, outside_Bb.shape[1]))
        if not np.ptp(outside_Bb, axis=1).any():
            return cost_Lnb
        for layer, index_n in enumerate(index_Ln):
            if layer > 0:
                back_nN = self.pair_back_LNN[layer - 1, index_n]
                cost_Lnb[layer] += back_nN @ outside_Bb[home_LN[layer - 1]]
            if layer < self.num_layers - 1:
                cost_Lnb[layer] += self.pair_LNN[layer, index_n] @ outside_Bb[home_LN[layer + 1]]
            if self.coactive_LNN is not None:
                cost_Lnb[layer] += self.coactive_LNN[layer, index_n] @ outside_Bb[home_LN[layer]]
        return cost_Lnb


def whole(problem: Problem, deadline: float) -> Part:
    """A whole problem as a part."""
    shape_LER = (problem.num_layers, problem.num_experts, problem.num_ranks)
    linear_LER = np.zeros(shape_LER)
    if problem.linear_LER is not None:
        linear_LER += problem.linear_LER
    slowness_R = np.ones(problem.num_ranks)
    if problem.slowness_R is not None:
        slowness_R = problem.slowness_R
    seconds_LER = problem.load_LE[:, :, None] * slowness_R / problem.num_ranks
    linear_LER -= problem.load_weight * seconds_LER
    farthest = float(problem.distance_RR.max())
    cost = float(problem.pair_LEE.sum()) * farthest + float(np.ptp(linear_LER, axis=2).sum())
    if problem.coactive_LEE is not None:
        cost += float(problem.coactive_LEE.sum()) * farthest / 2
    cost += problem.load_weight * float(seconds_LER.max(2).sum())
    rows = float(problem.load_LE.sum())
    limit_L = np.full(problem.num_layers, np.inf)
    if problem.max_load_ratio is not None and rows > 0:
        limit_L = problem.max_load_ratio * problem.load_LE.sum(1) / problem.num_ranks
        limit_L *= 1 + ROUNDING
    return Part(
        distance_BB=problem.distance_RR,
        pair_LNN=problem.pair_LEE,
        coactive_LNN=problem.coactive_LEE,
        linear_LNB=linear_LER,
        load_LN=problem.load_LE,
        slowness_B=slowness_R,
        load_weight=problem.load_weight,
        floor_L=np.zeros(problem.num_layers),
        limit_L=limit_L,
        excess_price=2 * cost / rows if rows else 0.0,
        start_LN=np.asarray(problem.start_LE, dtype=np.int64),
        max_moves=problem.load_LE.size if problem.max_moves is None else problem.max_moves,
        scale=cost / problem.num_layers,
        deadline=deadline,
    )
