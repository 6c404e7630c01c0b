"""Sparse upcycling: every expert is a copy of the dense FFN (arXiv:2212.05055)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.upcycle.layout import DenseShape, Layout, Matrix, check_experts
from trainer.upcycle.recipe import LayerFFN, Recipe


@dataclass(frozen=True)
class Copy(Recipe):
    """Copies.

    Args:
        num_experts: copies. top_k: of them per token.
        shuffle: put every copy's neurons in an order of their own: other bits, the same function.
    """

    num_experts: int = 8
    top_k: int = 2
    shuffle: bool = False

    def layout(self, dense: DenseShape) -> Layout:
        check_experts(self.num_experts, self.top_k)
        return Layout(
            self.num_experts,
            self.top_k,
            width=dense.width,
            row_of_N=tuple(range(self.num_experts)),
            alike=True,
        )

    def expert(self, ffn: LayerFFN, expert: int, matrix: Matrix) -> Tensor:
        if not self.shuffle:
            return ffn.take(matrix)
        width = ffn.models[0].shape.width
        return ffn.take(matrix, torch.randperm(width, generator=ffn.generator(expert, "order")))
