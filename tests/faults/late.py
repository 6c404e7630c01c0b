"""What ranks that torchrun started do in tests: `python -m tests.faults.late FUNCTION`."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from parallel.mesh import ParallelMesh
from trainer.ranks import start_ranks

TIMEOUT_S = 3.0


def late_and_frozen() -> None:
    """Of two EP groups of two, rank 1 starts later than the timeout, and later it freezes."""
    if os.environ["RANK"] == "1":
        time.sleep(2 * TIMEOUT_S)
    start_ranks(TIMEOUT_S)
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    dist.barrier()
    if mesh.rank == 1:
        time.sleep(3 * TIMEOUT_S)
    if mesh.rank != 0:
        return
    begin = time.monotonic()
    try:
        dist.recv(torch.zeros(1), group=mesh.ep_group, group_src=1)
    except RuntimeError as error:
        seconds = time.monotonic() - begin
        if "Timed out" in str(error) and TIMEOUT_S - 1 < seconds < 2 * TIMEOUT_S:
            print("the group gave up in time", flush=True)


def forever() -> None:
    """Say who it is and wait."""
    start_ranks(TIMEOUT_S)
    os.write(1, f"{os.getpid()}\n".encode())  # in one piece: both ranks have the same output
    time.sleep(600)


if __name__ == "__main__":
    {"late_and_frozen": late_and_frozen, "forever": forever}[sys.argv[1]]()
    os._exit(0)  # the groups of a frozen rank would hold up an orderly exit
