"""The page of a run, or of two side by side: one HTML file, for any browser, without network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from trainer.page.content import content

FOLDER = Path(__file__).parent
STATS_HINT = (
    "No routing statistics in this run. Record them with stats.every=10 and save checkpoints: "
    "python -m trainer.train ... stats.every=10"
)


def write_page(run_dirs: Sequence[Path], path: Path) -> None:
    """Write the page of one run, or of several side by side on the same scales.

    Raises:
        ValueError: if one of the folders is no run, or what the page needs is missing or torn.
    """
    runs = [content(run_dir) for run_dir in run_dirs]
    data = json.dumps({"runs": runs, "stats_hint": STATS_HINT}, allow_nan=False)
    names = " and ".join(run["name"] for run in runs)
    parts = {
        "<!--TITLE-->": html.escape(names),
        "/*STYLE*/": _file("page.css"),
        "/*PLOTLY*/": get_plotlyjs(),
        "/*FIGURES*/": _file("figures.js"),
        "/*PAGE*/": _file("page.js"),
        "/*DATA*/": data.replace("<", "\\u003c"),  # "</" would end the script
    }
    text = _file("page.html")
    for mark, part in parts.items():
        before, after = text.split(mark)
        text = f"{before}{part}{after}"
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _file(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
