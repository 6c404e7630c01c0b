"""Where a run starts from, and the checkpoints that it refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.mesh import ParallelMesh
from tests.ranks import run_ranks
from tests.trainer.checkpoint_runs import make_engine, message, save
from trainer.checkpoint import Checkpointer


def load_into(directory: str, path: str, change: str) -> str:
    """The refusal to load a checkpoint into a run that differs from the one that saved it."""
    engine = make_engine(num_experts=4 if change == "experts" else 8, ep=2)
    if change == "top-k":
        engine.model.config.num_experts_per_tok = 3
        engine.model.config.rms_norm_eps = 0.5
    if change == "buffer":
        engine.model.register_buffer("extra_buffer", torch.zeros(3))
    if change == "no norm":
        del engine.model.model.norm
    if change == "dtype":
        engine.model.float()
    if change == "optimizer":
        engine.optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1, momentum=0.9)
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    return message(lambda: checkpointer.load(path, engine.model, engine.optimizer))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("experts", "of another model: num_local_experts is 8 there and 4 here"),
        (
            "top-k",
            "num_experts_per_tok is 2 there and 3 here; rms_norm_eps is 1e-06 there and 0.5 here",
        ),
        ("buffer", "extra_buffer is missing there"),
        ("no norm", "model.norm.weight is unknown here"),
        ("dtype", "is torch.float64 (64, 32) there and torch.float32 (64, 32) here"),
        (
            "optimizer",
            "its state is ['exp_avg', 'exp_avg_sq', 'lr', 'step'] there and "
            "['lr', 'momentum_buffer'] here",
        ),
    ],
)
def test_another_model_is_refused(change: str, said: str, saved_runs: dict[str, Any]) -> None:
    directory, _ = saved_runs["qwen3, EP 4"]
    path = f"{directory}/step-00000002"
    for text in run_ranks(load_into, 2, directory, path, change):
        assert text.startswith(f"ValueError: checkpoint {path} is of another")
        assert said in text


def resolve_cases(directory: str) -> dict[str, Any]:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(directory, mesh=engine.mesh, asynchronous=False)
    said: dict[str, Any] = {"auto, empty": checkpointer.resolve("auto")}
    said["none, empty"] = checkpointer.resolve("none")
    for step in (1, 2):
        save(engine, checkpointer, step)
    said["auto"] = checkpointer.resolve("auto")
    said["path"] = checkpointer.resolve(f"{directory}/step-00000002")
    for resume in ("none", "missing", "", "step-00000001"):
        path = resume if resume == "none" else f"{directory}/{resume}"
        said[resume] = message(lambda path=path: checkpointer.resolve(path))
    said["again"] = message(lambda: save(engine, checkpointer, 2))
    said["keep"] = message(lambda: Checkpointer(directory, mesh=engine.mesh, keep=0))
    return said


def test_where_to_start(tmp_path: Path) -> None:
    first, second = run_ranks(resolve_cases, 2, str(tmp_path))
    assert first == second
    newest = tmp_path / "step-00000002"
    assert (first["auto, empty"], first["none, empty"]) == (None, None)
    assert (first["auto"], first["path"]) == (newest, newest)
    later = f"but {tmp_path} holds checkpoints up to step 2; use checkpoint.resume=auto"
    assert f"checkpoint.resume (none) starts at step 0, {later}" in first["none"]
    assert f"step-00000001) starts at step 1, {later}" in first["step-00000001"]
    assert "missing: there is no such folder" in first["missing"]
    assert f"complete.json is missing; {newest} is complete" in first[""]
    assert f"checkpoint {newest} exists; checkpoints are never overwritten" in first["again"]
    assert first["keep"] == "ValueError: checkpoint.keep (0) must be >= 1"


def latest_of(directory: str) -> Path | None:
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    return Checkpointer(directory, mesh=mesh).latest()


def test_newer_format_is_not_passed_over(
    tmp_path: Path, saved_runs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "step-00000007"
    path.mkdir()
    (path / "complete.json").write_text('{"format": 2, "files": {}}')
    with caplog.at_level(logging.WARNING):
        assert run_ranks(latest_of, 1, str(tmp_path)) == [path]
    directory, _ = saved_runs["qwen3, EP 4"]
    for text in run_ranks(load_into, 2, directory, str(path), "nothing"):
        assert text.endswith(
            f"checkpoint {path}: its format (2) is newer than 1, the newest that this version "
            f"reads; update Evenkeel"
        )
