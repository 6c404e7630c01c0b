"""Whole runs under every planner and dispatcher: the same losses, and records to replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import skewed_training
from tests.benchmarks.workloads import recording
from tests.trainer.test_run import corpus, metrics, train

PLANNERS = ["home", "least_loaded", "quota", "materialize", "replicated", "sticky"]


@pytest.mark.slow
def test_every_planner_gives_the_same_losses(tmp_path: Path) -> None:
    text = corpus(tmp_path / "text")
    folder = f"{tmp_path}/sweep${{sweep_job:}}"
    output = train(
        text,
        Path(folder),
        2,
        "-m",
        f"planner={','.join(PLANNERS)}",
        "dispatcher=direct,two_level",
        "mesh.ranks_per_node=1",
        "train.record_routing_every=3",
        "train.dispatch_chunks=0",
        "train.eval_every=4",
        "checkpoint.export=false",
    )
    assert "Gbit/s and" in output and "borrowing an expert pays" in output
    runs = sorted((tmp_path / "sweep").glob("*/summary.json"))
    assert len(runs) == 2 * len(PLANNERS)
    losses = [[line["train/loss"] for line in metrics(path.parent)] for path in runs]
    for path, of_run in zip(runs, losses, strict=True):
        assert of_run == pytest.approx(losses[0], rel=1e-4), path
    for path in runs:
        last = metrics(path.parent)[-1]
        if "materialize" not in path.parent.name:  # which saves bytes, whoever computes
            assert last["moe/load_ratio"] <= last["moe/load_ratio_home"] + 1e-9
        assert (last["moe/expert_bytes_across_nodes"] > 0) == (last["moe/borrowed_experts"] > 0)
        check_routing(path.parent / "routing")


def check_routing(folder: Path) -> None:
    """Recorded ids are those of every token of the step, and the benchmarks read them."""
    paths = sorted(folder.glob("*.npz"))
    assert [path.name for path in paths] == ["step-00000003.npz", "step-00000006.npz"]
    with np.load(paths[-1]) as saved:
        assert saved["ids"].shape == (8 * 32, 2, 2)
        assert np.bincount(saved["source"]).tolist() == [128, 128]
        assert saved["ids"].min() >= 0 and saved["ids"].max() < saved["num_experts"] == 8
        layer_0 = saved["ids"][:, 0]
    replayed = recording(paths[-1], num_ranks=2, num_experts=8, tokens=128).draw(0, 0)
    assert np.array_equal(np.concatenate(replayed), layer_0)


@pytest.mark.slow
def test_skewed_text_trains_level_and_the_same() -> None:
    found = skewed_training.main(["--ranks", "2", "--steps", "6"])
    home, quota = found["home"], found["quota"]
    assert quota.losses == pytest.approx(home.losses, rel=1e-4)
    assert home.ratio == home.ratio_home > 1.1
    assert quota.ratio_home == pytest.approx(home.ratio_home, rel=1e-6)
    assert quota.ratio < 1.02 and quota.borrowed > 0
    assert home.critical_s > 0
