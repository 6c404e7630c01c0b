"""Seconds spent in each phase of the MoE layers' forward pass, when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

PHASES = ("decide", "borrow", "dispatch", "compute", "combine")

_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)


@contextmanager
def time_phases(wanted: bool) -> Iterator[dict[str, float]]:
    """Sum up the seconds of every phase inside; on GPUs this waits for the device at each."""
    seconds = dict.fromkeys(PHASES, 0.0)
    token = _seconds.set(seconds if wanted else None)
    try:
        yield seconds
    finally:
        _seconds.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """One phase of one layer; costs nothing worth mentioning unless timed."""
    seconds = _seconds.get()
    if seconds is None:
        yield
        return
    start = _now()
    yield
    seconds[name] += _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
