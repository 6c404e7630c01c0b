"""The process group of a job: start it, agree in it, and say who is missing when it breaks."""

from __future__ import annotations

import ctypes
import datetime
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Made = TypeVar("Made")

ROLL_CALL_S = 3.0
START_S = 600.0
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
PATIENCE = datetime.timedelta(days=1)
_calls = itertools.count()


def start_ranks(timeout_s: float) -> None:
    """Join the process group that torchrun describes, or make one of a single rank.

    Uses NCCL for CUDA tensors where there is a GPU for every local rank, gloo for all others.
    The jobs of a sweep share one group: torchrun's store cannot introduce the ranks twice.

    Args:
        timeout_s: for a collective or message of any group that does not name its own. Before the
            first one, ranks wait START_S for those that are slow to start.

    Raises:
        ValueError: if there are more ranks on this node than GPUs.
    """
    if dist.is_initialized():
        return
    _end_with_torchrun()
    timeout = datetime.timedelta(seconds=timeout_s)
    # Groups of a mesh and of DeepSpeed are made without a timeout: half an hour, whatever the
    # group of all ranks has. Neither has a value for it, and gloo heeds none that is set later.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    backend = "gloo"
    if torch.cuda.is_available():
        local_rank, local_world = (
            int(os.environ.get("LOCAL_RANK", 0)),
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )
        if local_world > torch.cuda.device_count():
            raise ValueError(
                f"torchrun --nproc-per-node ({local_world}) must be <= the GPUs of this node "
                f"({torch.cuda.device_count()}); to use CPUs, hide them: CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        patience = datetime.timedelta(seconds=START_S)
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=patience)))
        if store.add("started", 1) == world:
            store.set("all started", "")
        store.wait(["all started"], patience)
        store.set_timeout(timeout)
    else:
        store, rank, world = dist.HashStore(), 0, 1
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("ranks", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )


def _end_with_torchrun() -> None:
    """Let the system kill this rank if its torchrun dies.

    Alone it would train on to the end, while no node can join or be replaced any more.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def finish_ranks() -> None:
    """Leave the process group, if there is one; at the end of the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


class RollCall:
    """Says which ranks are gone after a collective failed; every rank makes one at the start.

    A thread answers for its rank through the store, also while the rank itself still waits in a
    collective, so that only ranks whose process is gone stay silent.
    """

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.hosts = [""] * self.world
        dist.all_gather_object(self.hosts, socket.gethostname())
        self.call = f"roll_call/{next(_calls)}"  # the jobs of a sweep share the store
        self.thread = threading.Thread(target=self._answer, daemon=True, name="roll call")
        if self.world > 1:
            self.thread.start()

    def close(self) -> None:
        """End the answering thread; all ranks call this at the end of a run.

        A thread that still waits for the store while its interpreter shuts down is aborted, and its
        process with it, as soon as the rank that has the store is gone.
        """
        if self.world == 1:
            return
        with suppress(dist.DistError, RuntimeError):  # a store that is gone ends the thread too
            _store().set(self.call, "1")
        self.thread.join()

    def missing(self) -> list[str]:
        """Ranks that do not answer within a few seconds, each with its host.

        Rank 0 keeps the store, so it is the one that is missing if the store does not answer.
        """
        found: list[list[str]] = []
        asking = threading.Thread(target=lambda: found.append(self._ask()), daemon=True)
        asking.start()  # a store behind a cut link may keep it waiting for minutes
        asking.join(2 * ROLL_CALL_S)
        return found[0] if found else [f"0 on {self.hosts[0]}"]

    def _ask(self) -> list[str]:
        try:
            store = _store()
            store.set(self.call, "1")
            missing, end = [], time.monotonic() + ROLL_CALL_S
            for other in range(self.world):
                left = max(0.01, end - time.monotonic())
                try:
                    store.wait([f"{self.call}/{other}"], datetime.timedelta(seconds=left))
                except (dist.DistStoreError, RuntimeError):
                    missing.append(f"{other} on {self.hosts[other]}")
            return missing
        except (dist.DistError, RuntimeError):
            return [f"0 on {self.hosts[0]}"]

    def _answer(self) -> None:
        try:
            store = _store()
            store.wait([self.call], PATIENCE)
            store.set(f"{self.call}/{self.rank}", "1")
        except (dist.DistError, RuntimeError):  # the store is gone, and with it every caller
            return


def _store() -> Any:
    """A connection of its own to the store that introduced the ranks."""
    shared: Any = dist.distributed_c10d._get_default_store()
    return shared.clone()


def agree(value: float, group: dist.ProcessGroup, device: torch.device) -> float:
    """The largest of the ranks' values, the same on all of them."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return float(tensor)


class RankZeroFirst:
    """A process group of its own in which ranks wait for what rank 0 does alone.

    Writing a large export or tokenizing a large corpus may take longer than any timeout that is
    good for a training step. A rank that dies still ends the wait at once.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def wait(self) -> None:
        """Return when every rank has called this."""
        dist.barrier(group=self.group)

    def value(self, value: Any) -> Any:
        """Rank 0's value (any picklable one), on every rank."""
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def result(self, make: Callable[[], Made]) -> Made:
        """What `make` returns on rank 0, on every rank.

        Raises:
            ValueError: on every rank, if it raised that on rank 0.
        """
        made: Any = None
        if dist.get_rank() == 0:
            try:
                made = make()
            except ValueError as error:
                made = error
        made = self.value(made)
        if isinstance(made, ValueError):
            raise made
        return made
