"""Grouped expert computation over native and borrowed slots.

S slots of this rank, M rows, D hidden width, F expert width, I and O the widths of one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from parallel.comm import exchange
from parallel.memory import cache_blocks
from parallel.plan import DispatchPlan


@dataclass(frozen=True)
class SlotWeights:
    """Stacked weights by parameter name: native slots first, then borrowed ones, if any."""

    native: dict[str, Tensor]
    borrowed: dict[str, Tensor] | None


class Experts(nn.Module):
    """This rank's native experts of one layer, with the mathematics of their family.

    The family's own module supplies activation, biases, clamps and layout; its stacked
    parameters [E, ...] are replaced by the slices [S, ...] of the experts at home here.
    """

    def __init__(self, family: nn.Module, local_experts: list[int]) -> None:
        super().__init__()
        self.names = [name for name, _ in family.named_parameters(recurse=False)]
        for name in self.names:
            stack = getattr(family, name)
            weight = stack.detach()[torch.tensor(local_experts, device=stack.device)].clone()
            self.register_parameter(name, nn.Parameter(weight, stack.requires_grad))
            delattr(family, name)
        self.family = family

    def borrow(self, plan: DispatchPlan, group: dist.ProcessGroup, slot_E: Tensor) -> SlotWeights:
        """Weights of all slots; borrowed experts come from their homes, gradients return there.

        Args:
            plan: its `borrowed` names the experts. slot_E: native slot of every expert at home.
        """
        native = {name: getattr(self, name) for name in self.names}
        if not len(plan.borrowed):
            return SlotWeights(native, None)
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        home, borrower = plan.borrowed[:, 1], plan.borrowed[:, 2]
        lent = plan.borrowed[home == rank]
        lent = lent[torch.argsort(lent[:, 2], stable=True)]  # by borrower, then expert
        send_R = torch.bincount(lent[:, 2], minlength=num_ranks).tolist()
        receive_R = torch.bincount(home[borrower == rank], minlength=num_ranks).tolist()
        arriving = plan.borrowed[borrower == rank]
        by_home = torch.argsort(arriving[:, 1], stable=True)
        device = native[self.names[0]].device
        by_expert = torch.argsort(by_home).to(device)
        slots = slot_E[lent[:, 0]].to(device)
        borrowed = {}
        for name, stack in native.items():
            copies = exchange(_Lend.apply(stack, slots), send_R, receive_R, group)
            borrowed[name] = copies.index_select(0, by_expert)
        return SlotWeights(native, borrowed)

    def forward(self, x_MD: Tensor, rows_S: list[int], weights: SlotWeights) -> Tensor:
        """Outputs [M, D] of rows ordered by slot; `rows_S` are the rows of every slot."""
        num_native = len(weights.native[self.names[0]])
        native_rows, borrowed_rows = rows_S[:num_native], rows_S[num_native:]
        if weights.borrowed is None:
            return self._compute(x_MD, native_rows, weights.native)
        x_native, x_borrowed = x_MD.split([sum(native_rows), sum(borrowed_rows)])
        return torch.cat(
            [
                self._compute(x_native, native_rows, weights.native),
                self._compute(x_borrowed, borrowed_rows, weights.borrowed),
            ]
        )

    def _compute(self, x_MD: Tensor, rows_S: list[int], weights: dict[str, Tensor]) -> Tensor:
        family: Any = self.family
        up = "gate_up_proj" if family.has_gate else "up_proj"
        h_MF = self._linear(x_MD, rows_S, weights, up)
        if not family.has_gate:
            h_MF = family.act_fn(h_MF)
        elif is_plain_swiglu(family):
            h_MF = _SwiGLU.apply(h_MF)
        else:
            h_MF = family._apply_gate(h_MF)
        return self._linear(h_MF, rows_S, weights, "down_proj")

    def _linear(
        self, x_MI: Tensor, rows_S: list[int], weights: dict[str, Tensor], name: str
    ) -> Tensor:
        family: Any = self.family
        weight = weights[name] if family.is_transposed else weights[name].transpose(1, 2)
        y_MO = grouped_linear(x_MI, weight, rows_S)
        if family.has_bias:
            rows = torch.tensor(rows_S, device=x_MI.device)
            bias = weights[f"{name}_bias"]
            y_MO = y_MO + bias.repeat_interleave(rows, dim=0, output_size=len(x_MI))
        return y_MO


def is_plain_swiglu(family: Any) -> bool:
    """Whether the experts are act(gate) * up with the plain SiLU, halves side by side."""
    default_gate = type(family)._apply_gate.__name__ == "_default_apply_gate"
    return default_gate and isinstance(family.act_fn, (nn.SiLU, SiLUActivation))


def grouped_linear(x_MI: Tensor, weight_SIO: Tensor, rows_S: list[int]) -> Tensor:
    """One matrix product per slot over its consecutive rows: [M, O].

    Args:
        x_MI: rows ordered by slot. weight_SIO: any strides. rows_S: rows of every slot, sum M.
    """
    if x_MI.device.type == "cuda" and x_MI.dtype == torch.bfloat16:
        offsets = torch.tensor(rows_S, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        offsets = offsets.pin_memory().to(x_MI.device, non_blocking=True)
        return F.grouped_mm(x_MI, weight_SIO, offs=offsets)
    return _GroupedLinear.apply(x_MI, weight_SIO, rows_S)


class _GroupedLinear(torch.autograd.Function):
    """Products written straight into slices of one output; no per-slot autograd nodes."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_SIO: Tensor, rows_S: list[int]) -> Tensor:
        ctx.save_for_backward(x_MI, weight_SIO)
        ctx.rows_S = rows_S
        y_MO = x_MI.new_empty(x_MI.shape[0], weight_SIO.shape[2])
        for slot, rows in _slices(rows_S):
            torch.mm(x_MI[rows], weight_SIO[slot], out=y_MO[rows])
        return y_MO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MI, weight_SIO = ctx.saved_tensors
        grad_MO = grads[0].contiguous()  # an expanded gradient (of a sum, say) has stride 0
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_MI)
            for slot, rows in _slices(ctx.rows_S):
                torch.mm(grad_MO[rows], weight_SIO[slot].T, out=grad_x[rows])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight_SIO)  # keeps the strides of the weight
            for slot, num_rows in enumerate(ctx.rows_S):
                if num_rows == 0:
                    grad_weight[slot].zero_()
            for slot, rows in _slices(ctx.rows_S):
                if weight_SIO.stride(1) == 1:  # a stack stored [S, O, I]
                    torch.mm(grad_MO[rows].T, x_MI[rows], out=grad_weight[slot].T)
                else:
                    torch.mm(x_MI[rows].T, grad_MO[rows], out=grad_weight[slot])
        return grad_x, grad_weight, None


def _slices(rows_S: list[int]) -> list[tuple[int, slice]]:
    """Slot and row range of every slot that has rows."""
    slices, start = [], 0
    for slot, num_rows in enumerate(rows_S):
        if num_rows:
            slices.append((slot, slice(start, start + num_rows)))
        start += num_rows
    return slices


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [M, 2F] halves; saves only its input, works in blocks for the cache."""

    @staticmethod
    def forward(ctx: Any, h_MG: Tensor) -> Tensor:
        ctx.save_for_backward(h_MG)
        a_MF = h_MG.new_empty(h_MG.shape[0], h_MG.shape[1] // 2)
        for h, a in zip(cache_blocks(h_MG), cache_blocks(a_MF), strict=True):
            gate, up = h.chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=a)
        return a_MF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h_MG,) = ctx.saved_tensors
        grad_h_MG = torch.empty_like(h_MG)
        blocks = map(cache_blocks, (h_MG, grads[0], grad_h_MG))
        for h, grad_a, grad_h in zip(*blocks, strict=True):
            gate, up = h.chunk(2, dim=-1)
            grad_gate, grad_up = grad_h.chunk(2, dim=-1)
            torch.mul(grad_a, F.silu(gate), out=grad_up)
            grad_gate.copy_(torch.ops.aten.silu_backward(grad_a * up, gate))
        return grad_h_MG


class _Lend(torch.autograd.Function):
    """Copies of native slots; gradients of several copies are summed in at least fp32."""

    @staticmethod
    def forward(ctx: Any, stack_S: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.stack_shape = stack_S.shape
        return stack_S.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        (grad,) = grads
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.stack_shape, dtype=dtype, device=grad.device)
        return total.index_add_(0, slots, grad.to(dtype)).to(grad.dtype), None
