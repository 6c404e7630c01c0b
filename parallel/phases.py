"""What the MoE layers do and when: events for torch.profiler, and seconds when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch.profiler import record_function

PHASES = ("decide", "borrow", "dispatch", "compute", "combine")

_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)
_layer_seconds: ContextVar[dict[int, float] | None] = ContextVar("layer_seconds", default=None)


def event(name: str) -> AbstractContextManager:
    """Marks what runs inside as `evenkeel.<name>` in a torch.profiler trace, if one is taken."""
    if torch.autograd._profiler_enabled():  # record_function alone costs 6 us without a profiler
        return record_function(f"evenkeel.{name}")
    return nullcontext()


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
    start = _now() if seconds is not None else 0.0
    with event(name):
        yield
    if seconds is not None:
        seconds[name] += _now() - start


@contextmanager
def time_layers() -> Iterator[dict[int, float]]:
    """Sum up the seconds of every MoE layer's forward pass inside, by layer index."""
    seconds: dict[int, float] = {}
    token = _layer_seconds.set(seconds)
    try:
        yield seconds
    finally:
        _layer_seconds.reset(token)


@contextmanager
def timed_layer(index: int) -> Iterator[None]:
    """One forward pass of one layer."""
    seconds = _layer_seconds.get()
    if seconds is None:
        yield
        return
    start = _now()
    yield
    seconds[index] = seconds.get(index, 0.0) + _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
