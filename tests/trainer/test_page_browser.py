"""The page of a run in a headless browser: elements, keys, both sliders, scales, time to open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.browser import BROWSER, Page
from tests.trainer.page_runs import COMPARED, LARGE, RUN, MadeRun, make_run
from trainer.page.history import NAME, Point, encode
from trainer.page.page import write_page

SECTIONS = [
    "load",
    "ranks",
    "curves",
    "violation",
    "bias",
    "dead",
    "coactive",
    "affinity",
    "domains",
]
PLOTS = ["load", "ranks", "ratios", "violation", "bias", "coactive", "affinity"]
OPENS_WITHIN_S = 3.0

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("runs") / "one <script> & <b>", RUN)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("runs") / "other", COMPARED)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def one(browser: Page, made: MadeRun) -> Page:
    return opened(browser, made)


@pytest.fixture
def two(browser: Page, made: MadeRun, other: MadeRun) -> Page:
    return opened(browser, made, other)


def opened(page: Page, *runs: MadeRun) -> Page:
    path = runs[0].path / f"{len(runs)}.html"
    write_page([run.path for run in runs], path)
    page.events.clear()
    page.open(path)
    return page


def trace(page: Page, plot: str, what: str) -> Any:
    """What an expression says about `t`, the first trace of a figure."""
    return page.evaluate(f"(t => {what})(document.getElementById('{plot}').data[0])")


def shown_rows(page: Page, plot: str) -> list[list[int]]:
    """Rows of every layer and expert that the heat-map tells under the pointer."""
    texts = trace(page, plot, "t.customdata.map(row => row.map(cell => cell[0]))")
    return [[int(text.replace(",", "")) for text in row] for row in texts]


def focus(page: Page, slider: str) -> None:
    page.evaluate(f"document.getElementById('{slider}').focus()")


def text_of(page: Page, element: str) -> str:
    return page.evaluate(f"document.getElementById('{element}').textContent")


def test_all_is_there_and_nothing_is_asked_for(one: Page, made: MadeRun) -> None:
    for section in SECTIONS:
        assert one.evaluate(f"document.querySelector('h2#{section}') !== null"), section
    for plot in PLOTS:
        selector = f"#{plot}-0 .main-svg"
        assert one.evaluate(f"document.querySelector('{selector}') !== null"), plot
        assert one.evaluate(f"document.getElementById('{plot}-0').getAttribute('aria-label')")
    assert one.evaluate("document.querySelectorAll('[id^=curve-0-] .main-svg').length") >= 4
    assert one.evaluate("document.querySelectorAll('.gtitle').length") == 4
    assert one.evaluate("document.querySelector('h1').textContent") == "Training run"
    assert str(made.path) in text_of(one, "facts")
    assert "1.9, 1.05" in text_of(one, "facts") and "validation" not in text_of(one, "facts")
    assert one.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert one.complaints() == [] and len(one.requests()) == 1


def test_arrow_keys_move_through_the_steps(one: Page, made: MadeRun) -> None:
    """Real key presses; heat-map, sentence and ranks follow, step by step."""
    last = len(made.points) - 1
    focus(one, "step")
    for at, keys in ((last, ()), (last - 1, ("ArrowLeft",)), (0, ("Home",)), (1, ("ArrowRight",))):
        for key in keys:
            one.press(key)
        point, load_LE = made.points[at], made.points[at].load_LE
        assert text_of(one, "step-text") == f"{point.step} ({at + 1} of {last + 1})"
        assert shown_rows(one, "load-0") == load_LE.tolist()
        ratios_LE = load_LE / load_LE.mean(1, keepdims=True)
        z = trace(one, "load-0", "t.z.map(row => [...row])")
        for layer in range(RUN.layers):
            for expert in range(RUN.experts):
                value, ratio = z[layer][expert], ratios_LE[layer, expert]
                if ratio == 0:
                    assert value is None, "an expert without rows has a colour of its own"
                else:
                    assert value == pytest.approx(np.clip(np.log2(ratio), -3, 3))
        layer, expert = np.unravel_index(ratios_LE.argmax(), ratios_LE.shape)
        sentence = text_of(one, "load-text-0")
        assert f"expert {expert} of layer {layer} is the fullest" in sentence
        assert f"{ratios_LE.max():.2f} times" in sentence
        assert f"Experts without rows: {(load_LE == 0).sum()}" in sentence
        assert f"MaxVio, mean over layers: {(ratios_LE.max(1) - 1).mean():.3f}" in sentence
        home_LR = point.home_LR
        assert home_LR is not None
        shown = trace(one, "ranks-0", "t.y")
        assert shown == pytest.approx((home_LR[0] / home_LR[0].mean()).tolist())
        ratios = trace(one, "ratios-0", "t.y")
        assert ratios == pytest.approx((home_LR.max(1) / home_LR.mean(1)).tolist())
    assert one.complaints() == []


def test_dead_experts_have_a_step_since_which(one: Page) -> None:
    assert text_of(one, "dead-0").endswith("011 (30)")  # layer 0, one expert, number 1 since 30
    focus(one, "step")
    one.press("Home")
    assert text_of(one, "dead-0") == "Every expert has rows at this step."


def test_arrow_keys_move_through_the_layers(one: Page, made: MadeRun) -> None:
    focus(one, "layer")
    one.press("ArrowRight", 2)
    layer, experts = 2, RUN.experts
    assert text_of(one, "layer-text") == "2"
    chosen, together = np.zeros(experts), np.zeros((experts, experts))
    after = np.zeros((experts, experts))
    for token_LK in made.ids_TLK:
        for first in token_LK[layer]:
            chosen[first] += 1
            for second in token_LK[layer]:
                together[first, second] += first != second
            for second in token_LK[layer + 1]:
                after[first, second] += 1
    expected = {
        "coactive-0": together / chosen[:, None],
        "affinity-0": after / after.sum(1, keepdims=True),
    }
    for plot, share in expected.items():
        shown = trace(one, plot, "t.z.map(row => [...row])")
        np.testing.assert_allclose(shown, share, atol=share.max() / 500)
    biases: dict[int, list[float]] = {}  # by expert, from the lines that share a colour
    for line in one.evaluate("document.getElementById('bias-0').data.map(t => ({...t}))"):
        for expert, value in zip(line["customdata"], line["y"], strict=True):
            if expert is not None:
                biases.setdefault(expert, []).append(value)
    for expert in range(experts):
        exact = [float(p.bias_LE[layer, expert]) for p in made.points if p.bias_LE is not None]
        assert biases[expert] == pytest.approx(exact)
    assert one.evaluate("document.querySelectorAll('#domains-0 tbody tr').length") == experts
    outline = one.evaluate("document.getElementById('load-0').layout.shapes[0].y0")
    assert outline == layer - 0.5
    one.press("End")
    assert text_of(one, "layer-text") == str(RUN.layers - 1) and one.complaints() == []


def test_every_control_is_reached_by_the_tab_key(one: Page) -> None:
    one.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(8):
        one.press("Tab")
        element = "document.activeElement"
        reached.append(one.evaluate(f"{element}.id || {element}.className"))
    assert reached[:5] == ["skip", "step", "layer", "dead-0", "domains-0"]
    names = "[...document.querySelectorAll('input')].map(i => i.labels[0].textContent)"
    assert one.evaluate(names) == ["Step", "Layer"]


def test_two_runs_have_the_same_scales(two: Page, made: MadeRun, other: MadeRun) -> None:
    """Runs of other steps, layers and experts: each shows its newest step at or before."""
    pairs = [("ranks", "yaxis"), ("ratios", "yaxis"), ("bias", "xaxis"), ("bias", "yaxis")]
    pairs += [("curve", "xaxis"), ("curve", "yaxis"), ("violation", "xaxis")]
    for plot, axis in pairs:
        names = [f"{plot}-{at}" + ("-0" if plot == "curve" else "") for at in (0, 1)]
        ranges = [
            two.evaluate(f"document.getElementById('{name}').layout.{axis}.range") for name in names
        ]
        assert ranges[0] == pytest.approx(ranges[1]) and None not in ranges, (axis, plot)
    for plot in ("violation", "coactive", "affinity", "load"):
        ends = [trace(two, f"{plot}-{at}", "[t.zmin, t.zmax]") for at in (0, 1)]
        assert ends[0] == ends[1]
    largest = max(
        float((p.load_LE.max(1) / p.load_LE.mean(1) - 1).max())
        for run in (made, other)
        for p in run.points
    )
    assert trace(two, "violation-0", "t.zmax") == pytest.approx(largest)
    steps = sorted({p.step for run in (made, other) for p in run.points})
    focus(two, "step")
    two.press("Home")
    for at, step in enumerate(steps):
        assert text_of(two, "step-text") == f"{step} ({at + 1} of {len(steps)})"
        for number, run in enumerate((made, other)):
            before = [p for p in run.points if p.step <= step] or run.points[:1]
            assert shown_rows(two, f"load-{number}") == before[-1].load_LE.tolist()
        two.press("ArrowRight")
    focus(two, "layer")
    two.press("End")
    assert two.evaluate("runs.map(run => run.layer)") == [RUN.layers - 1, COMPARED.layers - 1]
    assert two.complaints() == [] and len(two.requests()) == 1


def test_dark_follows_the_system(one: Page) -> None:
    papers = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        one.call("Emulation.setEmulatedMedia", features=features)
        one.settled()
        body = one.evaluate("getComputedStyle(document.body).backgroundColor")
        papers.append(one.evaluate("document.getElementById('load-0').layout.paper_bgcolor"))
        low = int(papers[-1][1:3], 16)
        assert body == f"rgb({', '.join(str(int(papers[-1][i : i + 2], 16)) for i in (1, 3, 5))})"
        assert low > 200 if scheme == "light" else low < 50
        ink = one.evaluate("colour('--quiet')")
        assert contrast(ink, papers[-1]) >= 4.5
    one.call("Emulation.setEmulatedMedia", features=[])
    assert papers[0] != papers[1] and one.complaints() == []


def contrast(ink: str, paper: str) -> float:
    """Contrast ratio of two colours #rrggbb (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)


def test_what_a_run_lacks_is_said(browser: Page, tmp_path: Path) -> None:
    """One rank, no bias, no statistics, no metrics."""
    bare = make_run(tmp_path / "bare", RUN)
    for path in (*bare.path.glob("stats/*"), bare.path / "metrics.jsonl"):
        path.unlink()
    lines = [encode(Point(p.step, p.load_LE)) for p in bare.points]
    (bare.path / NAME).write_text("".join(lines))
    page = opened(browser, bare)
    text = text_of(page, "sections")
    for message in (
        "One rank has all experts",
        "No curves: the run has no metrics.jsonl",
        "The routers of this run have no selection bias",
        "Record them with stats.every=10",
    ):
        assert message in text
    assert shown_rows(page, "load-0") == bare.points[-1].load_LE.tolist()
    assert page.complaints() == []


@pytest.mark.slow
def test_a_large_run_opens_within_three_seconds(browser: Page, tmp_path: Path) -> None:
    """58 layers x 256 experts x 100 steps: the best of three, as other work slows a machine."""
    large = make_run(tmp_path / "large", LARGE)
    write_page([large.path], tmp_path / "large.html")
    seconds = min(browser.open(tmp_path / "large.html") for _ in range(3))
    size = (tmp_path / "large.html").stat().st_size / 1e6
    drawn = browser.evaluate("document.documentElement.dataset.ready")
    print(f"{size:.0f} MB, {seconds:.2f} s, drawn after {drawn} ms, load {os.getloadavg()[0]}")
    assert seconds < OPENS_WITHIN_S
    focus(browser, "step")
    browser.press("ArrowLeft")
    assert text_of(browser, "step-text") == "990 (99 of 100)"
    assert shown_rows(browser, "load-0") == large.points[98].load_LE.tolist()
    assert browser.complaints() == []
