"""A whole run with the DeepSpeed engine, as a user starts it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.test_run import corpus, metrics, train


def test_a_run_goes_on_with_the_torch_engine(tmp_path: Path) -> None:
    """2 ranks under ZeRO 2, then one process from step 3: the same losses, the same export."""
    text, run_dir = corpus(tmp_path / "text"), tmp_path / "run"
    train(text, run_dir, 2, "engine=deepspeed", "engine.zero_stage=2", "checkpoint.every=3")
    first = [record["train/loss"] for record in metrics(run_dir)]
    shutil.rmtree(run_dir / "checkpoints/step-00000006")
    (run_dir / "export").rename(tmp_path / "export")
    train(text, run_dir, 1)
    again = {record["step"]: record["train/loss"] for record in metrics(run_dir)}
    assert list(again.values()) == pytest.approx(first, rel=1e-5)
    models = [AutoModelForCausalLM.from_pretrained(f / "export") for f in (tmp_path, run_dir)]
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
