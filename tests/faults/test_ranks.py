"""Ranks that die: the others say who."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trainer.ranks
from tests.ranks import run_ranks
from trainer.ranks import RollCall
from trainer.run import _explain_broken_group


def dying_group(folder: str) -> None:
    """Rank 2 of 3 dies between two collectives; the others write down whom they miss."""
    rank, roll_call = dist.get_rank(), RollCall()
    dist.all_reduce(torch.zeros(1))
    if rank == 2:
        os.kill(os.getpid(), 9)
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.zeros(1))
    Path(folder, str(rank)).write_text(str(roll_call.missing()))


def test_a_dead_rank_is_named_by_all_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 2 left no result \(exit code -9\)"):
        run_ranks(dying_group, 3, str(tmp_path))
    assert [(tmp_path / name).read_text() for name in "01"] == [
        f"['2 on {socket.gethostname()}']"
    ] * 2


def losing_the_store(folder: str) -> None:
    """Rank 0, which keeps the store, is gone: nobody can be asked, so it is the one."""
    rank, roll_call = dist.get_rank(), RollCall()
    dist.all_reduce(torch.zeros(1))
    if rank == 0:
        os.kill(os.getpid(), 9)
    pytest.MonkeyPatch().setattr(trainer.ranks, "_store", gone)
    Path(folder, str(rank)).write_text(str(roll_call.missing()))


def gone() -> None:
    raise dist.DistNetworkError("connection refused")


def test_a_rank_that_took_the_store_along_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 0 left no result \(exit code -9\)"):
        run_ranks(losing_the_store, 2, str(tmp_path))
    assert (tmp_path / "1").read_text() == f"['0 on {socket.gethostname()}']"


def freezing_group(folder: str) -> None:
    """Rank 1 of 3 freezes; a collective gives up after its time, and the others name it."""
    rank, roll_call = dist.get_rank(), RollCall()
    impatient = dist.new_group(timeout=datetime.timedelta(seconds=3))
    pids: list[int] = [0] * 3
    dist.all_gather_object(pids, os.getpid())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"Timed out|Connection"):
        dist.all_reduce(torch.zeros(1), group=impatient)
    if rank == 0:
        assert 2 < time.monotonic() - started < 10
    Path(folder, str(rank)).write_text(str(roll_call.missing()))
    if rank == 0:
        while not Path(folder, "2").exists():
            time.sleep(0.1)
        os.kill(pids[1], signal.SIGKILL)


def test_a_frozen_rank_is_named_in_the_configured_time(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 left no result \(exit code -9\)"):
        run_ranks(freezing_group, 3, str(tmp_path))
    assert (tmp_path / "0").read_text() == f"['1 on {socket.gethostname()}']"


def whole_group() -> list[str]:
    missing = RollCall().missing()
    dist.barrier()
    return missing


def test_nobody_is_missing_from_a_whole_group() -> None:
    assert run_ranks(whole_group, 3) == [[], [], []]


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistNetworkError("connection reset"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_ranks_are_called_if_the_group_broke(error: RuntimeError, asked: bool) -> None:
    calls: list[int] = []
    roll_call: Any = SimpleNamespace(missing=lambda: calls.append(1))
    _explain_broken_group(error, roll_call)
    assert bool(calls) is asked


def torchrun(function: str, ranks: int) -> str:
    """Run `python -m tests.faults.late FUNCTION` on real ranks; their output."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    done = subprocess.run(
        [sys.executable, *words, "tests.faults.late", function],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_ranks_may_start_late_but_not_freeze_in_any_group() -> None:
    assert "the group gave up in time" in torchrun("late_and_frozen", 4)


@pytest.mark.slow
def test_ranks_end_with_their_torchrun() -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    process = subprocess.Popen(
        [sys.executable, *words, "tests.faults.late", "forever"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids):
        assert time.monotonic() < end, "ranks have outlived their torchrun"
        time.sleep(0.05)
