"""Where metrics go: progress bar, JSON lines, Weights & Biases, TensorBoard."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_LINES = 20  # lines that a run prints where there is no terminal for a progress bar


class Logger(Protocol):
    """Takes the metrics of a run; on rank 0 only."""

    def start(self, config: dict[str, Any], run_dir: Path) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self, summary: dict[str, Any]) -> None: ...


class Console:
    """A progress bar with loss, bits per byte, tokens/s, load ratio and time left.

    Where standard output is no terminal it prints some twenty plain lines instead.
    """

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        self.steps = int(config["train"]["steps"])
        self.console = RichConsole()
        self.bar: Progress | None = None
        if self.console.is_terminal:
            columns = [TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn()]
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=self.console)
            self.task = self.bar.add_task("", total=self.steps)
            self.bar.start()
        self.next_line = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        text = describe(metrics)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        elif step >= self.next_line or step == self.steps:
            print(f"step {step}/{self.steps}  {text}", flush=True)
            self.next_line = step + max(1, self.steps // PLAIN_LINES)

    def finish(self, summary: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.stop()


def describe(metrics: dict[str, float]) -> str:
    """The figures worth watching, in one line."""
    parts = [f"loss {metrics['train/loss']:.3f}"]
    if "validation/bits_per_byte" in metrics:
        parts.append(f"validation {metrics['validation/bits_per_byte']:.3f} bits/byte")
    parts.append(f"{metrics['speed/tokens_per_s']:,.0f} tokens/s")
    parts.append(f"load ratio {metrics['moe/load_ratio']:.2f}")
    left = int(metrics["speed/left_s"])
    parts.append(f"{left // 60}:{left % 60:02d} left")
    return "  ".join(parts)


class JsonLines:
    """One JSON object per logged step, flushed at once; a resumed run appends."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        self.file.close()


class Wandb:
    """Weights & Biases; offline unless `mode` is "online"."""

    def __init__(
        self, dir: str, name: str, project: str = "evenkeel", mode: str = "offline"
    ) -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"logger.wandb.mode ({mode}) must be offline or online")
        self.dir, self.name, self.project, self.mode = dir, name, project, mode

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("logger=wandb needs the package wandb: pip install wandb") from error
        init: Any = wandb.init
        self.run = init(
            project=self.project,
            name=self.name,
            config=config,
            dir=self.dir,
            mode=self.mode,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)
        self.run.finish()


class TensorBoard:
    """TensorBoard event files."""

    def __init__(self, dir: str) -> None:
        self.dir = dir

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "logger=tensorboard needs the package tensorboard: pip install tensorboard"
            ) from error
        self.writer = SummaryWriter(self.dir)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, summary: dict[str, Any]) -> None:
        self.writer.close()


class LoggerList:
    """All loggers of a run, on rank 0; silent on the others.

    Logging never kills a run: a logger that fails, whatever it raises, is named once and
    switched off, and the others go on. Only a logger that cannot start is refused.
    """

    def __init__(self, loggers: Sequence[Logger], rank: int) -> None:
        self.loggers = list(loggers) if rank == 0 else []

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        for logger in self.loggers:
            logger.start(config, run_dir)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._each(lambda logger: logger.log(step, metrics))

    def finish(self, summary: dict[str, Any]) -> None:
        self._each(lambda logger: logger.finish(summary))

    def _each(self, call: Callable[[Logger], None]) -> None:
        for logger in list(self.loggers):
            try:
                call(logger)
            except Exception as error:  # of any library: none of them may end the training
                name = type(logger).__name__
                print(f"warning: logger {name} is off from now on: {error}", file=sys.stderr)
                self.loggers.remove(logger)
