"""The end of a run: table, sample, summary.json and curves."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trainer.report import RunSummary, plot_run, printable, read_metrics, report

SUMMARY = RunSummary(
    steps=1200,
    seconds=83.6,
    ranks=4,
    ep=2,
    parameters=1_234_567,
    active_parameters=345_678,
    tokens_per_s=8000.0,
    loss=1.25,
    validation_loss=1.5,
    bits_per_byte=2.1641,
    baseline_bits_per_byte=2.5,
    load_ratio=(1.9, 1.05),
    load_ratio_home=(1.9, 1.6),
    max_violation=(0.8, 0.1),
    rows=2000,
    rows_crossing=500,
    skipped_steps=1,
    checkpoint="runs/[x]/checkpoints/1200",
    export=None,
    sample="def f(x):\n\treturn [bold]x\x1b[31m\u202e\udc80é",
)
METRICS: list[dict[str, Any]] = [
    {"step": step, "train/loss": 3.0 / step, "moe/load_ratio": 1.5, "moe/max_violation": 0.3}
    for step in (1, 2, 3)
]


def write_metrics(run_dir: Path, records: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(lines)


def printed(summary: RunSummary, run_dir: Path, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    report(summary, run_dir, Console(file=stream, width=100, color_system=None))
    stream.seek(0)
    return stream.read()


def cells(output: str) -> dict[str, str]:
    """First and second column of the printed table."""
    rows = [line.replace("|", "│").split("│") for line in output.splitlines()]
    return {row[1].strip(): row[2].strip() for row in rows if len(row) == 4}


def test_table(tmp_path: Path) -> None:
    write_metrics(tmp_path, METRICS)
    figures = cells(printed(SUMMARY, tmp_path))
    assert figures["steps"] == "1,200 on 4 ranks, EP 2"
    assert figures["wall time"] == "84 s"
    assert figures["parameters"] == "1,234,567, 345,678 active per token"
    assert figures["tokens/s"] == "8,000"
    assert figures["tokens/s per rank"] == "2,000"
    assert figures["validation loss"] == "1.5000 nats per token"
    assert figures["validation"] == "2.1641 bits per byte"
    assert figures["order-3 byte model"] == "2.5000 bits per byte, same split"
    assert figures["load ratio of ranks"] == "1.900 first, 1.050 last"
    assert figures["MaxVio of experts"] == "0.800 first, 0.100 last"
    assert figures["rows that crossed ranks"] == "500 of 2,000 (25.0%)"
    assert figures["skipped steps"] == "1"
    assert figures["checkpoint"] == "runs/[x]/checkpoints/1200"
    assert figures["export"] == "none"


def test_nothing_happened(tmp_path: Path) -> None:
    """No step, no validation, no metrics: still a table, and it says what is missing."""
    empty = dataclasses.replace(
        SUMMARY,
        steps=0,
        rows=0,
        rows_crossing=0,
        tokens_per_s=0.0,
        loss=math.nan,
        validation_loss=None,
        bits_per_byte=None,
        baseline_bits_per_byte=None,
        checkpoint=None,
        sample="",
    )
    output = printed(empty, tmp_path)
    figures = cells(output)
    assert figures["validation"] == figures["order-3 byte model"] == "none"
    assert figures["rows that crossed ranks"] == "0 of 0 (0.0%)"
    assert figures["training loss"] == "nan nats per token"
    assert "sample" not in output
    assert "no curves:" in output and "holds no metrics" in output
    assert json.loads((tmp_path / "summary.json").read_text())["loss"] == "nan"


def test_summary_file(tmp_path: Path) -> None:
    write_metrics(tmp_path, METRICS)
    printed(SUMMARY, tmp_path)
    content = json.loads((tmp_path / "summary.json").read_text())
    expected = dataclasses.asdict(SUMMARY)
    assert content == {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_sample_is_printed_safely(tmp_path: Path, encoding: str) -> None:
    write_metrics(tmp_path, METRICS)
    output = printed(SUMMARY, tmp_path, encoding)
    last = "\\xe9" if encoding == "ascii" else "é"
    assert f"def f(x):\n\\treturn [bold]x\\x1b[31m\\u202e\\udc80{last}\n" in output
    assert "\x1b" not in output


def test_printable() -> None:
    assert printable("a\tb\r\nc\0\x07") == "a\\tb\\r\nc\\x00\\x07"
    assert printable("日本 ü") == "日本 ü"
    assert printable("日本 ü", "latin-1") == "\\u65e5\\u672c ü"


# Curves


def test_last_record_of_a_step_counts(tmp_path: Path) -> None:
    """As after a kill: a torn line, and steps that were run again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "a": 1}\n{"step": 3, "a"\n{"step": 1, "a": 5}\n{"step": 2, "a": 7}\n'
    )
    assert [(step, record["a"]) for step, record in read_metrics(path)] == [(1, 5), (2, 7)]


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="optional package")
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    records: list[dict[str, Any]] = [dict(record) for record in METRICS]
    records[1] |= {"validation/bits_per_byte": 2.0, "validation/loss": "nan"}
    write_metrics(tmp_path, records)
    picture = plot_run(tmp_path)
    assert picture == tmp_path / "metrics.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    curves = {
        line.get_label(): [(x, y) for x, y in line.get_xydata()]
        for axis in figures[0].axes
        for line in axis.lines
    }
    assert curves["train/loss"] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert curves["validation/bits_per_byte"] == [(2, 2.0)]
    assert curves["moe/load_ratio"] == [(1, 1.5), (2, 1.5), (3, 1.5)]
    assert curves["moe/max_violation"] == [(1, 0.3), (2, 0.3), (3, 0.3)]
    assert math.isnan(curves["validation/loss"][0][1])


def test_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_metrics(tmp_path, METRICS)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = printed(SUMMARY, tmp_path)
    assert "no curves: curves need the package matplotlib: pip install matplotlib" in output
    assert not (tmp_path / "metrics.png").exists()
