"""What a run ends with: a sample, a table, summary.json and a picture of its metrics.

`python -m trainer.report RUN` writes a page about a run; see trainer/page.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.loggers import to_json

PANELS = {
    "loss (nats per token)": ("train/loss", "validation/loss"),
    "bits per byte": ("validation/bits_per_byte",),
    "load ratio of ranks (max / mean)": ("moe/load_ratio", "moe/load_ratio_home"),
    "MaxVio of experts (max / mean - 1)": ("moe/max_violation", "moe/max_violation_global"),
}


@dataclass(frozen=True)
class RunSummary:
    """The figures of a finished run; None where there is none.

    Losses are nats per token; `load_ratio` and `max_violation` are (first step, last step), and
    `load_ratio_home` is what the load ratio would have been had every expert stayed at home.
    """

    steps: int
    seconds: float
    ranks: int
    ep: int
    parameters: int
    active_parameters: int
    tokens_per_s: float
    loss: float
    validation_loss: float | None
    bits_per_byte: float | None
    baseline_bits_per_byte: float | None
    load_ratio: tuple[float, float]
    load_ratio_home: tuple[float, float]
    max_violation: tuple[float, float]
    rows: int
    rows_crossing: int
    skipped_steps: int
    checkpoint: str | None
    export: str | None
    sample: str
    validation: dict[str, float] = dataclasses.field(default_factory=dict)  # all of the last one


def report(summary: RunSummary, run_dir: Path, console: Console | None = None) -> None:
    """Print sample and table, write summary.json and metrics.png into the folder of the run."""
    console = console or Console()
    text = to_json(dataclasses.asdict(summary), indent=1)
    (run_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
    if summary.sample:
        console.rule("sample")
        console.print(printable(summary.sample, console.encoding), markup=False, highlight=False)
    console.print(table(summary))
    try:
        console.print(f"curves: {plot_run(run_dir)}", markup=False, soft_wrap=True)
    except (ImportError, ValueError) as error:
        console.print(f"no curves: {error}", markup=False, soft_wrap=True)
    command = f"python -m trainer.report {shlex.quote(str(run_dir))}"
    console.print(f"a page about this run: {command}", markup=False, soft_wrap=True)


def table(summary: RunSummary) -> Table:
    """The summary as two columns."""
    share = summary.rows_crossing / summary.rows if summary.rows else 0.0
    rows = {
        "steps": f"{summary.steps:,} on {summary.ranks} ranks, EP {summary.ep}",
        "wall time": f"{summary.seconds:.0f} s",
        "parameters": f"{summary.parameters:,}, {summary.active_parameters:,} active per token",
        "tokens/s": f"{summary.tokens_per_s:,.0f}",
        "tokens/s per rank": f"{summary.tokens_per_s / summary.ranks:,.0f}",
        "training loss": f"{summary.loss:.4f} nats per token",
        "validation loss": _figure(summary.validation_loss, "nats per token"),
        "validation": _figure(summary.bits_per_byte, "bits per byte"),
        "order-3 byte model": _figure(summary.baseline_bits_per_byte, "bits per byte, same split"),
        "load ratio of ranks": "{:.3f} first, {:.3f} last".format(*summary.load_ratio),
        "without the planner": "{:.3f} first, {:.3f} last".format(*summary.load_ratio_home),
        "MaxVio of experts": "{:.3f} first, {:.3f} last".format(*summary.max_violation),
        "rows that crossed ranks": f"{summary.rows_crossing:,} of {summary.rows:,} ({share:.1%})",
        "skipped steps": f"{summary.skipped_steps:,}",
        "checkpoint": summary.checkpoint or "none",
        "export": summary.export or "none",
    }
    result = Table("", "this run", title="Evenkeel")
    for name, value in rows.items():
        result.add_row(name, Text(printable(value)))
    return result


def _figure(value: float | None, unit: str) -> str:
    return "none" if value is None else f"{value:.4f} {unit}"


def printable(text: str, encoding: str = "utf-8") -> str:
    """Text that a terminal may show: line ends stay, what is unprintable there is escaped."""
    escaped = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def plot_run(run_dir: Path) -> Path:
    """Plot loss, bits per byte, load ratio and MaxVio over steps from metrics.jsonl.

    Returns the picture, metrics.png in the same folder.

    Raises:
        ImportError: without matplotlib. ValueError: if there are no metrics.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves need the package matplotlib: pip install matplotlib") from error
    records = read_metrics(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name in names:
            points = [(step, float(record[name])) for step, record in records if name in record]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=name, marker="." if len(points) == 1 else None
                )
                axis.legend(fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    picture = run_dir / "metrics.png"
    figure.savefig(picture, dpi=120)
    return picture


def read_metrics(path: Path) -> list[tuple[int, dict[str, float | str]]]:
    """Steps and their metrics in ascending order; of a repeated step the last record counts.

    A line that a killed run left unfinished is passed over.

    Raises:
        ValueError: if there is no file or no record in it.
    """
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["step"]] = record
    if not records:
        raise ValueError(f"{path} holds no metrics")
    return sorted(records.items())


if __name__ == "__main__":
    import sys

    from trainer.page.command import main

    sys.exit(main())
