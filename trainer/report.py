"""What a run ends with: a table, a sample, a JSON file and a picture."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class RunSummary:
    """The figures of a finished run; `None` where there is none."""

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
    max_violation: tuple[float, float]
    rows: int
    rows_crossing: int
    skipped_steps: int
    checkpoint: str | None
    export: str | None
    sample: str


def report(summary: RunSummary, run_dir: Path) -> None:
    """Print the summary and write summary.json and metrics.png into the folder of the run."""
    console = Console()
    if summary.sample:
        console.rule("sample")
        console.print(printable(summary.sample), markup=False, highlight=False)
    console.print(table(summary))
    (run_dir / "summary.json").write_text(json.dumps(dataclasses.asdict(summary), indent=1) + "\n")
    plot_run(run_dir)


def table(summary: RunSummary) -> Table:
    """The summary as two columns."""
    share = summary.rows_crossing / summary.rows if summary.rows else 0.0
    rows = [
        ("steps", f"{summary.steps:,} on {summary.ranks} ranks, EP {summary.ep}"),
        ("wall time", f"{summary.seconds:.0f} s"),
        ("parameters", f"{summary.parameters:,}, {summary.active_parameters:,} active per token"),
        (
            "tokens/s",
            f"{summary.tokens_per_s:,.0f}, {summary.tokens_per_s / summary.ranks:,.0f} per rank",
        ),
        ("training loss", f"{summary.loss:.4f} nats per token"),
    ]
    if summary.bits_per_byte is not None:
        rows.append(("validation", f"{summary.bits_per_byte:.4f} bits per byte"))
    if summary.baseline_bits_per_byte is not None:
        rows.append(
            (
                "order-3 byte model",
                f"{summary.baseline_bits_per_byte:.4f} bits per byte, same split",
            )
        )
    rows += [
        ("load ratio of ranks", "{:.3f} first, {:.3f} last".format(*summary.load_ratio)),
        ("MaxVio of experts", "{:.3f} first, {:.3f} last".format(*summary.max_violation)),
        ("rows that crossed ranks", f"{summary.rows_crossing:,} of {summary.rows:,} ({share:.1%})"),
        ("skipped steps", str(summary.skipped_steps)),
        ("checkpoint", summary.checkpoint or "none"),
        ("export", summary.export or "none"),
    ]
    result = Table("", "this run", title="Evenkeel")
    for name, value in rows:
        result.add_row(name, value)
    return result


def printable(text: str) -> str:
    """Text with control and other unprintable characters escaped, line ends kept."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def plot_run(run_dir: Path) -> None:
    """Plot loss, validation, load ratio and MaxVio over steps from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    panels = {
        "train/loss": "training loss (nats per token)",
        "validation/bits_per_byte": "validation (bits per byte)",
        "moe/load_ratio": "load ratio of ranks (max/mean)",
        "moe/max_violation_global": "MaxVio of experts (max/mean - 1)",
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
        points = [(r["step"], r[name]) for r in records if name in r]
        axis.plot([x for x, _ in points], [y for _, y in points])
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.savefig(run_dir / "metrics.png", dpi=120)
    pyplot.close(figure)
