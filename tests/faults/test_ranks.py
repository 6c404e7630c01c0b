"""Ranks that die: the others say who."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.ranks import RollCall


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
