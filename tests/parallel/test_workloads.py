"""Workloads of the imbalance benchmark, its arithmetic, and the command at a tiny size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.sizing.live import LiveBytes
from parallel.plan import DispatchPlan
from tests.benchmarks import imbalance
from tests.benchmarks.imbalance_figures import (
    EVEN,
    HOME,
    TARGETS,
    Cell,
    PlanFacts,
    RankRecord,
    Sample,
    relative_error,
    summarize,
    verdicts,
)
from tests.benchmarks.imbalance_ranks import TOLERANCE, difference, typical
from tests.benchmarks.workloads import (
    RoutingShape,
    Workload,
    grid_cell,
    grid_names,
    public_workloads,
    recording,
    workload,
)

SHAPE = RoutingShape(num_ranks=8, num_experts=32, top_k=2, tokens=48)
MANY = RoutingShape(num_ranks=4, num_experts=64, top_k=6, tokens=20)
W = [f"W{number}" for number in range(8)]


def max_over_mean(counts: np.ndarray) -> float:
    return float(counts.max() / counts.mean())


def rank_rows(load: Workload, seed: int = 0, step: int = 0) -> np.ndarray:
    """Rows of every rank, if homes are contiguous."""
    return load.counts(seed, step).sum(0).reshape(load.shape.num_ranks, -1).sum(1)


@pytest.mark.parametrize("shape", [SHAPE, MANY], ids=["E32", "E64"])
def test_tokens_choose_distinct_experts_and_none_is_lost(shape: RoutingShape) -> None:
    for name in [*W, *grid_names(shape)]:
        load = workload(name, shape)
        for step in range(4):
            ids = load.draw(3, step)
            assert len(ids) == shape.num_ranks, name
            every = np.concatenate(ids)
            assert every.dtype == np.int64
            assert every.shape == (load.shape.all_tokens, load.shape.top_k), name
            assert every.min() >= 0 and every.max() < shape.num_experts, name
            ordered = np.sort(every, axis=1)
            assert (ordered[:, 1:] != ordered[:, :-1]).all(), name


@pytest.mark.parametrize("name", [*W, "80:4@1", "95:1@0"])
def test_routing_follows_from_workload_seed_and_step_alone(name: str) -> None:
    first, again = (np.concatenate(workload(name, SHAPE).draw(5, 2)) for _ in range(2))
    assert (first == again).all()
    load = workload(name, SHAPE)
    for seed, step in ((6, 2), (5, 3)):
        same = (np.concatenate(load.draw(seed, step)) == first).all()
        assert same == (name == "W0")


@pytest.mark.parametrize(
    ("tokens", "top_k", "published"),
    [
        (128, 2, {"W0": 1.0, "W1": 3.312, "W2": 3.219, "W5": 2.156, "W6": 3.312}),
        (512, 4, {"W0": 1.0, "W1": 1.781, "W2": 1.770, "W5": 2.0, "W6": 1.770}),
    ],
)
def test_experts_are_as_hot_as_published(
    tokens: int, top_k: int, published: dict[str, float]
) -> None:
    loads = public_workloads(RoutingShape(4, 8, top_k, tokens))
    for name, expected in published.items():
        found = max_over_mean(loads[name].counts(0, 0).sum(0))
        exact = expected in (1.0, 2.0)
        assert found == pytest.approx(expected, rel=0 if exact else 0.05), name
    # W3 is as hot as W1 here; W4 and the steady steps of W7 have no hot experts at all
    assert max_over_mean(loads["W3"].counts(0, 0).sum(0)) == pytest.approx(
        published["W1"], rel=0.05
    )
    for name in ("W4", "W7"):
        assert max_over_mean(loads[name].counts(0, 0).sum(0)) < 1.25


def test_what_each_workload_separates() -> None:
    shape = RoutingShape(8, 32, 2, 256)
    loads = public_workloads(shape)
    hot_rows = 0.75 + 0.25 / 8
    assert (rank_rows(loads["W0"]) == 512).all()
    assert max_over_mean(rank_rows(loads["W2"])) == pytest.approx(8 * hot_rows, rel=0.02)
    assert max_over_mean(rank_rows(loads["W3"])) == pytest.approx(1.75, rel=0.1)
    heat = [max_over_mean(loads[name].counts(0, 0).sum(0)) for name in ("W1", "W2", "W3")]
    assert max(heat) / min(heat) < 1.1
    hot_sets = {seed: set(np.argsort(loads["W1"].counts(seed, 0).sum(0))[-4:]) for seed in range(3)}
    assert len({frozenset(hot) for hot in hot_sets.values()}) == 3
    for seed, hot in hot_sets.items():
        assert set(np.argsort(loads["W1"].counts(seed, 9).sum(0))[-4:]) == hot

    sources = [len(ids) for ids in loads["W4"].draw(0, 0)]
    assert sources == [32, 96, 160, 224, 288, 352, 416, 480]
    assert max_over_mean(rank_rows(loads["W4"])) < 1.1
    assert (loads["W5"].counts(0, 0)[:, :16] == 0).all()

    hottest = [int(rank_rows(loads["W6"], step=step).argmax()) for step in range(27)]
    assert hottest == [step // 3 % 8 for step in range(27)]
    assert [loads["W6"].part(step) for step in range(4)] == ["move", "stay", "stay", "move"]
    ratios = [max_over_mean(rank_rows(loads["W7"], step=step)) for step in range(8)]
    burst = [loads["W7"].part(step) == "burst" for step in range(8)]
    assert burst == [False, False, False, True] * 2
    assert burst == [ratio > 4 for ratio in ratios]
    assert max(ratio for ratio, b in zip(ratios, burst, strict=True) if not b) < 1.15


def test_uneven_sources_keep_every_token() -> None:
    for num_ranks, tokens in ((1, 5), (3, 7), (8, 1)):
        load = public_workloads(RoutingShape(num_ranks, 24, 2, tokens))["W4"]
        assert sum(len(ids) for ids in load.draw(0, 0)) == num_ranks * tokens


@pytest.mark.parametrize("name", grid_names(RoutingShape(8, 128, 4, 64)))
def test_cells_hold_exactly_the_rows_of_their_name(name: str) -> None:
    shape = RoutingShape(8, 128, 4, 64)
    load = grid_cell(name, shape)
    percent, hot = (int(text) for text in name.partition("@")[0].split(":"))
    place = name.partition("@")[2]
    counts_E = load.counts(1, 2).sum(0)
    assert counts_E.sum() == shape.all_tokens * shape.top_k
    assert load.shape.top_k == min(hot, shape.top_k)
    hottest = np.argsort(-counts_E, kind="stable")[:hot]
    assert counts_E[hottest].sum() == round(percent * counts_E.sum() / 100)
    ranks = set((hottest // 16).tolist())
    assert ranks == ({int(place)} if place.isdigit() else set(range(0, 8, 2 if hot == 4 else 1)))


def test_the_grid_covers_places_and_leaves_out_what_is_not_hot() -> None:
    full = grid_names(RoutingShape(8, 128, 4, 64))
    assert len(full) == 4 * (2 + 3 + 3)
    assert {"30:16@0", "50:16@5", "80:4@spread", "95:1@5"} <= set(full)
    assert not {"30:16@0", "50:16@0"} & set(grid_names(SHAPE))  # 16 of 32 get half in any case
    for name in ("95:1@0", "95:4@0", "95:1@5", "95:4@5"):  # what the headline is measured on
        rows = rank_rows(workload(name, SHAPE))
        assert rows.max() >= 0.95 * rows.sum()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("W8", "neither W0..W7 nor percent:hot@place"),
        ("95:1", "neither W0..W7 nor percent:hot@place"),
        ("95:1@8", r"rank 8 must be < the ranks \(8\)"),
        ("30:16@0", "must be fewer than 30 %"),
        ("50:0@0", "must be fewer than 50 %"),
        ("101:1@0", r"percent \(101\) must be <= 100"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload(name, SHAPE)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_ranks \(3\) must divide"):
        RoutingShape(3, 32, 2, 8)
    with pytest.raises(ValueError, match=r"top_k \(9\) must be <= shape.num_experts \(8\)"):
        RoutingShape(2, 8, 9, 8)
    with pytest.raises(ValueError, match=r"tokens \(0\) must be >= 1"):
        RoutingShape(2, 8, 2, 0)
    with pytest.raises(ValueError, match=r"top_k \(5\) must be <= the experts to choose from \(4"):
        public_workloads(RoutingShape(2, 8, 5, 8))["W5"].draw(0, 0)


def recorded(num_tokens: int) -> np.ndarray:
    keys = np.random.default_rng(0).random((num_tokens, 3, 16))
    return np.argsort(keys, axis=2)[:, :, :2].astype(np.int32)


def test_a_recording_is_replayed_exactly(tmp_path: Path) -> None:
    ids_TLK = recorded(50)
    ids_TLK[49, 0, 1] = 16  # no expert
    source_T = np.repeat([1, 0, 3, 2], [20, 5, 12, 13])
    path = tmp_path / "run.npz"
    np.savez(path, ids=ids_TLK, source=source_T, num_experts=16)
    load = recording(path, num_ranks=4, num_experts=16, tokens=8)
    steps = [load.draw(0, step) for step in range(10)]
    for layer in range(3):  # 20 tokens in windows of 8: three steps of every layer
        for rank in range(4):
            replayed = np.concatenate([steps[layer + 3 * window][rank] for window in range(3)])
            assert (replayed == ids_TLK[source_T == rank, layer]).all()
    assert [len(ids) for ids in steps[6]] == [0, 4, 0, 0]
    assert (np.concatenate(steps[9]) == np.concatenate(steps[0])).all()
    assert sum(load.counts(0, step).sum() for step in (0, 3, 6)) == 2 * 50 - 1

    others = recording(path, num_ranks=8, num_experts=16, tokens=100).draw(0, 1)
    assert [len(ids) for ids in others] == [7, 7, 6, 6, 6, 6, 6, 6]
    assert (np.concatenate(others) == ids_TLK[:, 1]).all()


def test_an_array_alone_is_a_recording_too(tmp_path: Path) -> None:
    ids_TLK = recorded(50)
    np.save(tmp_path / "ids.npy", ids_TLK)
    load = recording(tmp_path / "ids.npy", num_ranks=2, num_experts=16, tokens=25)
    assert (np.concatenate(load.draw(7, 2)) == ids_TLK[:, 2]).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((4, 2), dtype=np.int64), "expected integer ids"),
        (np.zeros((4, 2, 1)), "expected integer ids"),
        (np.full((4, 2, 1), 9), r"is of 10 experts, with ids 9..9; the shape has 8"),
        (np.full((4, 2, 2), 7), "token 0 chooses an expert twice in layer 0"),
    ],
)
def test_recordings_that_are_none_are_refused(
    tmp_path: Path, ids: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(ValueError, match=message):
        recording(tmp_path / "ids.npy", 2, 8, 4)
    np.savez(tmp_path / "ids.npz", routing=ids, source=np.zeros(4))
    with pytest.raises(ValueError, match=r"holds \['routing', 'source'\], not ids, num_experts"):
        recording(tmp_path / "ids.npz", 2, 8, 4)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 100))
    with LiveBytes([weight]) as memory:
        a = torch.zeros(1000)
        view = a[:10]
        b = a + 1  # 8000 bytes alive
        del a  # its view keeps it
        (weight.sum() * 2).backward()
        del view, b
        c = torch.ones(500)
    assert weight.grad is not None
    scalars = 3 * 4  # sum, product, incoming gradient
    assert 8000 <= memory.peak([weight.grad]) <= 8000 + scalars
    assert 9600 <= memory.peak() <= 9600 + scalars
    assert len(c) == 500


def test_bytes_of_a_plan_by_link() -> None:
    rows = torch.tensor([[0, 0, 0, 5], [0, 1, 0, 3], [0, 2, 2, 7], [1, 3, 0, 2]])
    borrowed = torch.tensor([[0, 0, 2], [0, 0, 3], [1, 0, 1]])
    plan = DispatchPlan(rows, borrowed, num_ranks=4, num_experts=2)
    facts = PlanFacts.of(plan, (0, 0, 1, 1), row_bytes=10, expert_bytes=1000)
    assert facts.load_R == [10, 0, 7, 0] and facts.borrowed == 3
    assert facts.load_ratio == pytest.approx(10 * 4 / 17)
    assert facts.row_bytes == {"within": 30, "across": 20}
    # expert 0 crosses to the other node once and is handed on there
    assert facts.weight_bytes == {"within": 2000, "across": 1000}
    assert facts.bytes_over("within", "forward") == 2 * 30 + 2000
    assert facts.bytes_over("across", "both") == 4 * 20 + 2 * 1000


def made_up(cpu: float) -> Sample:
    clocks = {"cpu": cpu, "cpu_median": cpu, "process": 2 * cpu, "wall": 3 * cpu}
    return Sample({clock: value / 4 for clock, value in clocks.items()}, clocks, 1e-4)


def record(home_s: list[float], arm_s: list[float], peak: int) -> RankRecord:
    none = {"within": 0, "across": 0}
    hot, level = PlanFacts([30, 10], 0, none, none), PlanFacts([20, 20], 2, none, none)
    return RankRecord(
        steps=[3, 4, 5],
        samples={
            HOME: [made_up(s) for s in home_s],
            "arm": [made_up(s) for s in arm_s],
            EVEN: [made_up(3.0)] * 3,
        },
        plans={HOME: [hot] * 3, "arm": [level] * 3, EVEN: [level] * 3},
        peak_bytes={HOME: {"": 2 * peak}, "arm": {"": peak}, EVEN: {"": 100}},
        error={HOME: 0.0, "arm": 1e-7},
    )


def test_medians_of_the_slowest_rank_and_what_follows() -> None:
    slow, fast = record([6, 8, 7], [1, 5, 4], 120), record([3, 3, 9], [4, 2, 3], 110)
    (cell,) = summarize("95:1@0", lambda step: "", [slow, fast])
    home, arm = cell.arms[HOME], cell.arms["arm"]
    assert home.both_s["cpu"] == 8 and arm.both_s["cpu"] == 4
    assert home.forward_s["cpu"] == 2 and arm.both_s["wall"] == 12
    assert arm.speedup == {"forward": 2.0, "both": 2.0}
    assert cell.ideal["both"] == pytest.approx(1.5)
    assert arm.share["both"] == pytest.approx(2.0 / 1.5)
    assert home.share["both"] == pytest.approx(1 / 1.5)
    assert arm.even_share["both"] == pytest.approx(3 / 4)
    assert (cell.load_ratio, arm.load_ratio, arm.borrowed, cell.rows) == (1.5, 1.0, 2, 40)
    assert arm.memory_ratio == pytest.approx(1.2) and home.memory_bytes == 240
    assert arm.planner_us == pytest.approx(100)


def test_parts_of_a_workload_are_not_averaged() -> None:
    ranks = [record([6, 8, 7], [1, 5, 4], 1)] * 2
    for rank in ranks:
        rank.peak_bytes.update({arm: {"burst": 2, "steady": 1} for arm in rank.samples})
    burst, steady = summarize("W7", lambda step: "burst" if step == 3 else "steady", ranks)
    assert (burst.label, burst.num_steps, burst.arms["arm"].both_s["cpu"]) == ("W7 burst", 1, 1)
    assert (steady.label, steady.num_steps, steady.arms["arm"].both_s["cpu"]) == (
        "W7 steady", 2, 4.5,
    )  # fmt: skip
    assert math.isnan(burst.arms["arm"].noise)
    assert relative_error(np.array([2.0, 2.0, 2.0])) == 0


def test_the_fastest_repeat_counts() -> None:
    step = typical([made_up(3.0), made_up(1.0), made_up(8.0)])
    assert step.both == {"cpu": 1.0, "cpu_median": 3.0, "process": 2.0, "wall": 9.0}
    assert step.forward["cpu"] == 0.25


def test_one_wrong_value_shows_in_the_difference() -> None:
    expected = [torch.full((3,), 2.0), torch.full((2, 2), 0.5)]
    assert difference(expected, expected) == 0
    wrong = [expected[0], expected[1].clone()]
    wrong[1][0, 1] = 0.6
    assert difference(wrong, expected) == pytest.approx(0.2)
    wrong[1][0, 1] = math.nan
    assert not difference(wrong, expected) <= TOLERANCE


def test_targets_take_the_worst_cell() -> None:
    def cell(name: str, home_s: float, arm_s: float, peak: int, num_ranks: int = 2) -> Cell:
        times = record([home_s] * 3, [arm_s] * 3, peak)
        (found,) = summarize(name, lambda step: "", [times] * num_ranks)
        return found

    found = verdicts([cell("W0", 1.0, 1.01, 90), cell("W2", 3.0, 2.5, 130)])
    assert len(found) == len(TARGETS)
    by_text = {verdict.target: verdict for verdict in found}
    one_rank, share, balanced, memory, anywhere = (by_text[target.text] for target in TARGETS)
    assert one_rank.value is None and one_rank.met is None  # not on two ranks
    assert share.value is None  # 1.5 is not above 1.5
    assert balanced.value == pytest.approx(1 / 1.01) and balanced.met
    assert (memory.value, memory.where, memory.met) == (1.3, "W2", False)
    assert anywhere.where == "W0" and anywhere.met


def test_the_command_at_a_tiny_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cells = imbalance.main(
        [
            *("--ranks", "2", "--experts", "8", "--tokens", "12", "--hidden", "16", "--width", "8"),
            *("--steps", "2", "--repeats", "2", "--warmup", "2"),
            *("--workloads", "W0", "W7", "95:1@1"),
            *("--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")),
        ]
    )  # fmt: skip
    assert [cell.label for cell in cells] == ["W0", "W7 steady", "W7 burst", "95:1@1"]
    for cell in cells:
        assert list(cell.arms) == [
            HOME, "least_loaded", "quota", "sticky", "materialize", "replicated", EVEN,
        ]  # fmt: skip
        for arm in cell.arms.values():
            assert arm.error <= 1e-5 and arm.both_s["cpu"] > arm.forward_s["cpu"] > 0
            assert arm.memory_ratio > 0
    assert cells[-1].load_ratio > 1.9
    saved = json.loads((tmp_path / "out.json").read_text())
    assert set(saved) == {"machine", "setup", "shape", "cells", "targets"}
    assert len(saved["cells"]) == 4 and saved["setup"]["seed"] == 0
    assert (tmp_path / "out.png").stat().st_size > 1000
    printed = capfd.readouterr().out
    assert "wall time says nothing" in printed and "95:1@1: home load ratio 1.9" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_arms_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--arms \(fastest\) must be among home, least_loaded"):
        imbalance.main(["--ranks", "2", "--quick", "--arms", "fastest"])
