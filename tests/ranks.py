"""Run a function on several real ranks: forked processes, gloo, a file store."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LINGER_S = 10.0


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo world and return the results by rank.

    Ranks are forked, so nothing is imported again. A rank that raises fails the call with its
    traceback; ranks that hang print where they stood and fail it after `timeout_s` seconds.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank, args=(function, rank, world_size, args, folder, timeout_s)
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _wait(ranks, Path(folder), timeout_s)
        results, failures = [], []
        for rank, process in enumerate(ranks):
            path = Path(folder) / f"result{rank}"
            if not path.exists():
                failures.append(f"rank {rank} left no result (exit code {process.exitcode})")
                continue
            ok, value = torch.load(path, weights_only=False)
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            raise AssertionError("\n".join(failures))
        return results


def _wait(ranks: Sequence[BaseProcess], folder: Path, timeout_s: float) -> None:
    """Mark those that end, so that nobody waits for what they leave; kill those that hang."""
    alive, end = dict(enumerate(ranks)), time.monotonic() + timeout_s
    while alive and time.monotonic() < end:
        wait([process.sentinel for process in alive.values()], end - time.monotonic())
        for rank in [rank for rank, process in alive.items() if not process.is_alive()]:
            (folder / f"ended{rank}").touch()
            del alive[rank]
    for process in alive.values():
        process.kill()
        process.join()


def _is_done(folder: str, rank: int) -> bool:
    return any(os.path.exists(f"{folder}/{name}{rank}") for name in ("result", "ended"))


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple,
    folder: str,
    timeout_s: float,
) -> None:
    faulthandler.dump_traceback_later(timeout_s * 0.9)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    result: tuple[bool, Any]
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        result = True, function(*args)
    except BaseException:
        result = False, traceback.format_exc()
    torch.save(result, f"{folder}/partial{rank}")
    os.replace(f"{folder}/partial{rank}", f"{folder}/result{rank}")
    end = time.monotonic() + LINGER_S
    # leaving early would break peers that still connect
    while result[0] and time.monotonic() < end:
        if all(_is_done(folder, other) for other in range(world_size)):
            break
        time.sleep(0.005)
    os._exit(0)  # skips the teardown of gloo's threads
