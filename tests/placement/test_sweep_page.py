"""The report of a sweep, as a file and in a headless browser: sorting, details, tooltips."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from placement.sweep.cell import failure, place, result_of, shape_of, simulate, topology_of
from placement.sweep.cell import load_routing as routing_of
from placement.sweep.page import write_page
from placement.sweep.run import cells_of
from placement.sweep.table import Known

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
TINY = (
    "synthetic.layers=2",
    "synthetic.experts=16",
    "synthetic.top_k=2",
    "synthetic.seq_len=32",
    "synthetic.stats_tokens=256",
    "synthetic.steps=1",
    "micro_batch=64",
    "cluster=h100_1x8",
    "shape.hidden=64",
)
PLANNERS = ("home", "quota", "least_loaded")


@pytest.fixture(scope="module")
def known() -> Known:
    """Six cells, of which one has failed with a message full of markup."""
    cells = cells_of(["-m", *TINY, "placement=random,contiguous", f"planner={','.join(PLANNERS)}"])
    records: list[dict[str, Any]] = []
    for cell in cells:
        topology, shape = topology_of(cell.config), shape_of(cell.config)
        routing = routing_of(cell.config, topology.num_ranks)
        placement, solution = place(cell.config, routing.stats, topology, shape)
        step = simulate(cell.config, placement, routing, topology, shape)
        records.append(result_of(step, placement, solution, topology))
    records[4] = failure(ValueError("no <b>such</b> file </script> & more"))
    return list(zip(cells, records, strict=True))


@pytest.fixture(scope="module")
def page(known: Known, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(known, path)
    return path


def test_everything_is_in_the_file(page: Path, known: Known) -> None:
    text = page.read_text(encoding="utf-8")
    outside = re.findall(r"(?:src|href)=[\"'](?!data:|#)[^\"']*", text)
    assert not outside, "the page must not load anything"
    assert "@import" not in text and "fetch(" not in text and "url(#" in text
    tips = json.loads(re.search(r"const TIPS = (.*);\n", text).group(1).replace("<\\/", "</"))  # type: ignore[union-attr]
    for number, (_, record) in enumerate(known):
        done = record["status"] == "done"
        assert (f'id="detail-{number}"' in text) == done == (f"traffic-{number}" in tips)
    assert all(f'id="{gid}"' in text for gid in tips), "every text belongs to a mark"
    assert tips["traffic-0"]["values"][0][1] == round(
        known[0][1]["step"]["sends_RR"][0][1] * 128 / 1e6, 3
    )
    assert "failed: no &lt;b&gt;such&lt;/b&gt; file &lt;/script&gt; &amp; more" in text
    assert len(re.findall(r"\sid=\"", text)) and "5 of 6 cells simulated" in text


def test_pictures_say_what_they_show(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for label in (
        "Traffic and load on h100_1x8 (1 x 8 ranks)",
        "MB within the node per step",
        "load ratio as planned: max / mean rows of a rank (1 is level)",
        "Where the time goes on h100_1x8 (1 x 8 ranks)",
        "milliseconds of a step in the MoE layers",
        "Tokens on their way out, MB per step",
        "rows / mean rows of a rank",
    ):
        assert f">{label}</text>" in text, label


DRIVE = """
<script>
const report = {};
function column(name) {
  const index = [...document.querySelectorAll("th")].findIndex(h => h.textContent === name);
  return [...document.querySelectorAll("tbody tr")].map(
    row => row.className === "failed" && index >= row.cells.length - 1
      ? "" : row.cells[index].textContent);
}
function press(name) {
  [...document.querySelectorAll("th button")].find(b => b.textContent === name).click();
}
function shown() {
  return [...document.querySelectorAll(".detail")].filter(d => !d.hidden).map(d => d.id);
}
function hover(id, x, y) {
  const box = document.getElementById(id).getBoundingClientRect();
  const at = {clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true};
  const inner = document.getElementById(id).querySelector("image, path, use");
  (inner || document.getElementById(id)).dispatchEvent(new MouseEvent("mousemove", at));
  return tip.style.display + ": " + tip.textContent;
}
addEventListener("load", () => {
  try {
    report.start = column("step ms");
    report.details = shown();
    press("planner");
    report.planner_up = column("planner");
    press("planner");
    report.planner_down = column("planner");
    press("load");
    report.load_up = column("load");
    press("load");
    report.load_down = column("load");
    for (const row of document.querySelectorAll("tr[aria-expanded=true]")) row.click();
    report.none = shown();
    document.querySelector('tr[data-detail="detail-2"]').dispatchEvent(
      new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
    report.one = shown();
    report.traffic = hover("traffic-2", 3.5 / 8, 1.5 / 8);
    report.stays = hover("traffic-2", 1.5 / 8, 1.5 / 8);
    report.homes = hover("homes-2", 5.5 / 16, 1.5 / 2);
    report.load_tip = hover("load-2-3-as", 0.5, 0.5);
    report.pareto = hover("pareto-0", 0.5, 0.5);
    document.body.dispatchEvent(new MouseEvent("mousemove", {bubbles: true}));
    report.away = tip.style.display;
    report.wide = document.documentElement.scrollWidth <= innerWidth;
  } catch (error) { errors.push(String(error)); }
  report.errors = errors;
  const said = document.createElement("pre");
  said.id = "said";
  said.textContent = JSON.stringify(report);
  document.body.append(said);
});
</script>
"""
WATCH = """
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
console.error = console.warn = (...what) => errors.push(what.join(" "));
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
def test_in_a_browser(page: Path, known: Known, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    driven = tmp_path / "driven.html"
    text = text.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{DRIVE}</body>")
    driven.write_text(text, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    flags += ["--window-size=1320,1000", "--virtual-time-budget=5000", "--dump-dom"]
    result = subprocess.run(
        [str(BROWSER), *flags, driven.as_uri()], capture_output=True, text=True, timeout=100
    )
    said = re.search(r'<pre id="said">(.*?)</pre>', result.stdout, re.DOTALL)
    assert said, result.stderr[-2000:]
    report = json.loads(html.unescape(said.group(1)))
    assert report["errors"] == []

    done = [record for _, record in known if record["status"] == "done"]
    times = sorted(record["step"]["seconds"] * 1e3 for record in done)
    assert report["start"] == [*(f"{ms:,.2f}" for ms in times), ""]  # what failed comes last
    assert report["planner_up"] == sorted(2 * PLANNERS)
    assert report["planner_down"] == sorted(2 * PLANNERS, reverse=True)
    loads = sorted(record["step"]["load_ratio"] for record in done)
    assert report["load_up"] == [*(f"{load:.3f}" for load in loads), ""]
    assert report["load_down"] == [*(f"{load:.3f}" for load in reversed(loads)), ""]

    assert len(report["details"]) in (1, 2) and "detail-0" in report["details"]
    assert (report["none"], report["one"]) == ([], ["detail-2"])
    cell, record = known[2]
    megabytes = record["step"]["sends_RR"][1][3] * shape_of(cell.config).row_bytes / 1e6
    assert report["traffic"].startswith("block: rank 1 to rank 3: ")
    assert float(report["traffic"].split()[-4]) == pytest.approx(megabytes, abs=6e-4)
    assert report["stays"].startswith("block: stays on rank 1: ")
    home = record["home_LE"][1][5]
    moved = "as with contiguous" if home == 2 else "rank 2 with contiguous"
    assert report["homes"] == f"block: layer 1, expert 5: rank {home} ({moved})"
    assert report["load_tip"].startswith("block: rank 3, rows as planned")
    assert "placement=random\nplanner=home" in report["pareto"] and report["away"] == "none"
    assert report["wide"], "the page is wider than the window"
