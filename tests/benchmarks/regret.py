"""What a loss-free bias loses against the best fixed bias in hindsight, by schedule.

    python -m tests.benchmarks.regret --plot docs/regret.png

In step n, T tokens draw scores s of E experts from one distribution (experts have unlike means)
and choose K by s + b. The step's loss is the dual function (arXiv:2512.03915)
D_n(b) = sum of the chosen s + b - T K / E sum(b); regret is the sum of D_n(b_n) minus the least
sum that one b for all steps could have had, which L-BFGS finds. b moves by the trainer's own
`LossFreeBias.direction`. The plot shows how regret grows after the first 125 steps, in which all
find their way from b = 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from torch import Tensor

from trainer.balance.bias import LossFreeBias

TOKENS, EXPERTS, TOP_K, STEPS, SEEDS = 128, 8, 2, 2000, 3
ARMS: dict[str, dict[str, Any]] = {
    "proportional, 1/n": {"update": "proportional", "schedule": "inverse", "rate": 0.3},
    "proportional, 1/sqrt(n)": {"update": "proportional", "schedule": "inverse_sqrt", "rate": 0.1},
    "proportional, constant": {"update": "proportional", "rate": 0.02},
    "sign, 1/n": {"schedule": "inverse", "rate": 0.5},
    "sign, constant": {"rate": 0.005},
}


def scores(seed: int) -> Tensor:
    """Of all steps, float64 [n, T, E]."""
    generator = torch.Generator().manual_seed(seed)
    mean_E = torch.rand(EXPERTS, generator=generator, dtype=torch.float64)
    noise = torch.randn(STEPS, TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    return torch.sigmoid(2 * mean_E + noise)


def dual(scores_NTE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """D of every step [n], and rows of every expert [n, E]."""
    best = (scores_NTE + bias_E).topk(TOP_K)
    rows_NE = torch.zeros(len(scores_NTE), EXPERTS, dtype=torch.float64)
    rows_NE.scatter_add_(1, best.indices.flatten(1), torch.ones_like(best.values).flatten(1))
    return best.values.sum((1, 2)) - TOKENS * TOP_K / EXPERTS * bias_E.sum(), rows_NE


def online(scores_NTE: Tensor, **options: Any) -> Iterator[float]:
    """The loss of every step under the bias that the steps before it led to."""
    balancer = LossFreeBias(**options)
    balancer.target_E = torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64)
    bias_E = torch.zeros(EXPERTS, dtype=torch.float64)
    for number, scores_TE in enumerate(scores_NTE, 1):
        value, rows_NE = dual(scores_TE[None], bias_E)
        yield float(value)
        bias_E = bias_E + balancer.rate.at(number) * balancer.direction(rows_NE[0])


def in_hindsight(scores_NTE: Tensor) -> np.ndarray:
    """The loss of every step under the one bias that is best for all of them."""

    def whole(bias: np.ndarray) -> tuple[float, np.ndarray]:
        values, rows_NE = dual(scores_NTE, torch.from_numpy(bias))
        lack_E = rows_NE.mean(0) - TOKENS * TOP_K / EXPERTS
        return float(values.mean()), lack_E.numpy()

    best = minimize(whole, np.zeros(EXPERTS), jac=True, method="L-BFGS-B")
    return dual(scores_NTE, torch.from_numpy(best.x))[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    marks = [125, 250, 500, 1000, STEPS]
    table = Table("bias", *(f"n {n:,}" for n in marks), title=f"regret, mean of {SEEDS} seeds")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    drawn = [scores(seed) for seed in range(SEEDS)]
    best = {n: [in_hindsight(each[:n]).sum() for each in drawn] for n in marks}
    for name, arm in ARMS.items():
        losses = [np.cumsum(list(online(each, **arm))) for each in drawn]
        regret = [
            float(np.mean([loss[n - 1] - b for loss, b in zip(losses, best[n], strict=True)]))
            for n in marks
        ]
        table.add_row(name, *(f"{value:.1f}" for value in regret))
        axis.plot(marks, [value - regret[0] for value in regret], "o-", label=name)
    axis.set_xscale("log")
    axis.set_xlabel("steps n")
    axis.set_ylabel(f"regret against the best fixed bias, since n = {marks[0]}")
    axis.legend()
    figure.tight_layout()
    Console().print(table)
    if options.plot:
        figure.savefig(options.plot, dpi=110)


if __name__ == "__main__":
    main()
