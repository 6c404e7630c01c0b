"""What the MoE layers decided: routing counts and plans, decided once per forward.

Activation checkpointing repeats a forward; a repeated forward takes its decisions from the
first one instead of deciding again, so that neither routing nor plan can differ and no row is
counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.plan import DispatchPlan

Made = TypeVar("Made")

# Operators by which the routers of `transformers` choose experts; each returns (values, ids).
CHOOSING = (
    torch.ops.aten.topk.default,
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
    torch.ops.aten.max.dim,
)


@dataclass(frozen=True)
class Decision:
    """The decision of one MoE layer in one forward.

    Attributes:
        layer: index among the MoE layers. counts_RE: int64 rows per source rank and expert.
        plan: who computes them. planner_s: seconds that making it took.
    """

    layer: int
    counts_RE: Tensor
    plan: DispatchPlan
    planner_s: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """What this rank sends to other ranks for one MoE layer in one forward and its backward.

    Attributes:
        layer: index among the MoE layers.
        rows_within, rows_across: bytes of tokens and their outputs in the forward pass, within
            the node and to other nodes; the backward pass sends as many again.
        experts_within, experts_across: bytes of borrowed weights and of gradients returned.
    """

    layer: int
    rows_within: int
    rows_across: int
    experts_within: int
    experts_across: int


@dataclass(frozen=True)
class Collected:
    """What all layers decided and sent, in order, each once."""

    decisions: list[Decision]
    traffic: list[Traffic]


_collected: ContextVar[Collected | None] = ContextVar("collected", default=None)
_routing: ContextVar[list[tuple[int, Tensor]] | None] = ContextVar("routing", default=None)
_tape: ContextVar[list[Any] | None] = ContextVar("tape", default=None)
_replay: ContextVar[Iterator[Any] | None] = ContextVar("replay", default=None)


@contextmanager
def collect_routing(wanted: bool = True) -> Iterator[list[tuple[int, Tensor]]]:
    """Collect the routing of the layers that run inside: layer index and expert ids [T, K]."""
    routing: list[tuple[int, Tensor]] = []
    token = _routing.set(routing if wanted else None)
    try:
        yield routing
    finally:
        _routing.reset(token)


def report_routing(layer: int, ids_TK: Tensor) -> None:
    """Tell which experts a layer's tokens chose, if somebody collects it; once per forward."""
    routing = _routing.get()
    if routing is not None and not is_replaying():
        routing.append((layer, ids_TK.to("cpu", torch.int32)))


@contextmanager
def collect_layers() -> Iterator[Collected]:
    """Collect what the layers that run inside decide and send."""
    collected = Collected([], [])
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def once(make: Callable[[], Made]) -> Made:
    """What `make` returns: made now, or in a repeated forward what was made before."""
    replay = _replay.get()
    if replay is not None:
        return next(replay)
    made = make()
    tape = _tape.get()
    if tape is not None:
        tape.append(made)
    return made


def decide(make: Callable[[], Decision]) -> Decision:
    """A layer's decision, made once per forward and collected once."""
    decision = once(make)
    collected = _collected.get()
    if collected is not None and not is_replaying():
        collected.decisions.append(decision)
    return decision


def report_traffic(make: Callable[[], Traffic]) -> None:
    """Tell what a layer sends, if somebody collects it; once per forward."""
    collected = _collected.get()
    if collected is not None and not is_replaying():
        collected.traffic.append(make())


def is_replaying() -> bool:
    """Whether this is a repeated forward, whose routing was counted before."""
    return _replay.get() is not None


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` for torch.utils.checkpoint: keeps the choice of experts, counts and plans."""
    tape: list[Any] = []
    choices: list[tuple[Tensor, ...]] = []
    return _Recording(tape, choices), _Repeating(tape, choices)


class _Recording(TorchDispatchMode):
    """The first forward: notes decisions and what the choosing operators returned."""

    def __init__(self, tape: list[Any], choices: list[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.tape, self.choices = tape, choices

    def __enter__(self) -> _Recording:
        self.token = _tape.set(self.tape)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _tape.reset(self.token)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = op(*args, **(kwargs or {}))
        if op in CHOOSING:
            self.choices.append(tuple(part.clone() for part in output))
        return output


class _Repeating(TorchDispatchMode):
    """A repeated forward: the same decisions and choices, whatever rounding says this time."""

    def __init__(self, tape: list[Any], choices: list[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.tape, self.choices = tape, choices

    def __enter__(self) -> _Repeating:
        self.token, self.next_choice = _replay.set(iter(self.tape)), iter(self.choices)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _replay.reset(self.token)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in CHOOSING:
            return tuple(part.clone() for part in next(self.next_choice))
        return op(*args, **(kwargs or {}))
