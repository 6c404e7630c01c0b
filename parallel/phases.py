"""What the MoE layers do and when: events for torch.profiler, and seconds when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.profiler import record_function

PHASES = ("decide", "borrow", "dispatch", "compute", "combine")
LAYERS_CPU = "layers_cpu"

_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)
_layer_seconds: ContextVar[dict[int, float] | None] = ContextVar("layer_seconds", default=None)


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
