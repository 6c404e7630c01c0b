"""Training from a dense checkpoint, upcycled while it is read, is training what was converted."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from configs.compose import load
from configs.schema import check
from parallel.mesh import ParallelMesh
from parallel.planners import home_plan
from placement.trace import load_trace
from tests.ranks import run_ranks
from tests.upcycle.models import random_model, saved
from trainer.hf_checkpoint import HFCheckpoint
from trainer.modeling import build_model
from trainer.run import run
from trainer.upcycle.__main__ import main
from trainer.upcycle.dense import DenseModel, dense_model
from trainer.upcycle.plan import upcycled
from trainer.upcycle.recipe import LayerFFN
from trainer.upcycle.recipes.drop import Drop

TEXT = "level experts route tokens to ranks that plan for home slots. " * 40
RECIPE = ["recipe.num_experts=4", "recipe.top_k=2", "recipe.share=0.25"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    saved(random_model("qwen3", head_dim=16, vocab_size=257), folder / "qwen3")
    for number in range(20):
        (folder / f"{number}.txt").write_text(TEXT[number:])
    return folder


def train(folder: str, run_dir: str, *overrides: str) -> set[int]:
    """Three steps on this rank; returns the layers whose dense FFN it read."""
    config = load(
        "data=text",
        f"data.sources.text.paths=[{folder}/*.txt]",
        "train.steps=3",
        "train.batch_size=4",
        "train.micro_batch_size=2",
        "train.seq_len=32",
        "train.eval_batches=1",
        "optim.lr=0.003",
        "checkpoint.export=false",
        "~logger.console",
        f"run.dir={run_dir}",
        *overrides,
    )
    read: set[int] = set()
    neurons = DenseModel.neurons

    def watched(self: DenseModel, layer: int, *arguments: Any) -> Any:
        read.add(layer)
        return neurons(self, layer, *arguments)

    with (
        patch.object(DenseModel, "neurons", watched),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        run(config)
    return read


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]


def test_while_it_is_read_or_before(dense: Path, tmp_path: Path) -> None:
    source = f"source={dense / 'qwen3'}"
    assert main([source, f"target_dir={tmp_path / 'moe'}", "recipe=drop", *RECIPE]) == 0
    converted = ["model=hf", f"model.source={tmp_path / 'moe'}"]
    upcycled = ["model=upcycle", f"model.{source}", "recipe@model.upcycle.recipe=drop"]
    upcycled += [f"model.upcycle.{value}" for value in RECIPE]
    for name, overrides in (("converted", converted), ("upcycled", upcycled)):
        read = run_ranks(train, 2, str(dense), str(tmp_path / name), *overrides)
        assert read == ([set(), set()] if name == "converted" else [{0, 1, 2}] * 2)
    assert len(losses(tmp_path / "converted")) == 3
    assert losses(tmp_path / "upcycled") == losses(tmp_path / "converted")


def test_every_rank_makes_its_own_experts(dense: Path) -> None:
    """Of a Drop-upcycled model on 2 ranks each makes only half of the experts."""
    made = run_ranks(experts_made, 2, str(dense / "qwen3"))
    assert made == [{0, 1}, {2, 3}]


def experts_made(source: str) -> set[int]:
    config = load(
        "model=upcycle", f"model.source={source}", "recipe@model.upcycle.recipe=drop",
        "model.upcycle.recipe.num_experts=4", "experiment=quickstart",
    )  # fmt: skip
    made: set[int] = set()
    expert = Drop.expert

    def watched(self: Drop, ffn: LayerFFN, number: int, matrix: Any) -> Any:
        made.add(number)
        return expert(self, ffn, number, matrix)

    moe = upcycled(config.model.upcycle, [dense_model(HFCheckpoint(source))], seed=0)
    mesh = ParallelMesh.build(ep=2)
    with patch.object(Drop, "expert", watched):
        build_model(moe.config, mesh, seed=0, planner=home_plan, checkpoint=moe)
    return made


def test_nothing_to_upcycle(dense: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.source and model\.family are both null"):
        check(load("experiment=quickstart", "model=upcycle"), 1)


def test_groups_stay_whole_in_bf16(dense: Path, tmp_path: Path) -> None:
    """Routers stay in fp32 here, so every token gets all parts of the copies that it chooses."""
    recipe = ["recipe.num_experts=16", "recipe.top_k=4", "recipe.granularity=2"]
    overrides = [
        "model=upcycle",
        f"model.source={dense / 'qwen3'}",
        "recipe@model.upcycle.recipe=split",
        *[f"model.upcycle.{value}" for value in recipe],
        "train.precision=bf16",
        "train.record_routing_every=1",
        "train.steps=1",
        "train.batch_size=32",
    ]
    run_ranks(train, 2, str(dense), str(tmp_path), *overrides)
    (recorded,) = (tmp_path / "routing").glob("*.npz")
    trace = load_trace(recorded)
    chosen_TLK = np.sort(trace.ids_TLK, axis=2)
    assert chosen_TLK.shape == (1024, 3, 4)
    first, second = chosen_TLK[..., ::2], chosen_TLK[..., 1::2]
    assert (second == first + 1).all() and (first % 2 == 0).all()
    assert len(np.unique(first)) == 8  # all copies are chosen by some token
