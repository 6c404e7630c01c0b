"""Pictures of a sweep as SVG, with a text for every mark that the page shows under the pointer.

E experts, L MoE layers, R ranks.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Tips = dict[str, Any]  # id of a mark in an SVG -> its text, or the grid that it is
PARTS = {  # of a step: colour-blind safe (Okabe and Ito)
    "exchange": "#0072B2",
    "compute": "#E69F00",
    "borrow": "#CC79A7",
    "latency": "#999999",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "grid.color": "#dddddd",
}
MAX_TICKS = 16
PANELS = (  # left edge and width, as shares: traffic and its key, load, homes and their key
    (0.04, 0.225),
    (0.27, 0.008),
    (0.36, 0.255),
    (0.665, 0.275),
    (0.945, 0.008),
)


def pareto(
    points: Sequence[tuple[int, float, float, str, str, str]], title: str, y_label: str
) -> tuple[str, Tips]:
    """Load ratio against traffic; the cells that no other beats in both are joined by a line.

    Args:
        points: number of the cell, load ratio, megabytes, placement, planner, text.
    """
    colours = dict(zip(_sorted(point[3] for point in points), COLOURS * 9, strict=False))
    markers = dict(zip(_sorted(point[4] for point in points), MARKERS * 9, strict=False))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        best = _front([(x, y) for _, x, y, *_ in points])
        axes.plot(*zip(*best, strict=True), color="#aaaaaa", linewidth=1, linestyle="--", zorder=1)
        tips: Tips = {}
        for number, x, y, placement, planner, text in points:
            (mark,) = axes.plot(
                x,
                y,
                markers[planner],
                color=colours[placement],
                markeredgecolor="white",
                markersize=9,
                zorder=2,
            )
            mark.set_gid(f"pareto-{number}")
            tips[f"pareto-{number}"] = text
        axes.set_xlabel("load ratio as planned: max / mean rows of a rank (1 is level)")
        axes.set_ylabel(y_label)
        axes.set_title(title)
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.margins(0.08)
        axes.set_ylim(bottom=0)
        handles = [_key("placement", "", "none")]
        handles += [_key(name, "o", colour) for name, colour in colours.items()]
        handles += [_key("planner", "", "none")]
        handles += [_key(name, marker, "#777777") for name, marker in markers.items()]
        handles += [Line2D([], [], color="#aaaaaa", linestyle="--", label="none is better")]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return _svg(figure), tips


def times(bars: Sequence[tuple[int, str, dict[str, float]]], title: str) -> tuple[str, Tips]:
    """Milliseconds of a step by part, one bar for every cell.

    Args:
        bars: number of the cell, its name, milliseconds by part.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.4 + 0.25 * len(bars)), layout="constrained")
        axes = figure.subplots()
        tips: Tips = {}
        left = np.zeros(len(bars))
        places = np.arange(len(bars))
        for part, colour in PARTS.items():
            widths = np.array([ms[part] for _, _, ms in bars])
            drawn = axes.barh(places, widths, 0.72, left, color=colour, label=part)
            for patch, (number, name, ms) in zip(drawn, bars, strict=True):
                patch.set_gid(f"time-{number}-{part}")
                tips[f"time-{number}-{part}"] = f"{name}\n{part}: {ms[part]:,.3f} ms"
            left += widths
        for place, total in enumerate(left):
            axes.text(total, place, f" {total:,.2f}", va="center", fontsize=8, color="#333333")
        axes.set_yticks(places, [name for _, name, _ in bars])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds of a step in the MoE layers")
        axes.margins(y=0.01)
        axes.set_xlim(right=1.13 * max(float(left.max()), 1e-9))
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
        axes.set_title(title, pad=24)
        return _svg(figure), tips


def detail(number: int, record: dict[str, Any], row_bytes: int, most_mb: float) -> tuple[str, Tips]:
    """Traffic from rank to rank, rows of every rank, and homes of the experts of one cell.

    Args:
        most_mb: end of the colour scale, common to the cells of a cluster.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(12.4, 3.7))  # in fixed places: finding them takes most of the time
        axes = [figure.add_axes((x, 0.13, width, 0.77)) for x, width in PANELS]
        tips = _traffic(axes[0], axes[1], number, record, row_bytes, most_mb)
        tips |= _load(axes[2], number, record["step"])
        tips |= _homes(axes[3], axes[4], number, record)
        return _svg(figure), tips


def _traffic(
    axes: Axes, key: Axes, number: int, record: dict[str, Any], row_bytes: int, most_mb: float
) -> Tips:
    mb_RR = np.array(record["step"]["sends_RR"]) * row_bytes / 1e6
    node_of_R, ranks = record["node_of_R"], len(mb_RR)
    shown = np.ma.masked_where(np.eye(ranks, dtype=bool), mb_RR)
    image = axes.imshow(shown, aspect="auto", cmap="YlGnBu", vmin=0, vmax=max(most_mb, 1e-9))
    image.set_gid(f"traffic-{number}")
    axes.set_facecolor("#dddddd")
    for edge in np.flatnonzero(np.diff(node_of_R)) + 0.5:
        axes.axhline(edge, color="#D55E00", linewidth=0.8)
        axes.axvline(edge, color="#D55E00", linewidth=0.8)
    for axis, label in ((axes.xaxis, "to rank"), (axes.yaxis, "from rank")):
        axis.set_ticks(_ticks(ranks))
        axis.set_label_text(label)
    axes.set_title("Tokens on their way out, MB per step")
    image.figure.colorbar(image, cax=key).outline.set_visible(False)
    values = [[round(value, 3) for value in row] for row in mb_RR.tolist()]
    return {f"traffic-{number}": {"kind": "traffic", "values": values}}


def _load(axes: Axes, number: int, step: dict[str, Any]) -> Tips:
    """Bars: mean over the layers; lines: from the layer with fewest to that with most rows."""
    planned_LR, home_LR = (np.array(step[name]) for name in ("load_LR", "load_home_LR"))
    mean_L1 = np.maximum(home_LR.mean(1, keepdims=True), 1e-300)
    ranks = np.arange(planned_LR.shape[1])
    tips: Tips = {}
    for name, load_LR, colour, shift in (
        ("at home", home_LR / mean_L1, "#b8b8b8", -0.21),
        ("as planned", planned_LR / mean_L1, "#0072B2", 0.21),
    ):
        drawn = axes.bar(ranks + shift, load_LR.mean(0), 0.42, color=colour, label=name)
        axes.vlines(ranks + shift, load_LR.min(0), load_LR.max(0), color="#333333", linewidth=0.8)
        for rank, patch in enumerate(drawn):
            gid = f"load-{number}-{rank}-{name[:2]}"
            patch.set_gid(gid)
            low, mean, high = (f(load_LR[:, rank]) for f in (np.min, np.mean, np.max))
            tips[gid] = (
                f"rank {rank}, rows {name}\nmean over layers: {mean:.3f} of a layer's mean\n"
                f"its emptiest layer: {low:.3f}, its fullest: {high:.3f}"
            )
    axes.axhline(1, color="#D55E00", linewidth=1)
    axes.set_xticks(_ticks(len(ranks)))
    axes.set_xlabel("rank")
    axes.set_ylabel("rows / mean rows of a rank")
    axes.set_title("Load of each rank; lines: its layers")
    axes.margins(x=0.02)
    axes.set_ylim(top=1.18 * max(1.0, float((home_LR / mean_L1).max())))
    axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=8)
    return tips


def _homes(axes: Axes, key: Axes, number: int, record: dict[str, Any]) -> Tips:
    home_LE = np.array(record["home_LE"])
    ranks, (layers, experts) = len(record["node_of_R"]), home_LE.shape
    image = axes.imshow(home_LE, aspect="auto", cmap=_rank_colours(ranks), interpolation="nearest")
    image.set_clim(-0.5, ranks - 0.5)
    image.set_gid(f"homes-{number}")
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.xaxis.set_ticks(_ticks(experts))
    axes.yaxis.set_ticks(_ticks(layers))
    axes.set_title(f"Home rank; {record['moved']:,} of {home_LE.size:,} moved from contiguous")
    bar = image.figure.colorbar(image, cax=key, ticks=_ticks(ranks))
    bar.outline.set_visible(False)
    return {f"homes-{number}": {"kind": "homes", "values": home_LE.tolist(), "ranks": ranks}}


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _rank_colours(ranks: int) -> ListedColormap:
    """One colour per rank, neighbours told apart."""
    base = colormaps["turbo"](np.linspace(0.05, 0.95, ranks))
    base[1::2, :3] *= 0.8
    return ListedColormap(base)


def _ticks(number: int) -> list[int]:
    step = max(1, -(-number // MAX_TICKS))
    nice = next(size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, step) if size >= step)
    return list(range(0, number, nice))


def _key(name: str, marker: str, colour: str) -> Line2D:
    return Line2D([], [], marker=marker, linestyle="", color=colour, label=name)


def _sorted(names: Iterable[str]) -> list[str]:
    """Each once, in an order that is the same for every chart of a page."""
    return sorted(set(names))


def _svg(figure: Figure) -> str:
    """The figure without what comes before its element, nor any metadata."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.patch.set_alpha(0)
    figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue()[text.getvalue().index("<svg") :]
