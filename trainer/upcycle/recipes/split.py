"""Fine-grained upcycling with virtual groups (arXiv:2410.07524).

Every copy of the dense FFN is cut into G parts that share a router row, so a token that chooses
one part of a copy chooses all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.upcycle.layout import DenseShape, Layout, Matrix, check_choice, check_experts
from trainer.upcycle.recipe import LayerFFN, Recipe

ORDERS = ("copy", "part")


@dataclass(frozen=True)
class Split(Recipe):
    """Parts of copies.

    Args:
        num_experts: parts of all copies together. top_k: of them per token.
        granularity: parts of a copy, a divisor of the others and of the FFN's width.
        order: of the experts. copy: the parts of a copy one after another, on as few ranks as
            possible. part: the copies of a part, so that a copy's load is spread over the ranks.
    """

    num_experts: int = 16
    top_k: int = 4
    granularity: int = 2
    order: str = "copy"

    def layout(self, dense: DenseShape) -> Layout:
        check_experts(self.num_experts, self.top_k)
        check_choice("recipe.order", self.order, ORDERS)
        width = check_granularity(self.num_experts, self.top_k, self.granularity, dense.width)
        copies = self.num_experts // self.granularity
        rows = [self._copy_and_part(expert)[0] for expert in range(self.num_experts)]
        return Layout(
            self.num_experts,
            self.top_k,
            width=width,
            row_of_N=tuple(rows),
            parts=self.granularity,
            alike=copies * self.granularity == self.num_experts,
        )

    def expert(self, ffn: LayerFFN, expert: int, matrix: Matrix) -> Tensor:
        width = ffn.models[0].shape.width // self.granularity
        _, part = self._copy_and_part(expert)
        return ffn.take(matrix, slice(part * width, (part + 1) * width))

    def _copy_and_part(self, expert: int) -> tuple[int, int]:
        if self.order == "copy":
            return divmod(expert, self.granularity)
        part, copy = divmod(expert, self.num_experts // self.granularity)
        return copy, part


def check_granularity(num_experts: int, top_k: int, granularity: int, width: int) -> int:
    """The width of a part of `width` neurons.

    Raises:
        ValueError: naming the key that granularity does not divide.
    """
    if granularity < 1:
        raise ValueError(f"recipe.granularity ({granularity}) must be >= 1")
    for key, value in (
        ("recipe.num_experts", num_experts),
        ("recipe.top_k", top_k),
        ("the number of neurons", width),
    ):
        if value % granularity:
            raise ValueError(
                f"recipe.granularity ({granularity}) must divide {key} ({value}); otherwise tokens "
                f"would reach parts of a copy"
            )
    return width // granularity
