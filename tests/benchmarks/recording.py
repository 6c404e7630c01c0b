"""Share of an optimizer step that recording its routing takes, in real steps of the quickstart.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.recording

Every step is recorded, by several recorders in turn: collecting the choices in the layers and
counting them after the step. Times are CPU seconds of a rank's process, so that other work on the
machine counts little, and wall time beside them; figures are those of the rank with the largest
share. Means and shares hold everything, also when rows that wait are added to a table.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table
from torch import Tensor

import parallel.layer
from configs.compose import load
from parallel.decisions import report_routing
from tests.ranks import run_ranks
from trainer.engine import StepStats, TorchEngine
from trainer.placement import Recorder
from trainer.run import run

ARMS: dict[str, dict[str, Any]] = {
    "stats.every=1": {"by_token": False},
    "and stats.by_token=true": {"by_token": True},
    "and stats.decay=0.99": {"by_token": True, "decay": 0.99},
}
WARM_UP = 5  # steps of every arm
EVERY = 10
CPU, WALL = 0, 1


@dataclass
class Times:
    """CPU and wall seconds of every step of an arm: of the step, and of recording it."""

    step: list[tuple[float, float]] = field(default_factory=list)
    record: list[tuple[float, float]] = field(default_factory=list)

    def seconds(self, clock: int) -> list[float]:
        """Of recording, step by step, after the warm-up."""
        return [pair[clock] for pair in self.record[WARM_UP:]]

    def share(self, clock: int) -> float:
        """Of recording, measured against the steps."""
        return fmean(self.seconds(clock)) / fmean(pair[clock] for pair in self.step[WARM_UP:])


class Watch:
    """Seconds inside `with`, added up until they are taken."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def __enter__(self) -> None:
        self.cpu -= time.process_time()
        self.wall -= time.perf_counter()

    def __exit__(self, *exception: Any) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()

    def take(self) -> tuple[float, float]:
        """CPU and wall seconds since the last call."""
        taken = self.cpu, self.wall
        self.cpu = self.wall = 0.0
        return taken


def measure(steps: int, folder: str) -> dict[str, Times]:
    """On one rank: the quickstart for so many steps, by arm."""
    config = load(
        "experiment=quickstart",
        f"train.steps={steps}",
        "train.eval_every=0",
        "train.generate=0",
        "data.validation_fraction=0",
        "stats.every=1",
        "checkpoint.every=0",
        "checkpoint.export=false",
        "~logger.console",
        f"run.dir={folder}",
        f"data.cache_dir={folder}/data",
    )
    times = {name: Times() for name in ARMS}
    names = [name for _ in range(steps) for name in ARMS]
    recorders: dict[str, Recorder] = {}
    step, recording = Watch(), Watch()
    train_step, count = TorchEngine.train_step, Recorder.record

    def timed_step(engine: TorchEngine, *arguments: Any, **options: Any) -> StepStats:
        with step:
            return train_step(engine, *arguments, **options)

    def timed_collect(layer: int, ids_TK: Tensor) -> None:
        with recording:
            report_routing(layer, ids_TK)

    def timed_record(own: Recorder, *arguments: Any) -> None:
        name = names.pop(0)
        sizes = own.stats.num_layers, own.stats.num_experts
        recorder = recorders.setdefault(name, Recorder(own.mesh, *sizes, **ARMS[name]))
        with recording:
            count(recorder, *arguments)
        times[name].step.append(step.take())
        times[name].record.append(recording.take())

    with ExitStack() as patches:
        patches.enter_context(redirect_stdout(io.StringIO()))
        patches.enter_context(patch.object(TorchEngine, "train_step", timed_step))
        patches.enter_context(patch.object(parallel.layer, "report_routing", timed_collect))
        patches.enter_context(patch.object(Recorder, "record", timed_record))
        run(config)
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=240)
    options = parser.parse_args(arguments)
    if options.steps <= WARM_UP * len(ARMS):
        parser.error(f"--steps ({options.steps}) must be > {WARM_UP * len(ARMS)}, the warm-up")
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(measure, options.ranks, options.steps, folder, timeout_s=1800)
    table = Table(title=f"the quickstart, {options.ranks} ranks, {options.steps} steps")
    for title in ("recorded", "step CPU ms", "recording CPU ms", "mean", "of CPU", "of wall time",
                  f"of CPU at stats.every={EVERY}"):  # fmt: skip
        table.add_column(title, justify="left" if title == "recorded" else "right")
    for name in ARMS:
        times = max((rank[name] for rank in ranks), key=lambda times: times.share(CPU))
        table.add_row(
            name,
            f"{1e3 * median(pair[CPU] for pair in times.step[WARM_UP:]):.0f}",
            f"{1e3 * median(times.seconds(CPU)):.2f}",
            f"{1e3 * fmean(times.seconds(CPU)):.2f}",
            f"{times.share(CPU):.2%}",
            f"{times.share(WALL):.2%}",
            f"{times.share(CPU) / EVERY:.3%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
