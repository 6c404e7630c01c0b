"""What a run keeps for its page: exact, bounded, and whole after a kill at any byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.decisions import Decision
from parallel.planners import LeastLoaded, home_plan
from tests.trainer.test_run import corpus, metrics, train
from trainer.page.history import (
    ARRAYS,
    MOST_POINTS,
    NAME,
    History,
    Point,
    decode,
    encode,
    rank_loads,
    read_history,
    thinned,
)


def point(step: int, ranks: int = 2) -> Point:
    """A point whose arrays tell its step."""
    generator = np.random.default_rng(step)
    return Point(
        step,
        generator.integers(0, 2**40, (3, 4)),
        generator.normal(size=(3, 4)).astype(np.float32),
        generator.integers(0, 9, (3, ranks)),
        generator.integers(0, 9, (3, ranks)),
    )


def assert_same(ours: Point, theirs: Point) -> None:
    assert ours.step == theirs.step
    for name in ARRAYS:
        left, right = getattr(ours, name), getattr(theirs, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


def test_a_point_comes_back() -> None:
    assert_same(decode(encode(point(7))), point(7))
    bare = Point(3, np.array([[0, 2**40]]))
    assert_same(decode(encode(bare)), bare)


@pytest.mark.parametrize("steps", [[1], [1, 2], list(range(5, 1005, 5))])
def test_few_steps_stay(steps: list[int]) -> None:
    assert thinned(steps, len(steps)) == steps


def test_thinned_steps_are_evenly_spaced() -> None:
    assert thinned(range(9), 5) == [0, 2, 4, 6, 8]
    dense_end = [*range(0, 100, 10), *range(100, 110)]
    kept = thinned(dense_end, 11)
    assert kept[:10] == list(range(0, 100, 10)) and kept[-1] == 109


def test_any_number_of_steps_is_bounded(tmp_path: Path) -> None:
    """Ends are kept, what is kept is unchanged, no part of the run is left out."""
    history, total = History(tmp_path / NAME, 0), 3 * MOST_POINTS
    for step in range(1, total + 1):
        history.record(point(step))
        assert len(history.steps) < MOST_POINTS
    points = read_history(tmp_path / NAME).points
    steps = [each.step for each in points]
    assert steps == history.steps and steps[0] == 1 and steps[-1] == total
    assert len(steps) >= MOST_POINTS // 2
    assert max(np.diff(steps)) <= 4 * total / MOST_POINTS
    for each in points:
        assert_same(each, point(each.step))


def test_a_kill_at_any_byte_costs_one_point(tmp_path: Path) -> None:
    path = tmp_path / NAME
    history = History(path, 0)
    history.record(point(1))
    before = path.stat().st_size
    history.record(point(2))
    whole = path.read_bytes()
    for size in range(before, len(whole)):
        path.write_bytes(whole[:size])
        resumed = History(path, 2)
        resumed.record(point(3))
        read = read_history(path)
        assert [each.step for each in read.points] == [1, 3] and read.torn == 0, size
        for each in read.points:
            assert_same(each, point(each.step))


def test_torn_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    """A half-written line, noise, and a whole line with damaged data."""
    path = tmp_path / NAME
    line = encode(point(2))
    data = line.index('"data": "') + 20
    damaged = line[:data] + ("A" if line[data] != "A" else "B") + line[data + 1 :]
    path.write_bytes((encode(point(1)) + damaged).encode() + b"\xff\x00\n" + line[:50].encode())
    read = read_history(path)
    assert [each.step for each in read.points] == [1] and read.torn == 3


def test_a_resumed_run_goes_on_from_its_step(tmp_path: Path) -> None:
    path = tmp_path / NAME
    history = History(path, 0)
    for step in (2, 4, 6, 8):
        history.record(point(step))
    resumed = History(path, 5)
    changed = dataclasses.replace(point(6), load_LE=np.ones((3, 4), np.int64))
    resumed.record(changed)
    points = read_history(path).points
    assert [each.step for each in points] == [2, 4, 6]
    assert_same(points[-1], changed)
    History(path, 0)
    assert path.read_text() == "", "a run that begins anew has no past"


def test_of_a_repeated_step_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text(encode(Point(1, np.array([[1]]))) + encode(Point(1, np.array([[2]]))))
    assert read_history(path).points[0].load_LE.tolist() == [[2]]


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with pytest.raises(ValueError, match=r"history.jsonl is missing: .*train.log_every"):
        read_history(path)
    path.write_text('{"step"\n')
    with pytest.raises(ValueError, match="holds no readable step \\(1 torn lines\\)"):
        read_history(path)
    path.write_text(encode(Point(1, np.ones((1, 2)))) + encode(Point(2, np.ones((1, 3)))))
    with pytest.raises(ValueError, match=r"in \[\(1, 2\), \(1, 3\)\]"):
        read_history(path)


def test_a_full_disk_does_not_end_a_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    history = History(folder / NAME, 0)
    (folder / NAME).unlink()
    folder.rmdir()
    for step in (1, 2):
        history.record(point(step))
    assert len(caplog.records) == 1 and "training goes on" in caplog.text


@pytest.mark.parametrize("planned", [True, False])
def test_rank_loads_are_those_of_the_plans(planned: bool) -> None:
    """Row by row: three layers, two micro-batches, four ranks, homes that are no blocks."""
    generator = torch.Generator().manual_seed(0)
    home_LE = torch.stack([torch.randperm(8, generator=generator) % 4 for _ in range(3)])
    planner = LeastLoaded(alpha=1.1, min_rows=1) if planned else home_plan
    decisions = []
    for _ in range(2):
        for layer in range(3):
            counts_RE = torch.randint(0, 40, (4, 8), generator=generator) ** 2
            plan = planner(counts_RE, home_LE[layer])
            decisions.append(Decision(layer, counts_RE, plan))
    home_LR, planned_LR = rank_loads(decisions, home_LE, 4)
    expected_home, expected_plan = np.zeros((3, 4), np.int64), np.zeros((3, 4), np.int64)
    for decision in decisions:
        for expert in range(8):
            home = int(home_LE[decision.layer, expert])
            for source in range(4):
                expected_home[decision.layer, home] += int(decision.counts_RE[source, expert])
        for _, _, computing, rows in decision.plan.rows.tolist():
            expected_plan[decision.layer, computing] += rows
    np.testing.assert_array_equal(home_LR, expected_home)
    np.testing.assert_array_equal(planned_LR, expected_plan)
    assert (home_LR == planned_LR).all() != planned


@pytest.mark.slow
def test_a_run_records_what_it_measured(tmp_path: Path) -> None:
    """Two ranks, one micro-batch: history and metrics say the same; killed and resumed."""
    run_dir, text = tmp_path / "run", corpus(tmp_path / "text")
    settings = ["planner=least_loaded", "checkpoint.export=false", "train.log_every=2"]
    settings += ["train.micro_batch_size=4", "train.steps=5", "checkpoint.every=3"]
    settings += ["model=tiny_sigmoid", "balance=loss_free"]
    settings += ["relocate.every=4", "stats.every=1", "relocate.pays_within=null"]
    train(text, run_dir, 2, *settings)
    with (run_dir / NAME).open("a") as file:
        file.write('{"step": 6, "load_LE"')
    train(text, run_dir, 2, *settings, "train.steps=8")
    read = read_history(run_dir / NAME)
    assert [each.step for each in read.points] == [2, 4, 5, 6, 8] and read.torn == 0
    measured = {record["step"]: record for record in metrics(run_dir)}
    for each in read.points:
        record, load_LE = measured[each.step], each.load_LE
        assert load_LE.sum() == record["moe/rows"]
        violation = (load_LE.max(1) / load_LE.mean(1) - 1).mean()
        assert violation == pytest.approx(record["moe/max_violation_global"])
        for name, load_LR in (("", each.planned_LR), ("_home", each.home_LR)):
            assert load_LR is not None
            np.testing.assert_array_equal(load_LR.sum(1), load_LE.sum(1))
            ratio = (load_LR.max(1) / load_LR.mean(1)).mean()
            assert ratio == pytest.approx(record[f"moe/load_ratio{name}"]), each.step
        assert each.bias_LE is not None
        spread = float(np.ptp(each.bias_LE, axis=1).max())
        assert 0 < spread == pytest.approx(record["balance/bias_range"], rel=1e-5)
    assert measured[8]["moe/moved_experts"] > 0, "relocation must have something to say"
