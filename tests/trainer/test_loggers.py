"""Loggers: what they write, and that none of them ends a run; the closing report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.loggers import Console, JsonLines, LoggerList, TensorBoard, Wandb
from trainer.report import RunSummary, printable, report

CONFIG = {"train": {"steps": 40}, "run": {"name": "test"}}
METRICS = {
    "train/loss": 1.5,
    "speed/tokens_per_s": 1234.0,
    "moe/load_ratio": 1.25,
    "speed/left_s": 65.0,
}


class Failing:
    """Raises on the second call."""

    calls = 0

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        pass

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("the server is gone")

    def finish(self, summary: dict[str, Any]) -> None:
        raise AssertionError("switched off before")


def test_a_failing_logger_is_switched_off_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    failing = Failing()
    loggers = LoggerList([failing, JsonLines(str(path))], rank=0)
    loggers.start(CONFIG, tmp_path)
    for step in (1, 2, 3):
        loggers.log(step, METRICS)
    loggers.finish({})
    assert failing.calls == 2
    error = capsys.readouterr().err
    assert error.count("logger Failing is off from now on: the server is gone") == 1
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = LoggerList([JsonLines("/dev/full")], rank=0)
    loggers.start(CONFIG, tmp_path)
    loggers.log(1, METRICS)
    loggers.log(2, METRICS)
    assert "logger JsonLines is off from now on" in capsys.readouterr().err


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    loggers = LoggerList([JsonLines(str(tmp_path / "m.jsonl"))], rank=1)
    loggers.start(CONFIG, tmp_path)
    loggers.log(1, METRICS)
    loggers.finish({})
    assert not list(tmp_path.iterdir())


def test_console_prints_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.start(CONFIG, tmp_path)
    for step in range(1, 41):
        console.log(step, METRICS)
    console.finish({})
    lines = capsys.readouterr().out.splitlines()
    assert 15 <= len(lines) <= 25
    assert lines[-1] == "step 40/40  loss 1.500  1,234 tokens/s  load ratio 1.25  1:05 left"


def test_tensorboard_and_offline_wandb_write_files(tmp_path: Path) -> None:
    board = TensorBoard(str(tmp_path / "tensorboard"))
    wandb = Wandb(str(tmp_path), "test")
    for logger in (board, wandb):
        logger.start(CONFIG, tmp_path)
        logger.log(1, METRICS)
        logger.finish({"loss": 1.0})
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    with pytest.raises(ValueError, match=r"logger.wandb.mode \(on\) must be offline or online"):
        Wandb(str(tmp_path), "test", mode="on")


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"step": s, "train/loss": 5.0 / s, "moe/load_ratio": 1.5} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = RunSummary(
        steps=3,
        seconds=12.0,
        ranks=2,
        ep=2,
        parameters=1000,
        active_parameters=400,
        tokens_per_s=5000.0,
        loss=1.6667,
        validation_loss=1.2,
        bits_per_byte=1.75,
        baseline_bits_per_byte=2.25,
        load_ratio=(1.5, 1.125),
        max_violation=(1.0, 0.25),
        rows=200,
        rows_crossing=50,
        skipped_steps=0,
        checkpoint="runs/x/checkpoints/step-3",
        export=None,
        sample="def f():\n\x07 [red]pass",
    )
    report(summary, tmp_path)
    output = capsys.readouterr().out
    for text in ("1.7500 bits per byte", "2.2500 bits per byte", "50 of 200 (25.0%)", "1.125 last"):
        assert text in output
    assert r"\x07 [red]pass" in output
    assert json.loads((tmp_path / "summary.json").read_text())["rows_crossing"] == 50
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_printable() -> None:
    assert printable("a\n\x1b[2Jé\t") == "a\n\\x1b[2Jé\\t"
