"""Ranks that die: the others say who."""

from __future__ import annotations

import os
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
    assert [(tmp_path / name).read_text() for name in "01"] == ["[2]", "[2]"]


def whole_group() -> list[int]:
    missing = RollCall().missing()
    dist.barrier()
    return missing


def test_nobody_is_missing_from_a_whole_group() -> None:
    assert run_ranks(whole_group, 3) == [[], [], []]
