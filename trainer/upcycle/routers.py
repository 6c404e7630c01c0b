"""How the rows of a new router begin.

H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.upcycle.layout import Scores
from trainer.upcycle.recipe import LayerFFN


class RouterInit(Protocol):
    """Makes the first router of a layer."""

    @property
    def scores(self) -> Scores:
        """How far apart the scores begin."""
        ...

    def rows(self, ffn: LayerFFN, num_rows: int) -> Tensor:
        """Different rows [num_rows, H], float32."""
        ...


@dataclass(frozen=True)
class Zero:
    """Equal scores for all experts, up to noise that breaks ties.

    Args:
        std: of the noise. 0: none, and all tokens go to the same experts.
    """

    std: float = 1e-6

    @property
    def scores(self) -> Scores:
        return Scores.close if self.std else Scores.equal

    def rows(self, ffn: LayerFFN, num_rows: int) -> Tensor:
        return normal(ffn, num_rows, self.std)


@dataclass(frozen=True)
class Random:
    """Normally distributed weights. Args: std: of them."""

    std: float = 0.02
    scores = Scores.free

    def rows(self, ffn: LayerFFN, num_rows: int) -> Tensor:
        return normal(ffn, num_rows, self.std)


def normal(ffn: LayerFFN, num_rows: int, std: float) -> Tensor:
    """Row by row from generators of their own, so that a row does not depend on their number."""
    hidden = ffn.models[0].shape.hidden
    rows = [torch.randn(hidden, generator=ffn.generator(row, "router")) for row in range(num_rows)]
    return torch.stack(rows) * std
