"""Tables and a plot of what the imbalance benchmark found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.benchmarks.imbalance_figures import EVEN, HOME, LINKS, TARGETS, Cell, Verdict, compared


def print_cell(cell: Cell, console: Console) -> None:
    """The table of one cell."""
    ideal = ", ".join(f"{w} {cell.ideal[p]:.2f}x" for w, p in (("fwd", "forward"), ("f+b", "both")))
    table = Table(
        title=f"{cell.label}: home load ratio {cell.load_ratio:.2f}, ideal {ideal}; "
        f"{cell.rows:.0f} rows; steps: {cell.num_steps}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("arm", no_wrap=True)
    for header in (
        "fwd ms", "f+b ms", "fwd x", "f+b x", "± %", "of ideal", "of even", "load", "lent",
        "plan us", "MB near/far", "memory", "wall ms",
    ):  # fmt: skip
        table.add_column(header, justify="right", no_wrap=True)
    for name, arm in cell.arms.items():
        table.add_row(
            name,
            f"{arm.forward_s['cpu'] * 1e3:.1f}",
            f"{arm.both_s['cpu'] * 1e3:.1f}",
            f"{arm.speedup['forward']:.2f}",
            f"{arm.speedup['both']:.2f}",
            "-" if math.isnan(arm.noise) else f"{arm.noise * 100:.1f}",
            f"{arm.share['both']:.2f}",
            f"{arm.even_share['both']:.2f}",
            f"{arm.load_ratio:.2f}",
            f"{arm.borrowed:.0f}",
            f"{arm.planner_us:.0f}",
            "/".join(f"{arm.megabytes['both'][link]:.1f}" for link in LINKS),
            f"{arm.memory_ratio:.2f}",
            f"{arm.both_s['wall'] * 1e3:.0f}",
        )
    console.print(table)


def print_verdicts(found: Sequence[Verdict], console: Console) -> None:
    """Targets by arm; each figure is the worst of all cells, named beside it."""
    arms = list(dict.fromkeys(verdict.arm for verdict in found))
    table = Table(
        title="Targets, forward + backward; worst cell", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("target")
    for arm in arms:
        table.add_column(arm, justify="right")
    for target in TARGETS:
        row = [f"{target.text} {'<=' if target.at_most else '>='} {target.bound}"]
        for verdict in (v for v in found if v.target == target.text):
            if verdict.value is None:
                row.append("not measured")
            else:
                word = "met" if verdict.met else "missed"
                row.append(f"{verdict.value:.2f} {word}\n{verdict.where}")
        table.add_row(*row)
    console.print(table)


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Speed-ups beside the ideal, and load ratios before and after, as grouped bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = compared(cells)
    places = np.arange(len(cells))
    width = 0.8 / max(1, len(arms))
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(max(8.0, 0.8 * len(cells) + 3), 8), sharex=True, layout="constrained"
    )
    for number, arm in enumerate(arms):
        here = places + (number - (len(arms) - 1) / 2) * width
        speedups = [cell.arms[arm].speedup["both"] for cell in cells]
        top.bar(here, speedups, width, label=arm)
        bottom.bar(here, [cell.arms[arm].load_ratio for cell in cells], width, label=arm)
    for axes, values, label, style in (
        (top, [cell.ideal["both"] for cell in cells], "ideal", "solid"),
        (top, [cell.arms[EVEN].speedup["both"] for cell in cells], "even routing", "dotted"),
        (bottom, [cell.load_ratio for cell in cells], HOME, "solid"),
    ):
        axes.hlines(values, places - 0.45, places + 0.45, "black", style, label=label)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend()
    top.set_ylabel("speed-up over home, forward + backward")
    bottom.set_ylabel("load ratio: max / mean rows of a rank")
    bottom.set_xticks(places, [cell.label for cell in cells], rotation=45, ha="right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
