"""Innovator (arXiv:2507.18671): the general FFN stays as the shared expert, and the FFNs of models
that were tuned on one discipline each are cut into routed experts beside it.

D disciplines, G parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.upcycle.layout import DenseShape, Layout, Matrix, check_choice
from trainer.upcycle.recipe import LayerFFN, Recipe
from trainer.upcycle.recipes.split import check_granularity

STARTS = ("half", "silent")


@dataclass(frozen=True)
class Innovator(Recipe):
    """D x G routed experts, those of a discipline one after another and with one router row.

    The first source is the general model, whose attention, norms and embeddings are kept; the
    others are the disciplines.

    Args:
        top_k: experts per token, a multiple of granularity. granularity: parts (G) of an FFN.
        start: half: shared and routed experts each have half their output. silent: routed experts
            begin with zero output, so that the MoE is the general model; of the disciplines only
            gate and up are kept.
    """

    top_k: int = 8
    granularity: int = 8
    start: str = "half"

    def layout(self, dense: DenseShape) -> Layout:
        disciplines = dense.num_models - 1
        if disciplines < 1:
            raise ValueError(
                "source: recipe=innovator needs the general model and one per discipline, "
                "source=[GENERAL,DIR,...]"
            )
        check_choice("recipe.start", self.start, STARTS)
        num_experts = disciplines * self.granularity
        width = check_granularity(num_experts, self.top_k, self.granularity, dense.width)
        if not self.granularity <= self.top_k <= num_experts or num_experts < 2:
            raise ValueError(
                f"recipe.top_k ({self.top_k}) must be between recipe.granularity "
                f"({self.granularity}) and disciplines x recipe.granularity ({num_experts}), and "
                f"these at least 2"
            )
        silent = self.start == "silent"
        exact = silent or dense.same
        return Layout(
            num_experts,
            self.top_k,
            width=width,
            row_of_N=tuple(expert // self.granularity for expert in range(num_experts)),
            shared_width=dense.width,
            parts=self.granularity,
            silent=silent,
            alike=dense.same,
            inexact="" if exact else "half of the FFNs' output is the disciplines'",
            num_models=dense.num_models,
        )

    def expert(self, ffn: LayerFFN, expert: int, matrix: Matrix) -> Tensor:
        discipline, part = divmod(expert, self.granularity)
        width = ffn.models[0].shape.width // self.granularity
        neurons = slice(part * width, (part + 1) * width)
        taken = ffn.take(matrix, neurons, model=1 + discipline)
        if matrix is not Matrix.down:
            return taken
        return taken * 0.5 if self.start == "half" else torch.zeros_like(taken)

    def shared(self, ffn: LayerFFN, matrix: Matrix) -> Tensor:
        taken = ffn.take(matrix)
        return taken * 0.5 if self.start == "half" and matrix is Matrix.down else taken
