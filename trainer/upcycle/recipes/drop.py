"""Drop-Upcycling: copies of which a share of neurons begins anew (arXiv:2502.19261).

n neurons, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.upcycle.layout import DenseShape, Layout, Matrix, check_choice, check_experts
from trainer.upcycle.recipe import LayerFFN, Recipe

PAIRINGS = ("paired", "independent")


@dataclass(frozen=True)
class Drop(Recipe):
    """Copies with some neurons drawn anew.

    New weights are normal with mean and deviation of those that they replace.

    Args:
        num_experts: copies. top_k: of them per token.
        share: of the neurons that begin anew.
        pairing: paired keeps the other neurons whole; independent keeps (1 - share)^3 of them.
        noise_std: of noise on the chosen weights instead, where it is above 0.
    """

    num_experts: int = 8
    top_k: int = 2
    share: float = 0.5
    pairing: str = "paired"
    noise_std: float = 0.0

    def layout(self, dense: DenseShape) -> Layout:
        check_experts(self.num_experts, self.top_k)
        check_choice("recipe.pairing", self.pairing, PAIRINGS)
        if not 0 <= self.share <= 1:
            raise ValueError(f"recipe.share ({self.share}) must be between 0 and 1")
        if self.noise_std < 0:
            raise ValueError(f"recipe.noise_std ({self.noise_std}) must be >= 0")
        changed = int(self.share * dense.width)
        return Layout(
            self.num_experts,
            self.top_k,
            width=dense.width,
            row_of_N=tuple(range(self.num_experts)),
            alike=not changed,
            inexact=f"{changed} of {dense.width} neurons begin anew" if changed else "",
        )

    def expert(self, ffn: LayerFFN, expert: int, matrix: Matrix) -> Tensor:
        whole = ffn.take(matrix)
        dim = 1 if matrix is Matrix.down else 0
        width = whole.shape[dim]
        which = matrix.value if self.pairing == "independent" else "neurons"
        order = torch.randperm(width, generator=ffn.generator(expert, which))
        chosen_n = order[: int(self.share * width)]
        if not len(chosen_n):
            return whole
        old = whole.index_select(dim, chosen_n).float()
        draw = torch.randn(old.shape, generator=ffn.generator(expert, f"new {matrix.value}"))
        if self.noise_std:
            new = old + self.noise_std * draw
        else:
            new = old.mean() + old.std(correction=0) * draw
        return whole.index_copy(dim, chosen_n, new.to(whole.dtype))
