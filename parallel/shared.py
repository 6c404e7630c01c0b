"""The shared expert of a MoE block, computed while the tokens of the routed ones travel."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import Tensor, nn

from parallel.layer import DataPath
from parallel.phases import event

NAMES = ("shared_experts", "shared_expert")


def compute_shared_meanwhile(block: nn.Module, path: DataPath) -> bool:
    """Let a block's shared expert run while tokens travel; True if its family allows that.

    The families of `transformers` that call it last, on the block's own input, do. The others call
    it before the routed experts, when there is nothing yet to wait for.
    """
    for name in NAMES:
        shared = getattr(block, name, None)
        if isinstance(shared, nn.Module) and _comes_last(type(block), name):
            ahead = _Ahead(shared.forward)
            block.register_forward_pre_hook(ahead.note_input, with_kwargs=True)
            path.meanwhile = ahead.compute
            shared.forward = ahead.take
            return True
    return False


class _Ahead:
    """Runs a forward early and hands its result out when it is asked for."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    def note_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the block is called with is what its shared expert will be called with."""
        self.input = args[0] if args else next(iter(kwargs.values()))

    def compute(self) -> None:
        with event("shared expert"):
            self.output = self.forward(self.input)

    def take(self, x: Tensor) -> Tensor:
        """The early result, if it is of this very input."""
        known, output = self.input, self.output
        self.input = self.output = None
        return output if output is not None and x is known else self.forward(x)


def _comes_last(block: type[nn.Module], name: str) -> bool:
    """Whether a block calls its shared expert after `experts`, on what it was called with."""
    source = inspect.getsource(block.forward)
    called = re.search(rf"self\.{name}\((\w+)\)", source)
    if called is None or not 0 <= source.find("self.experts(") < called.start():
        return False
    kept = re.search(rf"\b{called[1]} = hidden_states\n", source)
    return kept is not None and "hidden_states = " not in source[: kept.start()]
