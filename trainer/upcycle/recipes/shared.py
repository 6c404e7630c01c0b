"""The dense FFN stays as a shared expert, and routed experts learn beside it.

All of it, with routed experts that begin silent; or its first neurons, with the others spread
over routed experts as in `split`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.upcycle.layout import DenseShape, Layout, Matrix, check_experts
from trainer.upcycle.recipe import LayerFFN, Recipe
from trainer.upcycle.recipes.split import check_granularity


@dataclass(frozen=True)
class Shared(Recipe):
    """A shared expert and routed ones.

    Args:
        num_experts: routed experts. top_k: of them per token.
        granularity: parts that the routed neurons are cut into.
        shared_width: neurons of the shared expert. null: all of the dense FFN; the routed experts
            have copies of its neurons, but begin with no output.
    """

    num_experts: int = 8
    top_k: int = 2
    granularity: int = 1
    shared_width: int | None = None

    def layout(self, dense: DenseShape) -> Layout:
        check_experts(self.num_experts, self.top_k)
        routed = dense.width - self._begin()
        if self.shared_width is not None and not 0 < self.shared_width < dense.width:
            raise ValueError(
                f"recipe.shared_width ({self.shared_width}) must be between 1 and the number of "
                f"neurons ({dense.width}) less 1"
            )
        width = check_granularity(self.num_experts, self.top_k, self.granularity, routed)
        return Layout(
            self.num_experts,
            self.top_k,
            width=width,
            row_of_N=tuple(expert // self.granularity for expert in range(self.num_experts)),
            shared_width=dense.width if self.shared_width is None else self.shared_width,
            parts=self.granularity,
            silent=self.shared_width is None,
            alike=True,
        )

    def expert(self, ffn: LayerFFN, expert: int, matrix: Matrix) -> Tensor:
        width = (ffn.models[0].shape.width - self._begin()) // self.granularity
        first = self._begin() + expert % self.granularity * width
        taken = ffn.take(matrix, slice(first, first + width))
        silent = self.shared_width is None and matrix is Matrix.down
        return torch.zeros_like(taken) if silent else taken

    def shared(self, ffn: LayerFFN, matrix: Matrix) -> Tensor:
        return ffn.take(matrix, slice(0, self.shared_width))

    def _begin(self) -> int:
        """The first neuron of the routed experts."""
        return self.shared_width or 0
