"""Exports of runs with routers: plain transformers reach the run's validation loss, or the run is
refused before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from configs.compose import load
from tests.families import tiny_config
from tests.ranks import run_ranks
from tests.trainer.test_run import TINY, corpus
from trainer.data import build_data
from trainer.engine import IGNORED
from trainer.routers.chosen import chosen_router
from trainer.run import run

SIGMOID = (
    "model=tiny_sigmoid",
    "~model.overrides.moe_intermediate_size",
    "+model.overrides.moe_intermediate_size=16",
)
LOOKS = "train.allow_lookahead=true"
EXPORTED: dict[str, tuple[str, ...]] = {
    "native": (),
    "switch": (),
    "sinkhorn": (LOOKS,),
    "rectified": (LOOKS,),
    "local": ("mesh.ranks_per_node=1",),
    "shared": (),
    "group_limited": ("router.groups=2", *SIGMOID),
}
REFUSED = {
    "expert_choice": (LOOKS,),
    "group_balanced": (),
    "prototypes": (),
    "group_limited": ("router.groups=2",),
    "assignment": (LOOKS, "model.overrides.num_experts_per_tok=1"),
    "top_p": (),
    "relu": (),
    "hash": (),
    "random": (),
    "cosine": (),
    "recurrent": (),
    "null_experts": (),
    "zero_experts": (),
}


def composed(text: Path, folder: Path, *overrides: str) -> Any:
    files = f"data.sources.text.paths={text}/*.txt"
    return load(*TINY, files, f"run.dir={folder}", *overrides)


def whole_run(*arguments: Any) -> None:
    run(composed(*arguments))


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_reach_the_validation_loss(name: str, tmp_path: Path) -> None:
    text, folder = corpus(tmp_path / "text"), tmp_path / "run"
    overrides = f"router={name}", "train.steps=4", *EXPORTED[name]
    run_ranks(whole_run, 2, text, folder, *overrides)
    config = composed(text, folder, *overrides)
    data = build_data(config.data, config.train.seq_len, rank=0, barrier=lambda: None)
    assert data.validation is not None
    batch = data.validation.batch(data.validation.spread(8))
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    if name == "group_limited":
        assert (model.config.n_group, model.config.topk_group) == (2, 1)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    want = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation_loss"] == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name(name: str, tmp_path: Path) -> None:
    overrides = f"router={name}", "checkpoint.export=true", *REFUSED[name]
    config = composed(tmp_path, tmp_path / "run", *overrides)
    one = {"num_experts_per_tok": 1} if name == "assignment" else {}
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", **one))
    mesh: Any = SimpleNamespace(ep_size=2, rank=0)
    with pytest.raises(ValueError, match="would write a qwen3_moe in which plain transformers"):
        chosen_router(config, model, mesh)


def test_every_router_is_exported_or_refused() -> None:
    choices = {path.stem for path in Path("configs/router").glob("*.yaml")}
    assert choices == {*EXPORTED, *REFUSED, "replay"}  # which chooses as the family in evaluation
