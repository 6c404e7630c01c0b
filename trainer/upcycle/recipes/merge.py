"""Several dense models as the experts of one MoE (Branch-Train-MiX, arXiv:2403.07816)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.upcycle.layout import DenseShape, Layout, Matrix, check_choice, check_experts
from trainer.upcycle.recipe import LayerFFN, Recipe

RESTS = ("mean", "first")


@dataclass(frozen=True)
class Merge(Recipe):
    """As many experts as models and copies, those of a model one after another.

    Args:
        top_k: experts per token. copies: experts with the FFN of one model.
        rest: of the models, attention, norms and embeddings: the mean, or those of the first.
    """

    top_k: int = 2
    copies: int = 1
    rest: str = "mean"

    def layout(self, dense: DenseShape) -> Layout:
        if dense.num_models < 2:
            raise ValueError("source: recipe=merge needs several models, source=[DIR,DIR,...]")
        if self.copies < 1:
            raise ValueError(f"recipe.copies ({self.copies}) must be >= 1")
        check_choice("recipe.rest", self.rest, RESTS)
        num_experts = dense.num_models * self.copies
        check_experts(num_experts, self.top_k)
        return Layout(
            num_experts,
            self.top_k,
            width=dense.width,
            row_of_N=tuple(range(num_experts)),
            alike=dense.same,
            inexact="" if dense.same else f"experts are the FFNs of {dense.num_models} models",
            num_models=dense.num_models,
            averages=self.rest == "mean",
        )

    def expert(self, ffn: LayerFFN, expert: int, matrix: Matrix) -> Tensor:
        return ffn.take(matrix, model=expert // self.copies)
