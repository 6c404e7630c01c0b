"""Sweeps: every combination, kept and gone on with, failures beside results, errors that teach."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.compose import composed_cell, to_cell
from parallel.planners import Quota
from placement.objective import ExpertShape
from placement.simulate import simulate_trace
from placement.stats import RoutingStats
from placement.sweep import run as sweep
from placement.sweep.cell import fitted, load_routing, read_trace, topology_of, write
from placement.sweep.run import cells_of, main, read
from placement.sweep.table import note
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.trace import Trace

ROOT = Path(__file__).parents[2]
TINY = (
    "synthetic.layers=2",
    "synthetic.experts=8",
    "synthetic.top_k=2",
    "synthetic.strength=high",
    "synthetic.seq_len=32",
    "synthetic.stats_tokens=1024",
    "synthetic.steps=2",
    "micro_batch=128",
    "cluster=laptop",
)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "placement.sweep", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        # shells start background jobs with Ctrl-C ignored, and so would this be
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def some_trace(tokens: int = 512, seed: int = 1) -> Trace:
    return SyntheticRouter(2, 8, "high").sample(tokens // 32, 32, 2, seed=seed)


# ---------------------------------------------------------------- from the command line


def test_a_sweep_is_kept_and_grows(tmp_path: Path) -> None:
    """As a user runs it; the second time only what is new is simulated."""
    given = ["-m", *TINY, f"dir={tmp_path}", "placement=contiguous,random", "planner=home,quota"]
    started = command(*given, COLUMNS="200")
    out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err
    assert "Simulated: the MoE layers" in out and f"report: {tmp_path / 'report.html'}" in out
    rows = table(tmp_path)
    assert [(row["placement"], row["planner"]) for row in rows] == [
        ("contiguous", "home"),
        ("contiguous", "quota"),
        ("random", "home"),
        ("random", "quota"),
    ]
    assert {row["status"] for row in rows} == {"done"}
    assert float(rows[0]["moved_percent"]) == 0 < float(rows[2]["moved_percent"])
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["name"]["planner"] for record in results] == ["home", "quota"] * 2
    assert (tmp_path / "table.md").read_text().count("\n| ") == 4

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    assert main([*given[:-1], "planner=home,quota,least_loaded", "n_jobs=2"]) == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    assert len(before) == 4 and len(after) == 6
    assert {path: after[path] for path in before} == before
    assert table(tmp_path)[:2] == rows[:2] and len(table(tmp_path)) == 6


def test_a_single_cell_equals_the_simulator(tmp_path: Path) -> None:
    given = [*TINY, "placement=random", "seed=4", "compute_share=0.25", "shape.hidden=64"]
    assert main([*given, f"dir={tmp_path}", "micro_batches=2"]) == 0
    (row,) = table(tmp_path)
    assert (row["placement"], row["cluster"]) == ("random", "laptop")
    (cell,) = cells_of([*given, f"dir={tmp_path}", "micro_batches=2"])
    record = read(cell, tmp_path)
    assert record is not None
    topology, shape = topology_of(cell.config), ExpertShape(64, 3 * 64 * 768)
    assert topology.flops == 0.25 * 5e10
    trace = load_routing(cell.config, 2).trace
    assert trace is not None and trace.num_tokens == 128 * 2 * 2 * 2
    step = simulate_trace(
        ExpertPlacement(torch.tensor(record["home_LE"]), 2),
        trace,
        topology,
        fitted(Quota(), topology, shape, 2),
        micro_batch=128,
        micro_batches=2,
        shape=shape,
    )
    assert record["step"]["seconds"] == step.seconds and step.steps == 2
    assert float(row["step_ms"]) == pytest.approx(1e3 * step.seconds)
    assert float(row["within_mb"]) == pytest.approx(step.bytes_intra / 1e6)


def test_a_cell_that_fails_is_in_the_table_and_others_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["-m", *TINY, f"dir={tmp_path}", "cluster=laptop,h100_1x8", "synthetic.experts=6"]
    given.remove("cluster=laptop")
    assert main(given) == 1
    good, bad = table(tmp_path)
    assert (good["status"], bad["status"], bad["step_ms"]) == ("done", "failed", "")
    why = "the experts (6) must be a multiple of the ranks (8 = cluster.num_nodes x"
    assert why in bad["note"] and f"cluster=h100_1x8: failed: {why}" in capfd.readouterr().out
    path = tmp_path / "cells" / f"{bad['digest']}.json"
    assert "Traceback" in json.loads(path.read_text())["traceback"]
    first = path.stat().st_mtime_ns
    assert main(given) == 1  # what failed is tried again
    assert path.stat().st_mtime_ns > first


def test_ctrl_c_leaves_finished_cells_and_no_process(tmp_path: Path) -> None:
    given = ["-m", *TINY, f"dir={tmp_path}", "n_jobs=1", "placement=contiguous,ilp"]
    given += ["synthetic.layers=12", "synthetic.experts=64", "cluster=h100_1x8"]
    mark = f"EVENKEEL_TEST={tmp_path}"
    started = command(*given, EVENKEEL_TEST=str(tmp_path))
    end = time.monotonic() + 60
    while len(list((tmp_path / "cells").glob("*.log"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)  # contiguous is done, ilp is at it
    time.sleep(1.0)  # Python drops an interrupt that arrives while it forks; this one is past that
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "stopped: 1 of 2 cells are finished; the same command goes on from there" in err
    assert len(list((tmp_path / "cells").glob("*.json"))) == 1
    assert len(table(tmp_path)) == 1
    time.sleep(0.2)
    alive = [
        path
        for path in Path("/proc").glob("[0-9]*/environ")
        if mark in _text(path) and path.parent.name != str(os.getpid())
    ]
    assert not alive


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_fails_its_cells(tmp_path: Path) -> None:
    cells = cells_of(["-m", *TINY, "planner=home,quota", f"dir={tmp_path}"])
    write(cells[0], tmp_path, {"status": "done"})
    process = multiprocessing.get_context("fork").Process(target=_die)
    process.start()
    sweep._close(process, cells, tmp_path)
    records = [read(cell, tmp_path) for cell in cells]
    assert [record["status"] for record in records if record] == ["done", "failed"]
    assert "its process ended with code -9 (killed; out of memory?)" in str(records[1])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["placement=contigous"], "placement=contigous: no such choice; did you mean contiguous?"),
        (["planer=home"], "planer: no such key; did you mean planner?"),
        (["model=tiny"], "model=tiny: a sweep has no group model; it has placement, planner,"),
        (["micro_bach=3"], "micro_bach: no such key; did you mean micro_batch"),
        (["synthetic.strength=strong"], "synthetic.strength (strong) must be none or low or"),
        (["micro_batch=0"], "micro_batch (0) must be >= 1"),
        (["micro_batch=100"], "micro_batch (100) must be a multiple of synthetic.seq_len (256)"),
        (["synthetic.top_k=65"], "synthetic.top_k (65) must be <= synthetic.experts (64)"),
        (["placement=random,load"], "placement=random,load: several values; add -m"),
        (["-m", "seed=interval(0,1)"], "an interval has no values to run through"),
        (["-m", "dir=a,b"], "dir: a sweep has one; give it one value"),
        (["--cfg", "job"], "--cfg: no such flag; known: -m, --help"),
        (["placement=file"], "missing values: placement.path; give them on the command line"),
        (["placement.sed=1"], "placement.sed: no such key"),
        (["+placement.sed=1"], "placement.sed: placement.placers.contiguous has no such argument"),
        (["stats=nowhere.npz"], "nowhere.npz: cannot be read (No such file or directory)"),
        (["-m", "seed=0,1", "cluster.flops=-1"], "cluster.flops (-1.0) must be > 0"),
        (
            ["cluster=local"],
            "cluster.num_nodes, cluster.ranks_per_node, cluster.intra_gbps, cluster.flops, "
            "cluster.inter_gbps, cluster.latency_us: null in configs/cluster/local.yaml, but a "
            "simulation needs them; give cluster.num_nodes=..., or choose a cluster that has them",
        ),
        (["cluster.inter_gbps=null"], "cluster.inter_gbps: null in configs/cluster/h100_2x8.yaml"),
        (["placement=random", "placement.seed=x"], "placement.seed ('x') must be int"),
    ],
)
def test_what_is_refused(
    arguments: list[str], expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = [] if any("dir=" in argument for argument in arguments) else [f"dir={tmp_path}"]
    assert main([*arguments, *start]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("error: ") and expected in shown.err and shown.out == ""
    assert "Traceback" not in shown.err and not list(tmp_path.iterdir())


def test_one_node_needs_no_speed_between_nodes() -> None:
    (cell,) = cells_of(["cluster=rack_scale", "cluster.inter_gbps=null", "cluster.latency_us=null"])
    assert topology_of(cell.config).num_ranks == 72


def test_help_teaches(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capfd.readouterr().out
    assert text.count("python -m placement.sweep -m") == 3 and "*h100_2x8" in text
    assert "micro_batch  (int, >= 1, default 2048)" in text and "optim." not in text


def test_the_examples_of_the_help_are_cells(tmp_path: Path) -> None:
    from configs.describe import SWEEP_EXAMPLES

    some_trace().save(tmp_path / "routing.npz")
    for _, line in SWEEP_EXAMPLES:
        words = line.removeprefix("python -m placement.sweep ").split()
        words = [f"trace={tmp_path}" if word.startswith("trace=") else word for word in words]
        assert len(cells_of(words)) >= 4


# ---------------------------------------------------------------- cells


def test_what_a_result_depends_on_is_in_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    RoutingStats.of_trace(some_trace()).save(path)
    both = cells_of(["-m", "planner=home,quota", "seed=0,1", f"stats={path}", "dir=x"])
    assert len({cell.digest for cell in both}) == 4
    assert len({cell.group for cell in both}) == 2  # planners share a placement
    again = cells_of(["planner=home", "seed=0", f"stats={path}", "dir=y", "n_jobs=7"])
    assert again[0].digest == both[0].digest
    sweep._fingerprint.cache_clear()
    RoutingStats.of_trace(some_trace(seed=2)).save(path)
    changed = cells_of(["planner=home", "seed=0", f"stats={path}"])
    assert changed[0].digest != both[0].digest
    levels = ["-m", "dispatcher=direct,two_level", "planner=home"]
    assert len({cell.group for cell in cells_of([*levels, "placement=random"])}) == 1
    assert len({cell.group for cell in cells_of([*levels, "placement=ilp"])}) == 2


def config(*overrides: str) -> Any:
    return to_cell(composed_cell(*TINY, *overrides)[0])


def test_made_up_routing_is_judged_on_other_tokens() -> None:
    routing, again = load_routing(config(), 2), load_routing(config(), 2)
    assert routing.trace is not None and again.trace is not None
    assert routing.stats.tokens == 1024 and routing.trace.num_tokens == 512
    np.testing.assert_array_equal(routing.trace.ids_TLK, again.trace.ids_TLK)
    as_many = load_routing(config("synthetic.stats_tokens=512"), 2)
    assert as_many.trace is not None
    simulated = RoutingStats.of_trace(as_many.trace)
    assert (as_many.stats.load_LE != simulated.load_LE).any()
    other = load_routing(config("seed=1"), 2).trace
    assert other is not None and (other.ids_TLK != routing.trace.ids_TLK).any()


def test_a_trace_alone_is_halved(tmp_path: Path) -> None:
    """Every rank's first half decides, the second is simulated."""
    source_T = np.random.default_rng(0).permutation(np.arange(512) % 2)
    trace = some_trace()
    ids, about = trace.ids_TLK, {"token_T": np.arange(512)}
    Trace(ids, 8, source_T=source_T, **about).save(tmp_path / "trace.npz")
    routing = load_routing(config(f"trace={tmp_path / 'trace.npz'}"), 2)
    assert routing.trace is not None and routing.trace.token_T is not None
    simulated = set(routing.trace.token_T.tolist())
    assert routing.stats.tokens == 256 and len(simulated) == 256
    for rank in (0, 1):
        mine = np.flatnonzero(source_T == rank).tolist()
        assert [token in simulated for token in mine] == [False] * 128 + [True] * 128
    with_four = load_routing(config(f"trace={tmp_path / 'trace.npz'}"), 4).trace
    assert with_four is not None and with_four.source_T is not None
    assert np.bincount(with_four.source_T).tolist() == [64] * 4  # dealt out anew


def test_statistics_and_traces_from_files(tmp_path: Path) -> None:
    stats = RoutingStats.of_trace(some_trace(seed=5), 2)
    stats.save(tmp_path / "stats.npz")
    some_trace().save(tmp_path / "routing" / "step-1.npz")
    some_trace(seed=2).save(tmp_path / "routing" / "step-2.npz")
    alone = load_routing(config(f"stats={tmp_path / 'stats.npz'}"), 2)
    assert alone.trace is None and alone.stats.tokens == 512
    both = load_routing(
        config(f"stats={tmp_path / 'stats.npz'}", f"trace={tmp_path / 'routing'}"), 2
    )
    assert both.trace is not None and both.trace.num_tokens == 1024
    given = [*TINY, f"dir={tmp_path / 'out'}", f"stats={tmp_path / 'stats.npz'}", "planner=home"]
    assert main(given) == 0

    SyntheticRouter(3, 8).sample(4, 32, 2).save(tmp_path / "routing" / "step-3.npz")
    with pytest.raises(ValueError, match="its files are of models with"):
        read_trace(tmp_path / "routing")
    with pytest.raises(ValueError, match=r"no .npz files; record some"):
        read_trace(tmp_path / "out")
    other = tmp_path / "routing" / "step-3.npz"
    with pytest.raises(ValueError, match=r"the statistics are of 2 MoE layers x 8 experts, the"):
        load_routing(config(f"stats={tmp_path / 'stats.npz'}", f"trace={other}"), 2)


def test_assigned_sequences_cross_less(tmp_path: Path) -> None:
    given = [*TINY, f"dir={tmp_path}", "synthetic.strength=domain", "cluster=h100_2x8"]
    given += ["synthetic.experts=32", "cluster.ranks_per_node=2", "synthetic.stats_tokens=4096"]
    given += ["placement=affinity", "placement.time_limit_s=4", "micro_batch=512", "planner=home"]
    assert main(["-m", *given, "assign_sequences=false,true"]) == 0
    apart, together = (float(row["across_mb"]) for row in table(tmp_path))
    assert together < 0.95 * apart
    uneven = [
        *TINY,
        f"dir={tmp_path / 'b'}",
        "assign_sequences=true",
        f"trace={tmp_path / 't.npz'}",
    ]
    some_trace(480).save(tmp_path / "t.npz")
    assert main(uneven) == 1
    assert "a step of 256 tokens (micro_batch x micro_batches" in table(tmp_path / "b")[0]["note"]
    RoutingStats.of_trace(some_trace()).save(tmp_path / "s.npz")
    with pytest.raises(ValueError, match=r"assign_sequences \(true\) needs the tokens"):
        cells_of([*TINY, "assign_sequences=true", f"stats={tmp_path / 's.npz'}"])


def test_notes_say_how_good_a_placement_is() -> None:
    found = {"method": "exact", "seconds": 2.04, "proven": True, "finished": True, "gap": 0.0}
    record: dict[str, Any] = {"status": "done", "solver": found}
    assert note(record) == "exact, 2.0 s, proven"
    record["solver"] = found | {"proven": False, "finished": False, "gap": 0.031}
    assert note(record) == "out of time, exact, 2.0 s, gap 3.1%"
    record["solver"] = found | {"proven": False, "method": "search", "gap": 0.002}
    assert note(record) == "search, 2.0 s, gap 0.2%"
    assert note({"status": "done", "solver": None}) == ""
    assert note({"status": "failed", "message": "no"}) == "failed: no"


def test_a_solver_out_of_time_is_marked(tmp_path: Path) -> None:
    given = [*TINY, f"dir={tmp_path}", "placement=ilp", "placement.time_limit_s=0.5"]
    given += ["synthetic.layers=4", "synthetic.experts=32", "cluster=h100_1x8"]
    assert main(given) == 0
    (row,) = table(tmp_path)
    assert row["note"].startswith("out of time, exact, ") and "gap" in row["note"]
