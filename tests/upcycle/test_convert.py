"""Conversions as files: resumed after a kill, bounded in memory, refused when they must be."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.compose import load_upcycle
from parallel.memory import return_freed_memory
from tests.upcycle.models import random_model, saved
from trainer.upcycle.__main__ import main
from trainer.upcycle.convert import PARTIAL, RECEIPT, convert
from trainer.upcycle.plan import make_plan

SMALL_SHARDS = "max_shard_gb=2e-5"
MEASURES = sys.platform.startswith("linux")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "llama"
    saved(random_model("llama"), folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run(dense: Path | str, target: Path, *overrides: str) -> int:
    return main([f"source={dense}", f"target_dir={target}", *overrides])


def content(folder: Path) -> dict[str, bytes]:
    """Of all files but the receipt, which says where the source is."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECEIPT}


def test_one_command(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dense, tmp_path / "moe", SMALL_SHARDS) == 0
    said = capsys.readouterr().out
    assert "8 of width 48, top 2" in said and "yes" in said and "FAILED" not in said
    assert "no gradient until experts differ" in " ".join(said.split())
    receipt = json.loads((tmp_path / "moe" / RECEIPT).read_text())
    assert receipt["exact"] and receipt["seed"] == 0 and receipt["routing"] == "renormalised"
    assert receipt["recipe"]["num_experts"] == 8 and receipt["target"] == "qwen2_moe"
    assert len(receipt["files"]) > 3 and len(receipt["source_files"]) == 1
    assert "bit for bit" in receipt["measured"]["tensors"]
    assert "KL" in receipt["measured"]["outputs"]
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "moe" / PARTIAL).exists()


def test_dry_run_writes_nothing(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dense, tmp_path / "moe", "dry_run=true", "gpus=4") == 0
    said = capsys.readouterr().out
    plan = make_plan(load_upcycle(f"source={dense}", f"target_dir={tmp_path}"))
    total, active = plan.parameters
    model = AutoModelForCausalLM.from_config(plan.model.config)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    assert active == total - 3 * 6 * 3 * 32 * 48  # of 8 experts 6 are not met, in 3 layers
    assert f"{total:,}" in said and f"{active:,}" in said and "4 GPUs" in said
    assert not (tmp_path / "moe").exists()


def killed(after: int, *arguments: str) -> None:
    """Convert in another process that is killed after so many bytes."""

    def convert_until_then() -> None:
        left = after

        def advance(num_bytes: int) -> None:
            nonlocal left
            left -= num_bytes
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

        convert(make_plan(load_upcycle(*arguments)), advance)

    process = multiprocessing.get_context("fork").Process(target=convert_until_then)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("recipe", ["recipe=drop", "recipe=split recipe.granularity=4"])
def test_a_killed_conversion_goes_on(recipe: str, dense: Path, tmp_path: Path) -> None:
    """The files are those of a conversion that was not interrupted, whenever it was killed."""
    overrides = [*recipe.split(), SMALL_SHARDS, "verify=false"]
    assert run(dense, tmp_path / "whole", *overrides) == 0
    want = content(tmp_path / "whole")
    target = tmp_path / "killed"
    arguments = [f"source={dense}", f"target_dir={target}", *overrides]
    for after in (30_000, 90_000, 120_000):
        killed(after, *arguments)
        assert (target / PARTIAL).exists()
        assert main(["verify", str(target)]) != 0  # says that it is not complete
    complete = json.loads((target / PARTIAL).read_text())["files"]
    assert complete
    before = {name: (target / name).stat().st_mtime_ns for name in complete}
    assert run(dense, target, *overrides) == 0
    assert content(target) == want
    assert before == {name: (target / name).stat().st_mtime_ns for name in complete}  # kept


def test_another_conversion_is_not_mixed_in(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "killed"
    arguments = [f"source={dense}", f"target_dir={target}", SMALL_SHARDS, "seed=1"]
    killed(30_000, *arguments)
    found = content(target)
    assert run(dense, target, SMALL_SHARDS, "seed=2") == 1
    assert "holds another conversion" in capsys.readouterr().err
    assert content(target) == found
    torn = next(path for path in target.glob("*.safetensors"))
    os.truncate(torn, 100)  # a disk that lost what was written
    assert run(dense, target, SMALL_SHARDS, "seed=1") == 0


def test_a_target_that_is_not_empty(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"stale")
    assert run(dense, tmp_path) == 1
    assert "is not empty: old weights beside new ones" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == b"stale"


def test_a_full_disk(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        assert run(dense, tmp_path / "moe") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert "cannot write" in capsys.readouterr().err
    assert not list((tmp_path / "moe").glob("*.safetensors"))
    assert run(dense, tmp_path / "moe") == 0  # goes on


def test_a_read_only_source(dense: Path, tmp_path: Path) -> None:
    """Nothing is ever written beside the source."""
    before = {path: path.stat().st_mtime_ns for path in [dense, *dense.iterdir()]}
    assert run(dense, tmp_path / "moe") == 0
    assert before == {path: path.stat().st_mtime_ns for path in [dense, *dense.iterdir()]}


@pytest.mark.parametrize("fault", ["value", "truncated", "source", "receipt"])
def test_verify_finds_what_changed(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(random_model("qwen2"), tmp_path / "dense")
    assert run(tmp_path / "dense", tmp_path / "moe") == 0
    weights = tmp_path / "moe" / "model.safetensors"
    if fault == "value":
        with weights.open("r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(b"\x01\x02")
    elif fault == "truncated":
        os.truncate(weights, weights.stat().st_size - 8)
    elif fault == "source":
        saved(random_model("qwen2", seed=1), tmp_path / "dense")
    else:
        (tmp_path / "moe" / RECEIPT).write_text("{}")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "moe")]) != 0
    told = capsys.readouterr()
    assert "FAILED" in told.out or "error" in told.err
    assert "Traceback" not in told.err


def test_values_do_not_depend_on_files_or_order(dense: Path, tmp_path: Path) -> None:
    overrides = ["recipe=drop", "recipe.num_experts=3", "verify=false"]
    one = make_plan(load_upcycle(f"source={dense}", "target_dir=x", *overrides))
    two = make_plan(load_upcycle(f"source={dense}", "target_dir=x", *overrides, SMALL_SHARDS))
    keys = one.model.keys()
    backwards = {key: two.model.read(key) for key in reversed(keys)}
    assert all(torch.equal(one.model.read(key), backwards[key]) for key in keys)
    other = make_plan(load_upcycle(f"source={dense}", "target_dir=x", *overrides, "seed=1"))
    assert any(not torch.equal(one.model.read(key), other.model.read(key)) for key in keys)
    more = make_plan(
        load_upcycle(f"source={dense}", "target_dir=x", *overrides, "recipe.num_experts=5")
    )
    key = "model.layers.1.mlp.experts.2.down_proj"
    assert torch.equal(one.model.read(key), more.model.read(key))


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


def convert_and_measure(arguments: list[str], told: Connection) -> None:
    """Peak of anonymous memory above what there was before, and bytes written."""
    return_freed_memory()
    plan = make_plan(load_upcycle(*arguments))
    baseline, peak, running = anonymous_bytes(), 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.0002)

    thread = threading.Thread(target=watch)
    thread.start()
    convert(plan)
    running = False
    thread.join()
    told.send((peak - baseline, plan.num_bytes))


def measured(arguments: list[str]) -> tuple[int, int]:
    """What `convert_and_measure` tells of a conversion in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=convert_and_measure, args=(arguments, there))
    process.start()
    told: tuple[int, int] = here.recv()
    process.join()
    return told


@pytest.mark.skipif(not MEASURES, reason="only Linux tells anonymous memory (/proc/self/status)")
@pytest.mark.parametrize(
    "recipe",
    ["recipe=copy", "recipe=split recipe.num_experts=16 recipe.granularity=4", "recipe=drop"],
)
def test_memory_is_two_of_the_largest_tensors(recipe: str, tmp_path: Path) -> None:
    """Whatever the number of layers and experts: source and result are many times larger."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=6144,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    largest = 4 * 6144 * 512
    arguments = [f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'moe'}", *recipe.split()]
    extra, written = measured(arguments)
    source = (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert source > 4 * 2 * largest and written > 10 * 2 * largest
    assert extra <= 2 * largest, (extra / largest, written / largest)
