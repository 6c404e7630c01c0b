"""The report of a sweep: one HTML file with everything in it, for any browser, without network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from placement.sweep.cell import Cell, shape_of
from placement.sweep.plots import Tips, detail, pareto, times
from placement.sweep.table import COLUMNS, Known, figures, names, note

TEMPLATE = Path(__file__).with_suffix(".html")
MAX_BARS, MAX_DETAILS = 24, 40  # the fastest of a cluster, of all; the table has all cells
PARTS = ("exchange", "compute", "borrow", "latency")


def write_page(known: Known, path: Path) -> None:
    """Write the page of a sweep's cells and their records."""
    tips: Tips = {}
    labels = [", ".join(f"{k}={v}" for k, v in name.items()) for name in names(known)]
    done = [(n, cell, r) for n, (cell, r) in enumerate(known) if r["status"] == "done"]
    done.sort(key=lambda each: each[2]["step"]["seconds"])
    parts = {
        "SUMMARY": _summary(known, done, labels),
        "CHARTS": _charts(done, labels, tips),
        "TABLE": _table(known, {number for number, _, _ in done[:MAX_DETAILS]}),
        "DETAILS": _details(done[:MAX_DETAILS], labels, tips),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, content in parts.items():
        text = text.replace(f"<!--{name}-->", content)
    # "</" would end the script
    text = text.replace("/*TIPS*/", json.dumps(tips).replace("</", "<\\/"))
    path.write_text(text, encoding="utf-8")


def _summary(known: Known, done: Sequence[tuple[int, Cell, Any]], labels: Sequence[str]) -> str:
    config = known[0][0].config
    routing = "made-up routing"
    if config.trace is not None or config.stats is not None:
        routing = f"routing of {config.trace or config.stats}"
    lines = [f"{len(done)} of {len(known)} cells simulated, {routing}."]
    if done:
        number, _, record = done[0]
        ms = figures(record)["step_ms"]
        lines.append(f"Fastest: <strong>{html.escape(labels[number])}</strong>, {ms:,.2f} ms.")
    lines.append(
        "Times are of the MoE layers of a mean optimizer step, each part as long as its busiest "
        "rank or link; planning and overlap are not in them."
    )
    if len(done) > MAX_DETAILS:
        lines.append(f"Pictures of ranks and experts are of the {MAX_DETAILS} fastest cells.")
    return "".join(f"<p>{line}</p>" for line in lines)


def _charts(done: Sequence[tuple[int, Cell, Any]], labels: Sequence[str], tips: Tips) -> str:
    """For every cluster: traffic against load, and the parts of the fastest cells' time."""
    pictures = []
    clusters: dict[str, list[tuple[int, Cell, Any]]] = {}
    for each in done:
        clusters.setdefault(_cluster(each[1]), []).append(each)
    for cluster, members in clusters.items():
        one_node = len(set(members[0][2]["node_of_R"])) == 1
        key, where = ("within_mb", "within the node") if one_node else ("across_mb", "across nodes")
        points = [
            (n, figures(r)["load"], figures(r)[key], cell.choices["placement"],
             cell.choices["planner"], _tip(labels[n], r))
            for n, cell, r in members
        ]  # fmt: skip
        title = f"Traffic and load on {cluster}"
        pictures.append(_add(pareto(points, title, f"MB {where} per step"), tips))
        bars = [
            (n, _short(labels[n]), {part: figures(r)[f"{part}_ms"] for part in PARTS})
            for n, _, r in members[:MAX_BARS]
        ]
        which = f", the {MAX_BARS} fastest cells" if len(members) > MAX_BARS else ""
        pictures.append(_add(times(bars, f"Where the time goes on {cluster}{which}"), tips))
    return "".join(f"<figure>{picture}</figure>" for picture in pictures)


def _short(label: str) -> str:
    """The values of a label without keys and cluster."""
    parts = [part for part in label.split(", ") if not part.startswith("cluster")]
    return ", ".join(part.partition("=")[2] for part in parts) or label


def _cluster(cell: Cell) -> str:
    """Name and size of a cell's cluster, with what the command line changed in it."""
    cluster = cell.config.cluster
    changed = [f"{k}={v}" for k, v in cell.name.items() if k.startswith("cluster.")]
    size = f"{cluster.num_nodes} x {cluster.ranks_per_node} ranks"
    return ", ".join([f"{cell.choices['cluster']} ({size})", *changed])


def _tip(label: str, record: dict[str, Any]) -> str:
    lines = [label.replace(", ", "\n")]
    values = figures(record)
    for column in COLUMNS:
        lines.append(f"{column.heading}: {values[column.key]:,.{column.digits}f}")
    return "\n".join(lines)


def _table(known: Known, detailed: set[int]) -> str:
    labels = names(known)
    heads = [f'<th><button type="button">{html.escape(key)}</button></th>' for key in labels[0]]
    heads += [
        f'<th class="number" title="{html.escape(column.text)}">'
        f'<button type="button">{column.heading}</button></th>'
        for column in COLUMNS
    ]
    heads.append('<th><button type="button">note</button></th>')
    rows = []
    for number, (label, (_, record)) in enumerate(zip(labels, known, strict=True)):
        cells = [f"<td>{html.escape(value)}</td>" for value in label.values()]
        if record["status"] == "done":
            values = figures(record)
            cells += [
                f'<td class="number" data-value="{values[column.key]!r}">'
                f"{values[column.key]:,.{column.digits}f}</td>"
                for column in COLUMNS
            ]
        span = "" if record["status"] == "done" else f' colspan="{len(COLUMNS) + 1}"'
        cells.append(f'<td class="note"{span}>{html.escape(note(record))}</td>')
        opens = f' tabindex="0" data-detail="detail-{number}"' if number in detailed else ""
        rows.append(f'<tr class="{record["status"]}"{opens}>{"".join(cells)}</tr>')
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _details(done: Sequence[tuple[int, Cell, Any]], labels: Sequence[str], tips: Tips) -> str:
    most: dict[str, float] = {}  # megabytes from rank to rank, on one scale per cluster
    for _, cell, record in done:
        apart = [
            rows * shape_of(cell.config).row_bytes / 1e6
            for source, row in enumerate(record["step"]["sends_RR"])
            for receiver, rows in enumerate(row)
            if source != receiver
        ]
        most[_cluster(cell)] = max(most.get(_cluster(cell), 0.0), *apart, 0.0)
    sections = []
    for number, cell, record in done:
        row_bytes = shape_of(cell.config).row_bytes
        picture = _add(detail(number, record, row_bytes, most[_cluster(cell)]), tips)
        sections.append(
            f'<section class="detail" id="detail-{number}" hidden>'
            f"<h3>{html.escape(labels[number])}</h3>{picture}</section>"
        )
    return "".join(sections)


def _add(picture: tuple[str, Tips], tips: Tips) -> str:
    svg, more = picture
    tips |= more
    return svg
