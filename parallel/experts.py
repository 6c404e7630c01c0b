"""The experts of a layer that live on this rank, and the mathematics of their family.

S slots of this rank, M rows, D hidden width, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from parallel.borrow import Loan
from parallel.grouped import grouped_linear
from parallel.memory import cache_blocks


class Experts(nn.Module):
    """This rank's native experts of one layer.

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

    def widths_kept(self) -> int:
        """Elements that a layer keeps of every row for the backward pass.

        The row, the outputs of the first product, the inputs of the second and its outputs.
        """
        family: Any = self.family
        up, down = (
            getattr(self, name)
            for name in ("gate_up_proj" if family.has_gate else "up_proj", "down_proj")
        )
        return sum(up.shape[1:]) + sum(down.shape[1:])

    def stacks(self) -> dict[str, Tensor]:
        """The native stacks by name."""
        return {name: getattr(self, name) for name in self.names}


def expert_outputs(
    family: Any,
    x_MD: Tensor,
    rows_S: list[int],
    stacks: Mapping[str, Tensor],
    loans: Sequence[Loan] = (),
) -> Tensor:
    """Outputs [M, D] of rows ordered by slot.

    Args:
        family: the experts module of `transformers`. rows_S: rows of every slot.
        stacks: native weights by name. loans: bring the slots after the native ones.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        bias = stacks[f"{name}_bias"] if family.has_bias else None
        transposed = family.is_transposed
        return grouped_linear(x, stacks[name], bias, rows_S, loans, name, is_transposed=transposed)

    h_MF = linear(x_MD, "gate_up_proj" if family.has_gate else "up_proj")
    if not family.has_gate:
        h_MF = family.act_fn(h_MF)
    elif is_plain_swiglu(family):
        h_MF = _SwiGLU.apply(h_MF)
    else:
        h_MF = family._apply_gate(h_MF)
    return linear(h_MF, "down_proj")


def is_plain_swiglu(family: Any) -> bool:
    """Whether the experts are act(gate) * up with the plain SiLU, halves side by side."""
    default_gate = type(family)._apply_gate.__name__ == "_default_apply_gate"
    return default_gate and isinstance(family.act_fn, (nn.SiLU, SiLUActivation))


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
