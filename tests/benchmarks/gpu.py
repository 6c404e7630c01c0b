"""One GPU: a layer's products and its gathers and sums, against what the hardware gives.

    python -m tests.benchmarks.gpu                        # bf16, about two minutes on an H200
    python -m tests.benchmarks.gpu --device cpu --scale 32   # the same code, tiny, anywhere

Products: `grouped_linear` of both projections, forward and backward, beside one dense product of
as many operations (the ceiling) and a loop over experts. Rows per expert are even, Zipf-spread, or
four fifths of all on one expert. Dispatch: `expand` and weighted `reduce` of token copies, beside a
plain copy of as many bytes. Shapes of one rank of eight. Inputs are random: zeros run faster than
any real data.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from parallel.bags import Bags, expand, reduce
from parallel.grouped import grouped_linear

RANKS, REPEATS = 8, 20


@dataclass(frozen=True)
class Shape:
    """One MoE layer: tokens of a rank, hidden width, expert width, experts, choices."""

    name: str
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int

    def scaled(self, scale: int) -> Shape:
        return Shape(
            self.name,
            max(RANKS, self.tokens // scale),
            max(16, self.hidden // scale),
            max(16, self.width // scale),
            self.experts,
            self.top_k,
        )


SHAPES = [
    Shape("DeepSeek-V3", 16384, 7168, 2048, 256, 8),
    Shape("Qwen3-30B-A3B", 16384, 2048, 768, 128, 8),
    Shape("gpt-oss-120b", 16384, 2880, 2880, 128, 4),
]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of some runs after three, each waited for."""
    times = []
    for _ in range(3 + REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def spreads(num_rows: int, num_slots: int) -> dict[str, list[int]]:
    """Rows of every slot of a rank: even, by Zipf's law, and four fifths on one."""
    even = [num_rows // num_slots] * num_slots
    zipf = [1 / (slot + 1) for slot in range(num_slots)]
    by_zipf = [int(num_rows * part / sum(zipf)) for part in zipf]
    rest = num_rows // 5 // max(1, num_slots - 1)
    hot = [num_rows - rest * (num_slots - 1)] + [rest] * (num_slots - 1)
    return {"even": even, "Zipf": by_zipf, "80 % on one": hot}


@dataclass(frozen=True)
class Projection:
    """One of the two products of a layer: rows, stacked weights, gradients of the outputs."""

    x: Tensor
    weight: Tensor
    grad: Tensor

    @classmethod
    def random(cls, rows: int, inputs: int, outputs: int, slots: int, like: Tensor) -> Projection:
        x, grad = like.new_empty(rows, inputs).normal_(), like.new_empty(rows, outputs).normal_()
        weight = like.new_empty(slots, outputs, inputs).normal_(std=0.02)
        return cls(x, weight, grad)

    def grouped(self, rows_S: list[int]) -> None:
        x, weight = self.x.requires_grad_(), self.weight.requires_grad_()
        y = grouped_linear(x, weight, None, rows_S, [], "", is_transposed=False)
        torch.autograd.grad(y, [x, weight], self.grad)

    @torch.no_grad()
    def looped(self, rows_S: list[int]) -> None:
        parts = zip(self.x.split(rows_S), self.grad.split(rows_S), self.weight, strict=True)
        for x, grad, weight in parts:
            self._three(x, grad, weight)

    @torch.no_grad()
    def dense(self) -> None:
        self._three(self.x, self.grad, self.weight[0])

    @staticmethod
    def _three(x: Tensor, grad: Tensor, weight: Tensor) -> None:
        torch.mm(x, weight.T)
        torch.mm(grad, weight)
        torch.mm(grad.T, x)


def products(shape: Shape, like: Tensor, table: Table) -> None:
    """Both projections of one rank's experts, forward and backward."""
    slots = shape.experts // RANKS
    for spread, rows_S in spreads(shape.tokens * shape.top_k, slots).items():
        rows = sum(rows_S)
        both = [
            Projection.random(rows, shape.hidden, 2 * shape.width, slots, like),
            Projection.random(rows, shape.width, shape.hidden, slots, like),
        ]
        dense, looped, ours = (
            sum(seconds(run, like.device) for run in runs)
            for runs in (
                [one.dense for one in both],
                [partial(one.looped, rows_S) for one in both],
                [partial(one.grouped, rows_S) for one in both],
            )
        )
        operations = 18 * rows * shape.hidden * shape.width
        table.add_row(
            f"{shape.name}, {spread}",
            *(f"{operations / taken / 1e12:.3g}" for taken in (dense, looped, ours)),
            f"{dense / ours:.2f}",
        )


@torch.no_grad()
def movements(shape: Shape, like: Tensor, table: Table) -> None:
    """Rows from copies of tokens, and their weighted sums."""
    device, num_rows = like.device, shape.tokens * shape.top_k
    bags = Bags.of(torch.randint(0, shape.tokens, (num_rows,), device=device), shape.tokens)
    x = like.new_empty(shape.tokens, shape.hidden).normal_()
    y = like.new_empty(num_rows, shape.hidden).normal_()
    weights = torch.rand(num_rows, device=device)
    moved = (x.numel() + y.numel()) * x.itemsize
    copied = torch.empty_like(y)
    rate = 2 * y.numel() * y.itemsize / seconds(lambda: copied.copy_(y), device)
    for name, run in {
        "rows from copies": lambda: expand(x, bags),
        "sums of rows": lambda: reduce(y, bags, weights),
    }.items():
        taken = seconds(run, device)
        table.add_row(
            f"{shape.name}, {name}",
            f"{rate / 1e9:.4g}",
            f"{moved / taken / 1e9:.4g}",
            f"{moved / taken / rate:.2f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide tokens and widths by this")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    console = Console(width=110)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(f"{name}, torch {torch.__version__}, bf16", highlight=False)
    of_products = Table("products", "dense TFLOP/s", "loop", "grouped_linear", "of dense")
    of_movements = Table("rows", "copy GB/s", "ours GB/s", "of copy")
    for shape in SHAPES:
        products(shape.scaled(options.scale), like, of_products)
        movements(shape.scaled(options.scale), like, of_movements)
    console.print(of_products, of_movements)


if __name__ == "__main__":
    main()
