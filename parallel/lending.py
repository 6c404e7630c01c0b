"""The two places in the backward pass of a layer where borrowed experts come in.

S native slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.borrow import Loan
from parallel.step import OptimizerStep, current_step


def join_returned(stacks: Mapping[str, Tensor], loans: Sequence[Loan]) -> Mapping[str, Tensor]:
    """Native stacks whose gradients include those of the copies that were lent.

    Within an `optimizer_step` the step adds them instead, and the stacks are returned as they are.
    """
    if not loans or current_step() is not None or not torch.is_grad_enabled():
        return stacks
    names = [name for name, stack in stacks.items() if stack.requires_grad]
    if not names:
        return stacks
    joined = _Join.apply(loans, names, *[stacks[name] for name in names])
    return {**stacks, **dict(zip(names, joined, strict=True))}


def notice_backward(
    out_TD: Tensor, loans: Sequence[Loan], stacks: Mapping[str, Tensor], refetch: bool
) -> Tensor:
    """The layer's output; when its gradient arrives, what was set out earlier is taken in.

    Those are gradients of lent experts of the layers above, which had this long to travel.

    Args:
        refetch: whether the weights were dropped, and set out again then.
    """
    if not loans or not out_TD.requires_grad:
        return out_TD
    native = [stack.detach() for stack in stacks.values()] if refetch else []
    return _Backward.apply(out_TD, loans, list(stacks), current_step(), *native)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loans: Sequence[Loan], names: list[str], *stacks: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.loans, ctx.names = loans, names
        return tuple(stack.view_as(stack) for stack in stacks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        for loan in ctx.loans:
            for slot, gradients in loan.collect().items():
                for name, grad_S in zip(ctx.names, grads, strict=True):
                    # in place: nobody else has what the products of this layer just made
                    total = grad_S[slot].to(gradients[name].dtype) + gradients[name]
                    grad_S[slot] = total.to(grad_S.dtype)
        return None, None, *grads


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out_TD: Tensor,
        loans: Sequence[Loan],
        names: list[str],
        step: OptimizerStep | None,
        *native: Tensor,
    ) -> Tensor:
        ctx.loans, ctx.names, ctx.step = loans, names, step
        ctx.save_for_backward(*native)
        ctx.mark_dirty(
            out_TD
        )  # the very tensor: blocks may add to it in place, a view FSDP refuses
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        native = ctx.saved_tensors
        if native:
            for loan in ctx.loans:
                loan.start_fetch(dict(zip(ctx.names, native, strict=True)))
        if ctx.step is not None:
            ctx.step.collect()
        return grads[0], *[None] * (3 + len(native))
