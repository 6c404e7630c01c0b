"""What the MoE layers decided: routing counts and plans, decided once per forward.

Activation checkpointing repeats a forward; a repeated forward takes its decisions from the
first one instead of deciding again, so that neither routing nor plan can differ and no row is
counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from parallel.plan import DispatchPlan


@dataclass(frozen=True)
class Decision:
    """The decision of one MoE layer in one forward.

    Attributes:
        layer: index among the MoE layers. counts_RE: int64 rows per source rank and expert.
        plan: who computes them.
    """

    layer: int
    counts_RE: Tensor
    plan: DispatchPlan


_collected: ContextVar[list[Decision] | None] = ContextVar("collected", default=None)
_tape: ContextVar[list[Decision] | None] = ContextVar("tape", default=None)
_replay: ContextVar[Iterator[Decision] | None] = ContextVar("replay", default=None)


@contextmanager
def collect_decisions() -> Iterator[list[Decision]]:
    """Collect the decisions of all layers that run inside, in order, each once."""
    decisions: list[Decision] = []
    token = _collected.set(decisions)
    try:
        yield decisions
    finally:
        _collected.reset(token)


def decide(make: Callable[[], Decision]) -> Decision:
    """A layer's decision: made now, or in a repeated forward the one made before."""
    replay = _replay.get()
    if replay is not None:
        return next(replay)
    decision = make()
    for sink in (_tape.get(), _collected.get()):
        if sink is not None:
            sink.append(decision)
    return decision


def is_replaying() -> bool:
    """Whether this is a repeated forward, whose routing was counted before."""
    return _replay.get() is not None


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` for torch.utils.checkpoint: keeps the choice of experts, counts and plans."""
    tape: list[Decision] = []
    first, again = create_selective_checkpoint_contexts(_keep_choices)
    return _Contexts(first, _tape, lambda: tape), _Contexts(again, _replay, lambda: iter(tape))


def _keep_choices(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    aten = torch.ops.aten
    choices = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.argmax.default)
    return CheckpointPolicy.MUST_SAVE if op in choices else CheckpointPolicy.PREFER_RECOMPUTE


class _Contexts(AbstractContextManager):
    """One of the two contexts of a checkpoint together with its decision list."""

    def __init__(
        self, inner: AbstractContextManager, variable: ContextVar, value: Callable[[], Any]
    ) -> None:
        self.inner, self.variable, self.value = inner, variable, value

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.inner)
            token = self.variable.set(self.value())
            stack.callback(self.variable.reset, token)
            self.stack = stack.pop_all()

    def __exit__(self, *exception: Any) -> bool | None:
        return self.stack.__exit__(*exception)
