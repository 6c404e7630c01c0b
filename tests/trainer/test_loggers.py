"""Loggers: what they write, and that none of them can end a run."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as Terminal

from trainer import loggers
from trainer.loggers import Console, JsonLines, Logger, LoggerList, TensorBoard, Wandb, headline

CONFIG: dict[str, Any] = {"train": {"steps": 60}, "seed": 1}
METRICS = {
    "train/loss": 2.34567,
    "validation/bits_per_byte": 1.875,
    "speed/tokens_per_s": 12345.6,
    "speed/left_s": 125.4,
    "moe/load_ratio": 1.256,
}


class Recorder:
    """Keeps its calls, and raises in one of them if told to."""

    def __init__(self, fails_in: str = "", error: Exception | None = None) -> None:
        self.fails_in, self.error = fails_in, error or RuntimeError("no network")
        self.calls: list[Any] = []

    def _note(self, name: str, *content: Any) -> None:
        self.calls.append((name, *content))
        if name == self.fails_in:
            raise self.error

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        self._note("start", config, run_dir)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._note("log", step, metrics)

    def finish(self, summary: dict[str, Any]) -> None:
        self._note("finish", summary)


def run(*all_loggers: Logger, rank: int = 0, steps: int = 3) -> LoggerList:
    group = LoggerList(all_loggers, rank)
    group.start(CONFIG, Path("somewhere"))
    for step in range(1, steps + 1):
        group.log(step, METRICS)
    group.finish({"steps": steps})
    return group


# Logging never kills a run


def test_every_logger_gets_every_call() -> None:
    first, second = Recorder(), Recorder()
    run(first, second)
    expected = [
        ("start", CONFIG, Path("somewhere")),
        *(("log", step, METRICS) for step in (1, 2, 3)),
        ("finish", {"steps": 3}),
    ]
    assert first.calls == second.calls == expected


def test_only_rank_zero_logs() -> None:
    recorder = Recorder()
    run(recorder, rank=1)
    assert recorder.calls == []


@pytest.mark.parametrize(("fails_in", "calls"), [("start", 1), ("log", 2), ("finish", 5)])
@pytest.mark.parametrize(
    "error", [RuntimeError("no network"), OSError(28, "No space"), KeyError(1)]
)
def test_a_failing_logger_is_named_once_and_switched_off(
    caplog: pytest.LogCaptureFixture, fails_in: str, calls: int, error: Exception
) -> None:
    before, failing, after = Recorder(), Recorder(fails_in, error), Recorder()
    run(before, failing, after)
    assert len(failing.calls) == calls
    assert len(before.calls) == len(after.calls) == 5
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert (
        f"logger Recorder is switched off, training goes on: {type(error).__name__}"
        in record.message
    )
    assert str(error) in record.message


def test_full_disk(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    group = run(JsonLines("/dev/full"), recorder)
    assert len(recorder.calls) == 5
    assert group.active == [recorder]
    (record,) = caplog.records
    assert "JsonLines" in record.message and "No space left" in record.message


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(Recorder):
        def log(self, step: int, metrics: dict[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted())


# JSON lines


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    logger = JsonLines(str(path))
    logger.start(CONFIG, tmp_path)
    logger.log(1, {"loss": 0.1})
    assert lines(path)[0]["loss"] == 0.1  # there at once
    logger.log(2, {"loss": math.nan, "norm": math.inf, "low": -math.inf})
    logger.finish({})
    records = lines(path)
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["time"] <= records[1]["time"]
    assert (records[1]["loss"], records[1]["norm"], records[1]["low"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(records[1]["loss"]))
    for strict in path.read_text().splitlines():
        json.loads(strict, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_json_lines_go_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    for step in (2, 3):
        logger = JsonLines(str(path))
        logger.start(CONFIG, tmp_path)
        logger.log(step, {})
    content = path.read_text().splitlines()
    assert content[:2] == ['{"step": 1}', '{"step": 2, "lo']
    assert [json.loads(line)["step"] for line in content[2:]] == [2, 3]


# Console


def console_output(monkeypatch: pytest.MonkeyPatch, terminal: bool, steps: list[int]) -> str:
    stream = io.StringIO()
    make = lambda: Terminal(file=stream, force_terminal=terminal, width=120)  # noqa: E731
    monkeypatch.setattr(loggers, "Terminal", make)
    monkeypatch.setattr(sys, "stdout", stream)
    console = Console()
    console.start(CONFIG, Path())
    for step in steps:
        console.log(step, METRICS)
    console.finish({})
    return stream.getvalue()


HEADLINE = "loss 2.346  1.875 bits/byte  12,346 tokens/s  load ratio 1.26  2:05 left"


def test_headline_leaves_out_what_is_unknown() -> None:
    assert headline(METRICS) == HEADLINE
    assert headline({"train/loss": 1.0}) == "loss 1.000"
    assert headline({"train/loss": math.nan, "speed/left_s": math.inf}) == "loss nan"


def test_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every 60 // 30 steps, the first and the last step always."""
    output = console_output(monkeypatch, False, list(range(1, 61))).splitlines()
    assert output[0] == f"step 1/60  {HEADLINE}"
    assert output[-1] == f"step 60/60  {HEADLINE}"
    steps = [int(line.split()[1].split("/")[0]) for line in output]
    assert steps == [*range(1, 60, 2), 60]


def test_progress_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = console_output(monkeypatch, True, [30, 60])
    assert "60/60" in output
    assert HEADLINE in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") > 0  # the cursor comes back


# TensorBoard and wandb


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="optional package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoard(str(tmp_path))
    logger.start(CONFIG, tmp_path)
    logger.log(1, {"train/loss": 2.5})
    logger.log(2, {"train/loss": 1.5})
    logger.finish({})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.5)]


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a run without any network; a resumed run keeps the id."""
    pytest.importorskip("wandb", reason="optional package")
    monkeypatch.chdir(tmp_path)
    ids = []
    for _ in range(2):
        logger = Wandb(dir=str(tmp_path), name="a run")
        logger.start(CONFIG, tmp_path)
        logger.log(1, METRICS)
        ids.append(logger.run.id)
        logger.finish({"steps": 1})
    assert ids[0] == ids[1]
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    for folder in runs:
        assert folder.name.endswith(ids[0])
        assert next(folder.glob("*.wandb")).stat().st_size > 0
    assert runs


class FakeRun:
    """What the logger uses of a wandb run."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.summary: dict[str, Any] = {}
        self.step_metric, self.finished = "", False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.step_metric = step_metric

    def log(self, metrics: dict[str, float]) -> None:
        self.logged.append(metrics)

    def finish(self) -> None:
        self.finished = True


def test_wandb_online_resumes_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="optional package")
    runs: list[FakeRun] = []
    started: list[dict[str, Any]] = []

    def init(**settings: Any) -> FakeRun:
        started.append(settings)
        runs.append(FakeRun())
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    for step in (1, 2):
        logger = Wandb(dir=str(tmp_path / "run"), name="a run", project="p", mode="online")
        logger.start(CONFIG, tmp_path)
        logger.log(step, METRICS)
        logger.finish({"loss": 1.0})
    first, second = started
    assert first["id"] == second["id"]
    assert (first["resume"], first["mode"], first["project"], first["name"]) == (
        "allow",
        "online",
        "p",
        "a run",
    )
    assert first["config"] == CONFIG
    assert runs[1].logged == [{"step": 2, **METRICS}]
    assert runs[1].step_metric == "step"
    assert runs[1].summary == {"loss": 1.0} and runs[1].finished


def test_wandb_mode() -> None:
    with pytest.raises(ValueError, match=r"logger.wandb.mode \(on\) must be offline or online"):
        Wandb(dir="x", name="y", mode="on")


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
@pytest.mark.parametrize("shadow", [False, True])
def test_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, shadow: bool
) -> None:
    """Refused when the logger is made; a folder `wandb` of an earlier run is no package."""
    if shadow:
        (tmp_path / package).mkdir()
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    message = rf"logger.{package} needs the package {package}: run `pip install {package}`"
    with pytest.raises(ValueError, match=message):
        Wandb(dir="x", name="y") if package == "wandb" else TensorBoard(dir="x")
