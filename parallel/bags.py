"""Between copies of tokens and rows: expand a copy to its rows, sum the rows of a copy.

U copies of tokens (or U tokens), M rows, D their width. Every row belongs to one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.memory import cache_blocks


@dataclass(frozen=True)
class Bags:
    """Which copy every row belongs to.

    Attributes:
        copy_M: int64 copy of every row. order_M: rows by copy. start_U: first place of every copy
            in that order.
    """

    copy_M: Tensor
    order_M: Tensor
    start_U: Tensor

    @classmethod
    def of(cls, copy_M: Tensor, num_copies: int) -> Bags:
        counts_U = torch.zeros(num_copies, dtype=torch.int64, device=copy_M.device)
        counts_U.scatter_add_(0, copy_M, torch.ones_like(copy_M))
        order_M = torch.argsort(copy_M, stable=True)
        return cls(copy_M, order_M, counts_U.cumsum(0) - counts_U)

    def gather(self, x_UD: Tensor) -> Tensor:
        """Every row gets its copy: [M, D]."""
        return x_UD.index_select(0, self.copy_M)

    def total(self, y_MD: Tensor, weight_M: Tensor | None = None) -> Tensor:
        """Weighted sum of the rows of every copy: [U, D]; bf16 rows are summed in fp32.

        Wider rows are weighted and rounded before they are summed, so that two add up to the same
        here as at home, where they come from two ranks; a fused sum would not round in between.
        """
        if not len(self.start_U):
            return y_MD.new_zeros(0, y_MD.shape[1])
        if weight_M is not None and y_MD.itemsize > 2:
            y_MD, weight_M = y_MD * weight_M[:, None].to(y_MD.dtype), None
        if weight_M is not None:
            weight_M = weight_M.to(y_MD.dtype).index_select(0, self.order_M)
        return F.embedding_bag(
            self.order_M, y_MD, self.start_U, mode="sum", per_sample_weights=weight_M
        )


def expand(x_UD: Tensor, bags: Bags) -> Tensor:
    """One row [M, D] for every row of a copy; gradients of a copy's rows are summed."""
    return _Expand.apply(x_UD, bags)


def reduce(y_MD: Tensor, bags: Bags, weight_M: Tensor | None = None) -> Tensor:
    """Sum of a copy's rows [U, D], each times its weight if there are any."""
    if weight_M is None:
        return _Sum.apply(y_MD, bags)
    return _WeightedSum.apply(y_MD, weight_M, bags)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_UD: Tensor, bags: Bags) -> Tensor:
        _keep(ctx, bags)
        return bags.gather(x_UD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return Bags(*ctx.saved_tensors).total(grads[0].contiguous()), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, bags: Bags) -> Tensor:
        _keep(ctx, bags)
        return bags.total(y_MD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return Bags(*ctx.saved_tensors).gather(grads[0]), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weight_M: Tensor, bags: Bags) -> Tensor:
        _keep(ctx, bags, y_MD, weight_M)
        return bags.total(y_MD, weight_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y_MD, weight_M, *index = ctx.saved_tensors
        grad_MD = Bags(*index).gather(grads[0])
        grad_weight_M = torch.cat(
            [
                torch.linalg.vecdot(g, y)
                for g, y in zip(cache_blocks(grad_MD), cache_blocks(y_MD), strict=True)
            ]
        )
        grad_MD *= weight_M[:, None].to(grad_MD.dtype)  # in place: fresh memory costs page faults
        return grad_MD, grad_weight_M.to(weight_M.dtype), None


def _keep(ctx: Any, bags: Bags, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors, bags.copy_M, bags.order_M, bags.start_U)
