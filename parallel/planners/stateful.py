"""Planners that remember: what they may know, and when.

E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from parallel.plan import Planner


@runtime_checkable
class StatefulPlanner(Planner, Protocol):
    """A planner whose plans depend on the counts that it was given before, and on nothing else.

    All ranks give it the same gathered counts in the same order, so their plans agree. Exact
    plans never depend on the protocol being followed: whoever never calls `next_step` loses
    foresight only.
    """

    @property
    def stateless(self) -> Planner:
        """What plans where nothing is to be learned or kept: outside of training steps."""
        ...

    def for_layer(self, layer: int) -> StatefulPlanner:
        """An independent planner for one MoE layer; nothing that either sees reaches the other.

        Args:
            layer: index among the MoE layers.
        """
        ...

    def next_step(self, counts: Sequence[Tensor]) -> None:
        """Learn from the optimizer step before; called once before each, empty the first time.

        Until the next call the experts that a rank has borrowed stay with it: calls for plans
        may add to them and take none away, as long as the homes stay the same.

        Args:
            counts: int64 [R, E] of every micro-batch of the layer in the step before.
        """
        ...


def check_decay(name: str, decay: float) -> None:
    """Refuse a decay that is no weight of the past.

    Raises:
        ValueError: naming the key.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"{name} ({decay}) must be >= 0 and < 1; 0 forgets all but the last step")


def decayed(average: np.ndarray | None, latest: np.ndarray, decay: float) -> np.ndarray:
    """The exponential average after one more observation, float64 in the shape of both."""
    if average is None:
        return latest.astype(np.float64)
    return decay * average + (1 - decay) * latest
