"""Whole runs as a user starts them: torchrun, resume on other ranks, export, faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model=tiny",
    "data=text",
    "train.steps=6",
    "train.batch_size=8",
    "train.micro_batch_size=2",
    "train.seq_len=32",
    "train.eval_batches=1",
    "optim.lr=0.01",
    "model.overrides.num_hidden_layers=2",
    "model.overrides.hidden_size=32",
    "model.overrides.moe_intermediate_size=16",
    "model.overrides.head_dim=8",
]


def corpus(folder: Path) -> Path:
    """A few hundred small text files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    words = ["level", "expert", "token", "router", "rank", "plan", "home", "slot"]
    for number in range(60):
        picks = torch.randint(0, len(words), (80,), generator=generator).tolist()
        (folder / f"{number}.txt").write_text(" ".join(words[pick] for pick in picks))
    return folder


def command(text: Path, run_dir: Path, ranks: int, *overrides: str) -> list[str]:
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    files = f"data.sources.text.paths={text}/*.txt"
    values = [*TINY, files, f"run.dir={run_dir}", *overrides]
    return [*launch, "trainer.train", *sorted(values, key=lambda value: value != "-m")]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def attempt(
    text: Path, run_dir: Path, ranks: int, *overrides: str
) -> subprocess.CompletedProcess[str]:
    """Run until it ends, well or not."""
    return subprocess.run(
        command(text, run_dir, ranks, *overrides),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def train(text: Path, run_dir: Path, ranks: int, *overrides: str) -> str:
    """Run to a good end; its output."""
    done = attempt(text, run_dir, ranks, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_resume_on_other_ranks_and_export(tmp_path: Path) -> None:
    """4 ranks EP 4 to step 3, then 2 ranks EP 2: the same losses as one process all the way."""
    text = corpus(tmp_path / "text")
    one, split = tmp_path / "one", tmp_path / "split"
    train(text, one, 1, "train.time_layers_every=2")
    train(text, split, 4, "train.stop_after_s=1e9", "checkpoint.every=3")
    # go back to step 3, as after a crash
    for path in (split / "checkpoints").glob("step-*6"):
        shutil.rmtree(path)
    shutil.rmtree(split / "export")
    output = train(text, split, 2, "mesh.ep=2")
    losses = {m["step"]: m["train/loss"] for m in metrics(split)}  # the resumed steps come last
    for record in metrics(one):
        timed = {"phase/dispatch_s", "phase/compute_s"} <= set(record)
        assert timed == (record["step"] % 2 == 0)
        assert losses[record["step"]] == pytest.approx(record["train/loss"], rel=1e-4)
    assert "order-3 byte model" in output and "bits per byte" in output
    assert "is complete at step 6" in train(text, split, 1)
    refused = attempt(text, split, 1, "train.steps=7")
    assert refused.returncode != 0
    assert "export) is not empty" in refused.stderr
    summary = json.loads((split / "summary.json").read_text())
    assert summary["ranks"] == 2 and summary["steps"] == 6
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(split / "export", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(split / "export")
    ids = torch.tensor([tokenizer.encode("level expert")])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)


def test_sweep_on_two_ranks(tmp_path: Path) -> None:
    """Each job of a sweep has its own folder and sees the same ranks."""
    text = corpus(tmp_path / "text")
    folder = f"{tmp_path}/sweep${{sweep_job:}}"
    train(text, Path(folder), 2, "-m", "seed=0,1", "train.steps=2", "checkpoint.export=false")
    summaries = sorted((tmp_path / "sweep").glob("*/summary.json"))
    losses = [json.loads(path.read_text())["loss"] for path in summaries]
    assert len(set(losses)) == 2


def start(text: Path, run_dir: Path, ranks: int, *overrides: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, once it has done three steps."""
    process = subprocess.Popen(
        command(text, run_dir, ranks, "train.steps=100000", *overrides),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        lines = run_dir / "metrics.jsonl"
        if lines.exists() and len(lines.read_text().splitlines()) >= 3:
            return process
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(process.communicate()[0])


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that a torchrun process started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_stops(tmp_path: Path, ranks: int) -> None:
    text, run_dir = corpus(tmp_path / "text"), tmp_path / "run"
    process = start(text, run_dir, ranks)
    for pid in ranks_of(process) if ranks > 1 else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    last = metrics(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step-{last:08d}" / "complete.json").exists()
    assert not (run_dir / "export").exists()  # an unfinished run is not exported


def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    text, run_dir = corpus(tmp_path / "text"), tmp_path / "run"
    process = start(text, run_dir, 2)
    begin = time.monotonic()
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - begin < 60
    assert "rank      : 1 (local_rank: 1)" in output or "rank 1 on " in output
    assert "exitcode  : -9" in output


def test_nonfinite_loss_stops_or_is_skipped(tmp_path: Path) -> None:
    text = corpus(tmp_path / "text")
    explode = ["optim.lr=1e30", "train.max_grad_norm=0"]
    done = attempt(text, tmp_path / "stop", 1, *explode)
    assert done.returncode != 0
    assert "train.on_nonfinite=skip" in done.stderr
    (saved,) = (tmp_path / "stop").glob("nonfinite-step-*.json")
    assert len(json.loads(saved.read_text())["sequence_ids"]) == 8
    train(
        text, tmp_path / "skip", 1, *explode, "train.on_nonfinite=skip", "checkpoint.export=false"
    )
    summary = json.loads((tmp_path / "skip" / "summary.json").read_text())
    assert summary["skipped_steps"] > 0 and summary["steps"] == 6
