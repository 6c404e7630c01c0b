"""Grouped products: consecutive rows times the weights of their slot, native or borrowed.

M rows, S slots, I and O the widths of one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.borrow import Loan
from parallel.decisions import is_replaying
from parallel.phases import event, timed_products


def grouped_linear(
    x_MI: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows_S: list[int],
    loans: Sequence[Loan],
    name: str,
    *,
    is_transposed: bool,
) -> Tensor:
    """One matrix product per slot over its consecutive rows: [M, O].

    Native slots come first; only then are the weights of borrowed ones waited for. Gradients of
    borrowed weights go into their loan, which returns them once it has all.

    Args:
        x_MI: rows ordered by slot. rows_S: rows of every slot, native ones first; sum M.
        weight, bias: native stacks [S, I, O] if is_transposed, else [S, O, I], and [S, O].
        loans: bring the borrowed slots in this order. name: of the weight in these loans.
    """
    y_MO = _GroupedLinear.apply(x_MI, weight, bias, rows_S, tuple(loans), name, is_transposed)
    if y_MO.requires_grad and not is_replaying():
        for loan in loans:
            loan.uses += 1
    return y_MO


class _Part(NamedTuple):
    """Slots whose weights lie in one stack: native ones, or those of one loan."""

    rows: slice
    rows_S: list[int]
    loan: Loan | None


def _parts(rows_S: list[int], num_native: int, loans: tuple[Loan, ...]) -> Iterator[_Part]:
    start = slot = 0
    for loan in (None, *loans):
        number = num_native if loan is None else len(loan.experts)
        part = rows_S[slot : slot + number]
        yield _Part(slice(start, start + sum(part)), part, loan)
        start, slot = start + sum(part), slot + number


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows_S: list[int],
        loans: tuple[Loan, ...],
        name: str,
        is_transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_MI, weight)
        ctx.parts = list(_parts(rows_S, len(weight), loans))
        ctx.name, ctx.is_transposed, ctx.has_bias = name, is_transposed, bias is not None
        products = _Products(x_MI, weight.shape[2 if is_transposed else 1])
        for rows, part_S, loan in ctx.parts:
            stack = weight if loan is None else loan.stack(name)
            of_whom = event("native products" if loan is None else "borrowed products")
            with of_whom, timed_products(len(x_MI[rows])):
                y_MO = products.add(rows, stack if is_transposed else stack.transpose(1, 2), part_S)
            if bias is not None:
                biases = bias if loan is None else loan.stack(f"{name}_bias")
                for slot, of_slot in _slices(part_S):
                    y_MO[of_slot] += biases[slot]
        return products.all()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_MI, weight = ctx.saved_tensors
        grad_MO = grads[0].contiguous()  # an expanded gradient (of a sum, say) has stride 0
        products = _Products(grad_MO, x_MI.shape[1])
        grad_weight = grad_bias = None
        # Borrowed slots first: their gradients then travel during the products of native ones.
        for rows, part_S, loan in reversed(ctx.parts):
            x, grad = x_MI[rows], grad_MO[rows]
            stack = weight if loan is None else loan.stack(ctx.name)
            with event("native gradients" if loan is None else "borrowed gradients"):
                if loan is not None:
                    total = loan.gradient(ctx.name)
                    _add_weight_gradients(total, x, grad, part_S, ctx.is_transposed)
                    if ctx.has_bias:
                        _add_bias_gradients(loan.gradient(f"{ctx.name}_bias"), grad, part_S)
                elif ctx.needs_input_grad[1]:
                    grad_weight = _weight_gradients(weight, x, grad, part_S, ctx.is_transposed)
                if loan is None and ctx.needs_input_grad[2]:
                    grad_bias = grad.new_zeros(len(part_S), grad.shape[1])
                    _add_bias_gradients(grad_bias, grad, part_S)
                if ctx.needs_input_grad[0]:
                    stack_SOI = stack.transpose(1, 2) if ctx.is_transposed else stack
                    products.add(rows, stack_SOI, part_S)
            if loan is not None:
                loan.used()
        grad_x = products.all() if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


class _Products:
    """Products of rows [M, I] with the matrices of their slots, made part by part: [M, O].

    On a CPU every product is written to its place in one output. GPU kernels bring their own, and
    these are joined only if there are several.
    """

    def __init__(self, x_MI: Tensor, width: int) -> None:
        self.x_MI, self.width = x_MI, width
        self.y_MO = None if _in_one_kernel(x_MI) else x_MI.new_empty(len(x_MI), width)
        self.parts: dict[int, Tensor] = {}

    def add(self, rows: slice, stack_SIO: Tensor, rows_S: list[int]) -> Tensor:
        """Outputs of consecutive rows, those of a slot times its matrix."""
        x_MI = self.x_MI[rows]
        if self.y_MO is None:
            y_MO = x_MI.new_empty(0, self.width)
            if len(x_MI):
                y_MO = F.grouped_mm(x_MI, stack_SIO, offs=_offsets(rows_S, x_MI.device))
                self.parts[rows.start] = y_MO
            return y_MO
        for slot, of_slot in _slices(rows_S):
            torch.mm(x_MI[of_slot], stack_SIO[slot], out=self.y_MO[rows][of_slot])
        return self.y_MO[rows]

    def all(self) -> Tensor:
        """Outputs of all rows."""
        if self.y_MO is not None:
            return self.y_MO
        parts = [self.parts[start] for start in sorted(self.parts)]
        if not parts:
            return self.x_MI.new_empty(0, self.width)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weight_gradients(
    weight: Tensor, x_MI: Tensor, grad_MO: Tensor, rows_S: list[int], is_transposed: bool
) -> Tensor:
    """Gradients of native weights, in the layout of the stack."""
    first, second = (x_MI, grad_MO) if is_transposed else (grad_MO, x_MI)
    if _in_one_kernel(x_MI) and len(x_MI):
        return F.grouped_mm(first.T, second, offs=_offsets(rows_S, x_MI.device))
    grad = torch.empty_like(weight)
    for slot, num_rows in enumerate(rows_S):
        if num_rows == 0:
            grad[slot].zero_()
    for slot, rows in _slices(rows_S):
        torch.mm(first[rows].T, second[rows], out=grad[slot])
    return grad


def _add_weight_gradients(
    total: Tensor | None, x_MI: Tensor, grad_MO: Tensor, rows_S: list[int], is_transposed: bool
) -> None:
    """Add gradients of borrowed weights to a total in their layout, in at least fp32."""
    if total is None or not len(x_MI):
        return
    first, second = (x_MI, grad_MO) if is_transposed else (grad_MO, x_MI)
    if _in_one_kernel(x_MI):
        total += F.grouped_mm(first.T, second, offs=_offsets(rows_S, x_MI.device))
        return
    for slot, rows in _slices(rows_S):
        if total.dtype == x_MI.dtype:
            total[slot].addmm_(first[rows].T, second[rows])
        else:
            total[slot] += first[rows].T @ second[rows]


def _add_bias_gradients(total: Tensor | None, grad_MO: Tensor, rows_S: list[int]) -> None:
    if total is None:
        return
    for slot, rows in _slices(rows_S):
        total[slot] += grad_MO[rows].sum(0, dtype=total.dtype)


def _in_one_kernel(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.bfloat16


def _offsets(rows_S: list[int], device: torch.device) -> Tensor:
    """Ends of the rows of every slot, sent without waiting for the device."""
    ends = torch.tensor(rows_S, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


def _slices(rows_S: list[int]) -> list[tuple[int, slice]]:
    """Slot and row range of every slot that has rows."""
    slices, start = [], 0
    for slot, num_rows in enumerate(rows_S):
        if num_rows:
            slices.append((slot, slice(start, start + num_rows)))
        start += num_rows
    return slices
