"""Strikes a rank of a real run in the middle of something: killed, or out of memory.

FAULT is "WHERE RANK STEP SIGN": the rank is struck in that step (of this start of the run, from 0)
and leaves the file SIGN, with the time; a rank that finds the file is spared.
"""

from __future__ import annotations

import datetime
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHERE = ("forward", "backward", "optimizer", "checkpoint", "relocation", "memory")


def arm(fault: str) -> None:
    """Make the fault happen in this process, if it is the rank that is meant."""
    where, rank, step, sign = fault.split(" ", 3)
    if os.environ["RANK"] == rank and not Path(sign).exists():
        STRIKES[where](int(step), Path(sign))


def die(sign: Path) -> None:
    mark(sign)
    os.kill(os.getpid(), signal.SIGKILL)


def mark(sign: Path) -> None:
    with sign.open("w") as file:  # on the disk before this process is gone
        file.write(str(time.monotonic()))
        file.flush()
        os.fsync(file.fileno())


def before(owner: Any, name: str, number: int, strike: Callable[[], None]) -> None:
    """Strike before the call of that number, from 0, of a function."""
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        if calls[0] == number:
            strike()
        calls[0] += 1
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def in_forward(step: int, sign: Path) -> None:
    from parallel.layer import ExpertParallel

    before(ExpertParallel, "forward", 2 * step + 1, lambda: die(sign))  # of two layers


def in_backward(step: int, sign: Path) -> None:
    from parallel import grouped

    # two layers with two products each, the second layer's first
    before(grouped, "_weight_gradients", 4 * step + 2, lambda: die(sign))


def in_optimizer(step: int, sign: Path) -> None:
    from torch.optim import adam

    before(adam, "adam", 2 * step + 1, lambda: die(sign))  # between two groups of parameters


def in_checkpoint(step: int, sign: Path) -> None:
    from trainer.checkpoint_files import CheckpointWriter

    before(CheckpointWriter, "write_data", step, lambda: die(sign))


def in_relocation(step: int, sign: Path) -> None:
    from parallel import relocate

    before(relocate, "post", step, lambda: die(sign))


def out_of_memory(step: int, sign: Path) -> None:
    """No more memory for this process than it has, from a step on."""
    from trainer.engine import TorchEngine

    def limit() -> None:
        import torch

        mark(sign)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, used + 2**20))
        torch.ones(2**26)  # what the step would have needed

    before(TorchEngine, "_backward", step, limit)


def shift_clock(seconds: float) -> None:
    """The wall clock of this process is off, for Python and for torchrun's rendezvous."""
    real = time.time
    time.time = lambda: real() + seconds
    if "RANK" in os.environ:
        return
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(seconds=seconds)

    vars(dynamic_rendezvous)["datetime"] = Shifted


STRIKES = {
    "forward": in_forward,
    "backward": in_backward,
    "optimizer": in_optimizer,
    "checkpoint": in_checkpoint,
    "relocation": in_relocation,
    "memory": out_of_memory,
}
