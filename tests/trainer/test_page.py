"""The page of a run: what is packed for it, the command, and the file itself."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.page_runs import COMPARED, ROOT, RUN, MadeRun, data_of, make_run
from trainer.page.command import main
from trainer.page.content import CURVES, MOST_VALUES, content, packed, shares, smallest_dtype
from trainer.page.history import NAME


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("runs") / "one <script> & <b>", RUN)


def report(*arguments: object) -> int:
    """The exit code of the command."""
    return main([str(argument) for argument in arguments])


def unpack(packed_array: dict[str, Any], at: int) -> Any:
    data = base64.b64decode(packed_array["data"][at])
    return np.frombuffer(data, np.dtype(packed_array["dtype"]).newbyteorder("<"))


@pytest.mark.parametrize(
    ("most", "dtype"),
    [(0, "uint8"), (255, "uint8"), (256, "uint16"), (65536, "uint32"), (2**32, "float64")],
)
def test_counts_are_packed_exactly(most: int, dtype: str) -> None:
    counts = np.array([[most, 0], [1, most]])
    array = packed(counts.astype(smallest_dtype(counts)))
    assert array["dtype"] == dtype
    assert [unpack(array, at).tolist() for at in range(2)] == counts.tolist()


def test_shares_are_those_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    counts, of = generator.integers(0, 50, (6, 6)).astype(float), np.array([7.0, 80, 0, 9, 100, 60])
    levels, largest = shares(counts, of)
    exact = [[counts[e, f] / of[e] if of[e] else 0.0 for f in range(6)] for e in range(6)]
    assert largest == max(map(max, exact)) and levels.max() == 255
    np.testing.assert_allclose(levels * largest / 255, exact, atol=largest / 509)
    assert shares(np.zeros((2, 2)), np.zeros(2))[1] == 0.0


def test_content_is_what_the_run_recorded(made: MadeRun) -> None:
    shown = content(made.path)
    points, layers, experts = made.points, RUN.layers, RUN.experts
    assert (shown["layers"], shown["experts"], shown["torn"]) == (layers, experts, 0)
    assert shown["steps"] == [point.step for point in points]
    for at, point in enumerate(points):
        assert point.bias_LE is not None and point.home_LR is not None
        np.testing.assert_array_equal(unpack(shown["load"], at), point.load_LE.ravel())
        np.testing.assert_array_equal(unpack(shown["ranks"]["home"], at), point.home_LR.ravel())
        for layer in range(layers):
            load_E = point.load_LE[layer]
            violation = load_E.max() / (load_E.sum() / experts) - 1
            assert unpack(shown["violation"], layer)[at] == pytest.approx(violation, rel=1e-6)
            biases_PE = unpack(shown["bias"], layer).reshape(len(points), experts)
            np.testing.assert_array_equal(biases_PE[at], point.bias_LE[layer])


def test_matrices_are_shares_of_the_trace(made: MadeRun) -> None:
    """Token by token: chosen together, chosen next, and rows by domain."""
    ids_TLK, routing = made.ids_TLK, content(made.path)["routing"]
    experts, (tokens, layers, _) = RUN.experts, made.ids_TLK.shape
    for layer in range(layers):
        together, chosen = np.zeros((experts, experts)), np.zeros(experts)
        after, by_domain = np.zeros((experts, experts)), np.zeros((2, experts))
        for token in range(tokens):
            for first in ids_TLK[token, layer]:
                chosen[first] += 1
                by_domain[token % 2, first] += 1
                for second in ids_TLK[token, layer]:
                    together[first, second] += first != second
                if layer + 1 < layers:
                    for second in ids_TLK[token, layer + 1]:
                        after[first, second] += 1
        expected = {"coactive": together / chosen[:, None]}
        if layer + 1 < layers:
            expected["affinity"] = after / after.sum(1, keepdims=True)
        for name, share in expected.items():
            largest = routing[name]["largest"][layer]
            levels = unpack(routing[name], layer).reshape(experts, experts)
            np.testing.assert_allclose(levels * largest / 255, share, atol=largest / 509)
        shown = unpack(routing["domains"], layer).reshape(2, experts)
        np.testing.assert_allclose(shown, by_domain / by_domain.sum(1, keepdims=True), rtol=1e-6)
    assert routing["domains"]["names"] == ["text", "</script>"]
    assert len(routing["affinity"]["data"]) == layers - 1


def test_long_curves_are_thinned_and_gaps_stay(made: MadeRun, tmp_path: Path) -> None:
    count = 5 * MOST_VALUES
    records = [{"step": step, "train/loss": "nan" if step == 1 else step} for step in range(count)]
    records[0]["train/loss"] = "inf"
    lines = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 9'
    run_dir = make_run(tmp_path / "run", RUN).path
    (run_dir / "metrics.jsonl").write_text(lines)
    (chart,) = content(run_dir)["curves"]
    steps, values = chart["lines"][0]["steps"], chart["lines"][0]["values"]
    assert chart["title"] in CURVES and len(steps) == len(values) == MOST_VALUES
    assert (steps[0], steps[-1], values[0]) == (0, count - 1, None)
    assert list(values[1:]) == list(steps[1:]) and set(np.diff(steps)) == {5, 6}
    (run_dir / "metrics.jsonl").unlink()
    assert content(run_dir)["curves"] == []


def test_everything_is_in_the_file(made: MadeRun) -> None:
    command = [sys.executable, "-m", "trainer.report", str(made.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path = made.path / "report.html"
    assert done.stdout == f"report: {path.as_uri()}\n"
    text = path.read_text(encoding="utf-8")
    assert "<title>" in text and "one &lt;script&gt; &amp; &lt;b&gt;" in text
    assert data_of(path)["runs"][0] == json.loads(json.dumps(content(made.path)))
    own = re.sub(r"<script>.*?plotly.*?</script>", "", text, count=1, flags=re.DOTALL)
    assert len(own) < len(text) / 10, "the library is in the page, once"
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)[^\"']*", own)
    assert "@import" not in own and "fetch(" not in own and "url(" not in own


def test_two_runs_and_a_place_of_ones_own(made: MadeRun, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", COMPARED).path
    assert report(made.path, "--compare", other) == 0
    names = [run["name"] for run in data_of(made.path / "compare-other.html")["runs"]]
    assert names == [str(made.path), str(other)]
    assert report(other, "--output", tmp_path / "here.html") == 0
    assert (tmp_path / "here.html").exists() and not (other / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", None, "is no run: it has no config.yaml; give the folder"),
        ("config.yaml", "{torn", "config.yaml is not a run's configuration"),
        (NAME, None, "history.jsonl is missing: the run has no recorded history"),
        (NAME, '{"step": 1, "load_LE"', "holds no readable step (1 torn lines)"),
        ("summary.json", '{"steps": 3', "summary.json is not readable"),
        ("summary.json", "[1]", "summary.json is not readable"),
        ("stats/step-00000010.npz", "PK", "step-00000010.npz: not a readable statistics file"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    text: str | None,
    message: str,
) -> None:
    run_dir = make_run(tmp_path / "run", RUN).path
    (run_dir / file).unlink(missing_ok=True)
    if text is not None:
        (run_dir / file).write_text(text)
    assert report(run_dir) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error and not (run_dir / "report.html").exists()


def test_a_folder_that_is_not_there(
    made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(tmp_path / "nowhere") == 2
    assert report(made.path, "--compare", tmp_path) == 2
    assert f"{tmp_path} is no run" in capsys.readouterr().err
    assert report(made.path, "--output", tmp_path / "no" / "folder.html") == 2
    with pytest.raises(SystemExit, match="2"):
        report()
