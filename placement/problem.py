"""A placement problem in plain numbers: what the solvers minimise.

L MoE layers, E experts per layer, R ranks, C = E/R experts per rank and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Problem:
    """Costs of putting experts on ranks, all in one unit, with hard limits.

    A placement `home_LE` (int64 [L, E], each rank C experts per layer) costs

        sum over l, e, e' of pair_LEE[l, e, e'] * distance_RR[home[l, e], home[l+1, e']]
      + sum over l, e < e' of coactive_LEE[l, e, e'] * distance_RR[home[l, e], home[l, e']]
      + sum over l, e of linear_LER[l, e, home[l, e]]
      + sum over l of load_weight * (max over r of seconds per rank and layer - their mean)

    where the seconds of a rank are its rows times `slowness_R`.

    Attributes:
        node_of_R: node of every rank.
        distance_RR: float64 [R, R], symmetric, 0 on the diagonal, never less within a node than 0
            nor more than to another node; `coactive_LEE` uses the same distances.
        pair_LEE: float64 [L-1, E, E], >= 0: expert e of a layer followed by e' of the next.
        coactive_LEE: float64 [L, E, E], >= 0, symmetric, zero diagonal; None for none.
        linear_LER: float64 [L, E, R], any sign; None for none.
        load_LE: float64 [L, E] rows, >= 0. slowness_R: float64 [R] cost of a row, None for all 1.
        load_weight: of the busiest rank's excess over the mean rank; 0 where a planner levels.
        max_load_ratio: hard bound of max/mean load per layer; None for none.
        start_LE: int64 [L, E], the placement to improve on.
        max_moves: hard bound of the experts that leave their place in `start_LE`; None for none.
    """

    node_of_R: tuple[int, ...]
    distance_RR: np.ndarray
    pair_LEE: np.ndarray
    load_LE: np.ndarray
    start_LE: np.ndarray
    coactive_LEE: np.ndarray | None = None
    linear_LER: np.ndarray | None = None
    slowness_R: np.ndarray | None = None
    load_weight: float = 0.0
    max_load_ratio: float | None = None
    max_moves: int | None = None

    @property
    def num_layers(self) -> int:
        return self.load_LE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.load_LE.shape[1]

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_R)

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    def value(self, home_LE: np.ndarray) -> float:
        """What a placement costs, by the formula above."""
        total = self.load_cost(home_LE)
        for layer in range(self.num_layers - 1):
            apart_EE = self.distance_RR[home_LE[layer][:, None], home_LE[layer + 1][None, :]]
            total += float((self.pair_LEE[layer] * apart_EE).sum())
        for layer in range(self.num_layers):
            home_E = home_LE[layer]
            if self.coactive_LEE is not None:
                apart_EE = self.distance_RR[home_E[:, None], home_E[None, :]]
                total += float((self.coactive_LEE[layer] * apart_EE).sum()) / 2
            if self.linear_LER is not None:
                total += float(self.linear_LER[layer][np.arange(len(home_E)), home_E].sum())
        return total

    def load_cost(self, home_LE: np.ndarray) -> float:
        """The busiest ranks' excess over the mean, weighted."""
        if not self.load_weight:
            return 0.0
        seconds_LR = self.rank_load(home_LE)
        if self.slowness_R is not None:
            seconds_LR = seconds_LR * self.slowness_R
        return self.load_weight * float((seconds_LR.max(1) - seconds_LR.mean(1)).sum())

    def rank_load(self, home_LE: np.ndarray) -> np.ndarray:
        """Rows per layer and rank, float64 [L, R]."""
        load_LR = np.zeros((self.num_layers, self.num_ranks))
        layer_LE = np.arange(self.num_layers)[:, None]
        np.add.at(load_LR, (layer_LE, home_LE), self.load_LE)
        return load_LR

    def violations(self, home_LE: np.ndarray) -> list[str]:
        """Hard limits that a placement breaks, one line each, saying by how much."""
        lines = []
        if self.max_load_ratio is not None:
            load_LR = self.rank_load(home_LE)
            mean_L = np.maximum(load_LR.mean(1), 1e-300)
            worst_L = load_LR.max(1) / mean_L
            layer = int(worst_L.argmax())
            if worst_L[layer] > self.max_load_ratio * (1 + 1e-12):
                lines.append(
                    f"max_load_ratio ({self.max_load_ratio}) is exceeded in layer {layer}: "
                    f"{worst_L[layer]:.4f}"
                )
        if self.max_moves is not None:
            moves = int((home_LE != self.start_LE).sum())
            if moves > self.max_moves:
                lines.append(f"max_moves ({self.max_moves}) is exceeded: {moves} experts move")
        return lines
