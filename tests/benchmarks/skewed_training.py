"""The quickstart on skewed text without a balancer, under the home plan and under Quota.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.skewed_training --ranks 4 --steps 200

The text is tables of which nine in ten digits are zeros, so most tokens choose the same experts.
Planners do not change the mathematics: losses differ by rounding alone. In fp32 that grows from
step to step, as routers at the edge between two experts fall to one side or the other; a control,
the home plan computed in two chunks, sums in another order too. (In float64
`tests/trainer/test_engine_borrowed.py` compares 80 steps to nine digits.) Beside them the load
ratio of ranks, and the critical path: CPU seconds of the busiest rank's own thread in the MoE
layers, forward and backward, summed over steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
FILES, LINES, COLUMNS = 40, 400, 20
LEARNING_RATE = 1e-3
EARLY = 50  # steps
ARMS = {
    "home": ["planner=home"],
    "home, 2 chunks": ["planner=home", "train.dispatch_chunks=2"],
    "quota": ["planner=quota"],
}


@dataclass(frozen=True)
class Outcome:
    """One run: losses by step, load ratio before and after planning, critical path, borrowing."""

    losses: list[float]
    ratio_home: float
    ratio: float
    critical_s: float
    borrowed: float
    planner_ms: float


def write_corpus(folder: Path) -> None:
    """Tables of numbers, nearly all digits zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for number in range(FILES):
        lines = (
            ",".join(
                "".join(draw.choices("0123456789", [81, *[1] * 9], k=3)) for _ in range(COLUMNS)
            )
            for _ in range(LINES)
        )
        (folder / f"table{number}.csv").write_text("\n".join(lines) + "\n")


def train(arm: list[str], ranks: int, steps: int, text: Path, run_dir: Path) -> Outcome:
    """One run of the quickstart in processes of its own."""
    overrides = [
        "experiment=quickstart",
        "data=text",
        f"data.sources.text.paths=[{text}/*.csv]",
        f"data.cache_dir={run_dir.parent}/data",
        "balance=none",
        *arm,
        f"run.dir={run_dir}",
        f"train.steps={steps}",
        f"optim.warmup_steps={min(40, steps)}",
        "train.log_every=1",
        "train.time_layers_every=1",
        "train.generate=0",
        "train.eval_every=0",
        f"optim.lr={LEARNING_RATE}",
        "data.validation_fraction=0",
        "checkpoint.export=false",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*command, "--nproc-per-node", str(ranks), "-m", "trainer.train", *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    def mean(name: str) -> float:
        return sum(line[name] for line in lines) / len(lines)

    return Outcome(
        [line["train/loss"] for line in lines],
        mean("moe/load_ratio_home"),
        mean("moe/load_ratio"),
        sum(line["phase/layers_cpu_s"] for line in lines),
        mean("moe/borrowed_experts"),
        mean("moe/planner_ms"),
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Outcome]:
    """The command; returns what it found, by arm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "text")
        outcomes = {
            name: train(arm, options.ranks, options.steps, folder / "text", folder / str(number))
            for number, (name, arm) in enumerate(ARMS.items())
        }
    first = outcomes["home"]
    table = Table(title=f"{options.steps} steps on {options.ranks} ranks, EP {options.ranks}")
    for title in ("arm", "last loss", f"differs by step {EARLY}", "ever", "load ratio at home",
                  "as planned", "borrowed per layer", "planner ms", "critical path s"):  # fmt: skip
        table.add_column(title, justify="right")
    for name, found in outcomes.items():
        pairs = zip(found.losses, first.losses, strict=True)
        differences = [abs(a - b) / b for a, b in pairs]
        table.add_row(
            name,
            f"{found.losses[-1]:.5f}",
            f"{max(differences[:EARLY]):.1e}",
            f"{max(differences):.1e}",
            f"{found.ratio_home:.3f}",
            f"{found.ratio:.3f}",
            f"{found.borrowed:.2f}",
            f"{found.planner_ms:.2f}",
            f"{found.critical_s:.2f}",
        )
    Console(width=120).print(table)
    return outcomes


if __name__ == "__main__":
    main()
