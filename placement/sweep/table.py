"""What a sweep found, as a table: printed, and as CSV, Markdown and JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.sweep_schema import GROUPS
from placement.sweep.cell import Cell

Known = Sequence[tuple[Cell, dict[str, Any]]]  # cells and their records


class Column(NamedTuple):
    """A figure: its key in CSV, its heading, its digits, and what it means."""

    key: str
    heading: str
    digits: int
    text: str


COLUMNS = (
    Column("step_ms", "step ms", 2, "time of the MoE layers in an optimizer step, all parts"),
    Column("exchange_ms", "exchange ms", 2, "tokens under way, both ways, forward and backward"),
    Column("compute_ms", "compute ms", 2, "products of the busiest ranks"),
    Column("borrow_ms", "borrow ms", 2, "weights of borrowed experts there, gradients back"),
    Column("latency_ms", "latency ms", 2, "messages that wait for each other"),
    Column("across_mb", "across MB", 1, "bytes between nodes, of tokens, labels and experts"),
    Column("within_mb", "within MB", 1, "bytes within nodes"),
    Column("load_home", "load home", 3, "max/mean rows per rank, every expert at home"),
    Column("load", "load", 3, "max/mean rows per rank as planned"),
    Column("borrowed", "borrowed", 1, "experts fetched in a step, over all layers"),
    Column("moved_percent", "moved %", 1, "experts that live elsewhere than with contiguous"),
)

FIRST_SHOWN = (  # where not all have room
    "step_ms",
    "load",
    "across_mb",
    "exchange_ms",
    "compute_ms",
    "load_home",
    "within_mb",
    "note",
    "borrow_ms",
    "latency_ms",
    "borrowed",
    "moved_percent",
)

MARGIN = 2  # characters between columns


def figures(record: dict[str, Any]) -> dict[str, float]:
    """The columns' values of a finished cell."""
    step, home_LE = record["step"], record["home_LE"]
    parts = ("exchange", "compute", "borrow", "latency")
    return {
        "step_ms": step["seconds"] * 1e3,
        **{f"{part}_ms": step[f"{part}_s"] * 1e3 for part in parts},
        "across_mb": step["bytes_inter"] / 1e6,
        "within_mb": step["bytes_intra"] / 1e6,
        "load_home": step["load_ratio_home"],
        "load": step["load_ratio"],
        "borrowed": step["borrowed"],
        "moved_percent": 100 * record["moved"] / (len(home_LE) * len(home_LE[0])),
    }


def note(record: dict[str, Any]) -> str:
    """How the placement was found, or why there is none, in words."""
    if record["status"] == "failed":
        return f"failed: {record['message']}"
    solver = record["solver"]
    if solver is None:
        return ""
    found = f"{solver['method']}, {solver['seconds']:.1f} s"
    if solver["proven"]:
        return f"{found}, proven"
    late = "" if solver["finished"] else "out of time, "
    return f"{late}{found}, gap {solver['gap']:.1%}"


def names(known: Known) -> list[dict[str, str]]:
    """What tells every cell from the others; the choices of all groups if nothing varies."""
    if any(cell.name for cell, _ in known):
        return [cell.name for cell, _ in known]
    return [{group: cell.choices[group] for group in GROUPS} for cell, _ in known]


def print_table(known: Known, console: Console) -> None:
    """The table in a terminal, as many columns as have room; the fastest cell is in bold."""
    labels = [[Text(value) for value in name.values()] for name in names(known)]
    heads = [key.rpartition(".")[2] for key in names(known)[0]]
    columns = {column.key: [column.heading, *_column(known, column)] for column in COLUMNS}
    columns["note"] = ["note", *(note(record) for _, record in known)]
    left = console.width - sum(_width(texts) for texts in zip(heads, *labels, strict=True)) - 2
    shown = set()
    for key in FIRST_SHOWN:
        left -= _width(columns[key])
        if left >= 0:
            shown.add(key)
    table = Table(
        title="Simulated: the MoE layers in a mean optimizer step",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for head in heads:
        table.add_column(head, no_wrap=True)
    columns = {key: texts for key, texts in columns.items() if key in shown}
    for key, texts in columns.items():
        side: Any = "left" if key == "note" else "right"
        table.add_column(texts[0], justify=side, min_width=_width(texts) - MARGIN)
    best = min((_step_ms(record) for _, record in known), default=0.0)
    for number, (label, (_, record)) in enumerate(zip(labels, known, strict=True), start=1):
        values = [Text(texts[number]) for texts in columns.values()]
        table.add_row(*label, *values, style="bold" if _step_ms(record) == best else None)
    console.print(table)
    if "note" not in columns:
        _print_notes(known, console)


def _print_notes(known: Known, console: Console) -> None:
    """What failed and what is not finished, in a line for all that say the same."""
    alike: dict[str, list[str]] = {}
    for name, (_, record) in zip(names(known), known, strict=True):
        if record["status"] == "failed" or not (record["solver"] or {"finished": True})["finished"]:
            label = ", ".join(f"{key}={value}" for key, value in name.items())
            alike.setdefault(note(record), []).append(label)
    for text, (label, *others) in alike.items():
        more = f" (and {len(others)} more)" if others else ""
        console.print(f"{label}{more}: {text}", markup=False, highlight=False, soft_wrap=True)


def _width(texts: Sequence[Any]) -> int:
    """Characters that a column takes with its margin; its heading may be broken into words."""
    head, *rest = (str(text) for text in texts)
    return MARGIN + max(len(text) for text in [*head.split(" "), *rest])


def write_tables(known: Known, folder: Path) -> None:
    """table.csv, table.md and results.jsonl in the folder of the sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    labels, keys = names(known), [column.key for column in COLUMNS]
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*labels[0], *keys, "status", "note", "digest"])
        for label, (cell, record) in zip(labels, known, strict=True):
            values = figures(record) if record["status"] == "done" else dict.fromkeys(keys, "")
            end = [record["status"], note(record), cell.digest]
            writer.writerow([*label.values(), *(values[key] for key in keys), *end])
    lines = ["| " + " | ".join([*labels[0], *(c.heading for c in COLUMNS), "note"]) + " |"]
    lines.append("|" + "---|" * len(labels[0]) + "---:|" * len(COLUMNS) + "---|")
    for label, (_, record) in zip(labels, known, strict=True):
        cells = [*label.values(), *_texts(record, COLUMNS), note(record)]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    legend = [f"- {column.heading}: {column.text}" for column in COLUMNS]
    text = "\n".join([*lines, "", *legend]).replace("\n\n\n", "\n\n")
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    results = "".join(json.dumps({"name": cell.name, **record}) + "\n" for cell, record in known)
    (folder / "results.jsonl").write_text(results, encoding="utf-8")


def _texts(record: dict[str, Any], columns: Sequence[Column]) -> list[str]:
    if record["status"] == "failed":
        return [""] * len(columns)
    values = figures(record)
    return [f"{values[column.key]:,.{column.digits}f}" for column in columns]


def _column(known: Known, column: Column) -> list[str]:
    return [_texts(record, [column])[0] for _, record in known]


def _step_ms(record: dict[str, Any]) -> float:
    return figures(record)["step_ms"] if record["status"] == "done" else float("inf")
