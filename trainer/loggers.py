"""Where metrics go: progress bar, JSON lines, Weights & Biases, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from configs.secrets import masked_text

LOG = logging.getLogger(__name__)
PLAIN_LINES = 30  # that a run prints where there is no terminal for a progress bar


class Logger(Protocol):
    """Takes the metrics of a run, on rank 0 only."""

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        """Begin, or go on with, the run that has this resolved configuration and folder."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a step; a resumed run may repeat steps."""

    def finish(self, summary: dict[str, Any]) -> None:
        """End the run; `summary` holds plain values and may be empty if the run failed."""


class LoggerList:
    """All loggers of a run, on rank 0; silent on the other ranks.

    Logging never kills a run: a logger that raises, whatever it is, is named in one warning and
    switched off, and the others go on.
    """

    def __init__(self, loggers: Sequence[Logger], rank: int) -> None:
        self.active = list(loggers) if rank == 0 else []

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        self._each(lambda logger: logger.start(config, run_dir))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._each(lambda logger: logger.log(step, metrics))

    def finish(self, summary: dict[str, Any]) -> None:
        self._each(lambda logger: logger.finish(summary))

    def _each(self, call: Callable[[Logger], None]) -> None:
        for logger in list(self.active):
            try:
                call(logger)
            except Exception as error:  # full disks, lost networks, bugs: none may end a training
                self.active.remove(logger)
                kind = type(logger).__name__
                LOG.warning(
                    f"logger {kind} is switched off, training goes on: "
                    f"{type(error).__name__}: {error}"
                )


class Console:
    """A progress bar with the figures worth watching; a few plain lines without a terminal."""

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        self.steps = int(config["train"]["steps"])
        self.next_line = 0
        self.terminal = Terminal()
        self.bar: Progress | None = None
        if self.terminal.is_terminal:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=self.terminal,
            )
            self.task = self.bar.add_task("", total=self.steps)
            self.bar.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        text = headline(metrics)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        elif step >= self.next_line or step == self.steps:
            print(f"step {step}/{self.steps}  {text}", flush=True)
            self.next_line = step + max(1, self.steps // PLAIN_LINES)

    def finish(self, summary: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.stop()


def headline(metrics: dict[str, float]) -> str:
    """Loss, bits per byte, speed, load ratio and time left in one line, as far as known."""
    left = metrics.get("speed/left_s", math.nan)
    parts = {
        "train/loss": "loss {:.3f}",
        "validation/bits_per_byte": "{:.3f} bits/byte",
        "speed/tokens_per_s": "{:,.0f} tokens/s",
        "moe/load_ratio": "load ratio {:.2f}",
    }
    texts = [text.format(metrics[name]) for name, text in parts.items() if name in metrics]
    if math.isfinite(left):
        minutes, seconds = divmod(round(left), 60)
        texts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(texts)


class JsonLines:
    """One JSON object per logged step, on disk at once; a resumed run appends."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a killed run left its last line unfinished
                    file.write(b"\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3), **metrics}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        pass


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: what is not finite becomes the string nan, inf or -inf."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Wandb:
    """Weights & Biases; offline (to be sent later by `wandb sync`) unless mode is online.

    A resumed run keeps its id, so that online its curves go on.
    """

    def __init__(
        self, dir: str, name: str, project: str = "evenkeel", mode: str = "offline"
    ) -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"logger.wandb.mode ({mode}) must be offline or online")
        _require("wandb")
        self.dir, self.name, self.project, self.mode = dir, name, project, mode

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        import wandb

        id_file = Path(self.dir) / "wandb-id"
        if not id_file.exists():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            id_file.write_text(uuid.uuid4().hex)
        online = self.mode == "online"
        with _masked_command():
            self.run: Any = wandb.init(
                project=self.project,
                name=self.name,
                id=id_file.read_text(),
                resume="allow" if online else None,
                config=config,
                dir=self.dir,
                mode="online" if online else "offline",
                settings=wandb.Settings(silent=True, console="off"),
            )
        # wandb drops steps that come again after a resume, unless the step is a metric like others
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log({"step": step, **metrics})

    def finish(self, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)
        self.run.finish()


class TensorBoard:
    """TensorBoard event files."""

    def __init__(self, dir: str) -> None:
        _require("tensorboard")
        self.dir = dir

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(self.dir)
        self.writer.add_text("config", f"```\n{to_json(config, indent=2)}\n```")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        self.writer.close()


@contextmanager
def _masked_command() -> Iterator[None]:
    """Whoever notes the command line, as wandb does, gets it without secrets."""
    command = sys.argv
    sys.argv = [masked_text(word) for word in command]
    try:
        yield
    finally:
        sys.argv = command


def _require(package: str) -> None:
    """Refuse a logger whose package is missing, before anything is built.

    Raises:
        ValueError: naming the logger and the remedy.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # no origin: only a folder of that name
        raise ValueError(
            f"logger.{package} needs the package {package}: run `pip install {package}` or leave "
            f"the logger out"
        )
