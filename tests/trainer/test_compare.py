"""The table of choices, of real small runs and of made-up ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from configs.compose import load
from tests.ranks import run_ranks
from tests.trainer.test_routers_stateful import whole_run
from tests.trainer.test_run import TINY, corpus, environment
from trainer.compare import choices, compare, main
from trainer.page.history import Point, encode

STEPS = 10


def made_up(folder: Path, number: int, shift: float = 0.0, **config: Any) -> None:
    """A finished run whose metrics at step n are simple functions of n and the number."""
    folder.mkdir(parents=True)
    content = {
        "train": {"steps": STEPS, "batch_size": 4, "seq_len": 8},
        "data": {"cache_dir": str(folder), "sources": {"a": 1}},
        "model": {"source": None},
        "optim": {"lr": 0.1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content | config))
    lines = [
        {
            "step": n,
            "train/loss": 9.0,
            "train/tokens": 100.0,
            "moe/max_violation": float(n),
            "moe/load_ratio_home": 2.0,
            "moe/load_ratio": 1.0 + n,
            "moe/rows": 400.0,
            "moe/bytes_within_nodes": 1e6 * n,
            "moe/bytes_across_nodes": 1e6,
            "speed/tokens_per_s": 50.0,
            "layer/0/max_violation": 1.0,
            "layer/1/max_violation": 1.0,
        }
        for n in range(1, STEPS + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loads = [np.array([[n, 1, 1], [4, 4, 4]], dtype=np.int64) for n in range(1, STEPS + 1)]
    points = [encode(Point(n, load_LE)) for n, load_LE in enumerate(loads, start=1)]
    (folder / "history.jsonl").write_text("\n".join(points) + "\n")
    last = {"validation/loss": 3.0 + shift + number, "validation/max_violation": 0.5 * number}
    (folder / "summary.json").write_text(json.dumps({"validation": last}))


def test_figures_by_hand(tmp_path: Path) -> None:
    for seed in (0, 1):
        made_up(tmp_path / f"{seed}", seed, balance={"a": {"_target_": "x.A", "rate": 1}})
        balance = {"b": {"_target_": "x.B", "rate": 2}}
        made_up(tmp_path / f"b{seed}", seed, shift=-1.0, seed=seed, balance=balance)
    best, other = compare([tmp_path])
    assert (best.choice, other.choice, best.seeds) == ("balance=b", "balance=a", 2)
    assert best.loss == pytest.approx(2.5) and other.loss == pytest.approx(3.5)
    assert best.spread == pytest.approx(0.5**0.5)
    assert best.max_violation == pytest.approx(0.25)
    # of steps 9 and 10: 19, 2, 2 rows in one layer, alike in the other
    assert best.max_violation_trained == pytest.approx((19 / (23 / 3) - 1) / 2)
    assert best.max_violation_micro == pytest.approx(9.5)  # of steps 9 and 10
    assert (best.load_ratio_home, best.load_ratio) == (2.0, pytest.approx(10.5))
    assert best.rows_per_token == pytest.approx(400 / 2 / 100)
    assert best.megabytes == pytest.approx(10.5)
    assert best.routing_change is None and best.dead_experts is None


def test_choices_are_named_by_what_differs() -> None:
    """A slot by its name, its values only where runs with that slot differ; not the seed."""
    aux = {"_target_": "x.Aux", "scope": "all"}
    balances: list[dict[str, Any]] = [
        {},
        {"aux": {**aux, "coefficient": 0.1}},
        {"aux": {**aux, "coefficient": 0.2}},
        {"free": {"_target_": "x.Free", "rate": 1}},
    ]
    routers = ["x.Native", "x.Native", "x.Native", "x.Switch"]
    configs = [
        {
            "seed": n,
            "run": {"dir": str(n)},
            "router": {"_target_": router, "seed": n},
            "balance": balance,
        }
        for n, (balance, router) in enumerate(zip(balances, routers, strict=True))
    ]
    assert choices(configs) == [
        "router=Native, balance=none",
        "router=Native, balance=aux, balance.aux.coefficient=0.1",
        "router=Native, balance=aux, balance.aux.coefficient=0.2",
        "router=Switch, balance=free",
    ]


def test_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "empty")])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2 and "has no finished run" in capsys.readouterr().err
    made_up(tmp_path / "a" / "seed=0", 0)
    made_up(tmp_path / "a" / "seed=1", 1, optim={"lr": 0.2})
    with pytest.raises(ValueError, match=r"differ in optim.lr \(0.2 and 0.1\)"):
        compare([tmp_path / "a"])
    made_up(tmp_path / "b" / "seed=0", 0)
    made_up(tmp_path / "b" / "seed=1", 1)
    (tmp_path / "b" / "seed=1" / "summary.json").unlink()
    (only,) = compare([tmp_path / "b"])
    assert only.seeds == 1 and only.spread is None and only.choice == "all alike"
    assert "left out, not finished" in capsys.readouterr().err


@pytest.fixture
def real_runs(tmp_path: Path) -> Path:
    """Two choices with two seeds each, as a sweep names them."""
    text, folder = corpus(tmp_path / "text"), tmp_path / "runs" / "now"
    for name, *choice in (
        ("router=native", "planner=home"),
        ("router=group_balanced", "planner=home", "router=group_balanced", "balance=none"),
    ):
        for seed in (0, 1):
            changes = f"seed={seed}", "train.eval_every=3"
            run_ranks(whole_run, 2, str(text), str(folder), 6, *choice, *changes)
            files = f"data.sources.text.paths={text}/*.txt"
            config = load(*TINY, files, "checkpoint.export=false", *choice, *changes)
            (folder / "config.yaml").write_text(yaml.safe_dump(config.resolved))
            folder.rename(folder.with_name(f"{name},seed={seed}"))
    return tmp_path / "runs"


def test_real_runs(
    real_runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, picture = tmp_path / "figures.jsonl", tmp_path / "figures.png"
    arguments = [str(real_runs), "--json", str(out), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    main()
    printed = capsys.readouterr().out
    found = {one["choice"]: one for one in map(json.loads, out.read_text().splitlines())}
    native, balanced = "balance=auto, router=Native", "balance=none, router=GroupBalanced"
    assert set(found) == {native, balanced} and picture.stat().st_size
    assert all(name in printed for name in found)
    assert found[balanced]["load_ratio_home"] == 1.0
    assert found[native]["load_ratio_home"] > 1.0
    assert [one["rows_per_token"] for one in found.values()] == pytest.approx([2, 2], rel=0.1)
    assert all(0 <= one["routing_change"] < 1 for one in found.values()), found


def test_a_sweep_is_trained_and_compared_and_not_again(tmp_path: Path) -> None:
    text, table = corpus(tmp_path / "text"), tmp_path / "figures.jsonl"
    sweep = ["-m", *TINY, f"data.sources.text.paths={text}/*.txt", "checkpoint.export=false"]
    sweep += ["balance=none,aux_loss", f"run.dir={tmp_path}/runs/now${{sweep_job:}}"]
    ranks = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    command = [sys.executable, *ranks, "-m", "trainer.compare", "--json", str(table), *sweep]
    found = []
    for _ in range(2):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append([json.loads(line) for line in table.read_text().splitlines()])
        table.unlink()
    assert {one["choice"] for one in found[0]} == {"balance=none", "balance=aux_loss"}
    assert found[0] == found[1] and "is complete at step 6" in done.stdout
    assert done.stdout.count("balance=aux_loss") >= 1
    assert all(0 < one["affinity"] <= 1 and one["dropped"] is None for one in found[0])
