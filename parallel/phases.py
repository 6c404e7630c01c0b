"""What the MoE layers do and when: events for torch.profiler, and seconds when somebody asks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

PHASES = ("decide", "borrow", "dispatch", "compute", "combine")
LAYERS_CPU = "layers_cpu"

_products: ContextVar[Products | None] = ContextVar("products", default=None)
_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)
_layer_seconds: ContextVar[dict[int, float] | None] = ContextVar("layer_seconds", default=None)


class Products:
    """How long the experts' products of this rank took, and of how many rows they were.

    Read after the device has finished the step, so that no rank ever waits for this.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._spans: list[tuple[Any, Any]] = []

    def begin(self) -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def end(self, start: Any, rows: int) -> None:
        self._spans.append((start, self.begin()))
        self.rows += rows

    def seconds_per_row(self) -> float:
        """NaN without rows."""
        if not self.rows:
            return math.nan
        if torch.cuda.is_available():
            seconds = sum(start.elapsed_time(end) for start, end in self._spans) / 1e3
        else:
            seconds = sum(end - start for start, end in self._spans)
        return seconds / self.rows


@contextmanager
def watch_products() -> Iterator[Products]:
    """Time the experts' products of the layers that run inside."""
    watched = Products()
    token = _products.set(watched)
    try:
        yield watched
    finally:
        _products.reset(token)


@contextmanager
def timed_products(rows: int) -> Iterator[None]:
    """Products of some rows with the matrices of experts, in a forward pass."""
    watched = _products.get()
    if watched is None:
        yield
        return
    start = watched.begin()
    yield
    watched.end(start, rows)


def event(name: str) -> AbstractContextManager:
    """Marks what runs inside as `evenkeel.<name>` in a torch.profiler trace, if one is taken."""
    if torch.autograd._profiler_enabled():  # record_function alone costs 6 us without a profiler
        return record_function(f"evenkeel.{name}")
    return nullcontext()


@contextmanager
def time_phases(wanted: bool) -> Iterator[dict[str, float]]:
    """Sum up the seconds of every phase inside; on GPUs this waits for the device at each.

    LAYERS_CPU is the time that this rank's own thread was busy in the layers, forward and
    backward: what a rank costs where ranks share cores and wall time says little.
    """
    seconds = dict.fromkeys((*PHASES, LAYERS_CPU), 0.0)
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


def watch_backward(x_TD: Tensor, out_TD: Tensor) -> None:
    """Add the busy time of a layer's backward pass, from its output's gradient to its input's."""
    seconds = _seconds.get()
    if seconds is None or not (x_TD.requires_grad and out_TD.requires_grad):
        return
    started: list[float] = []

    def stop(gradient: Tensor) -> None:
        seconds[LAYERS_CPU] += time.thread_time() - started.pop()

    out_TD.register_hook(lambda gradient: started.append(time.thread_time()))
    x_TD.register_hook(stop)


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
    of_phases, of_layers = _seconds.get(), _layer_seconds.get()
    if of_phases is None and of_layers is None:
        yield
        return
    start, busy = _now(), time.thread_time()
    yield
    if of_phases is not None:
        of_phases[LAYERS_CPU] += time.thread_time() - busy
    if of_layers is not None:
        of_layers[index] = of_layers.get(index, 0.0) + _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
