"""Balancers: what the router prefers, nudged every step.

T tokens on this rank, K choices, E experts, L MoE layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.decisions import is_replaying
from parallel.model import moe_blocks, router_of

SELECTION_BIAS = "e_score_correction_bias"


class Balancer(Protocol):
    """Acts on a parallelized model before it is sharded, then around every optimizer step."""

    def attach(self, model: nn.Module) -> None:
        """Find the routers; once, after `parallelize` and before sharding."""

    def before_step(self, num_positions: int) -> None:
        """Begin a step whose global batch has so many positions."""

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        """End a step in which the experts got so many rows over the global batch."""

    def loss(self) -> Tensor:
        """This rank's share of the balancing loss of the step; zero if there is none."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LossFreeBias:
    """Loss-free balancing by a selection bias (arXiv:2408.15664).

    After every step, with c the rows per expert over the global batch:
    b += rate * sign(mean(c) - c). The bias decides the choice, never the weights, and gets no
    gradient. For families whose router has one.
    """

    def __init__(self, rate: float = 1e-3) -> None:
        if rate <= 0:
            raise ValueError(f"balance.rate ({rate}) must be > 0")
        self.rate = rate

    def attach(self, model: nn.Module) -> None:
        missing = [name for name, block in moe_blocks(model) if selection_bias(block) is None]
        if missing:
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise ValueError(
                f"balance: loss-free balancing needs a router with a selection bias "
                f"({SELECTION_BIAS}); {kind} has none in {missing[0]}. Use balance=aux_loss"
            )
        self.blocks = [block for _, block in moe_blocks(model)]

    def before_step(self, num_positions: int) -> None:
        pass

    @torch.no_grad()
    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        for block, counts_E in zip(self.blocks, counts_LE.double(), strict=True):
            bias = selection_bias(block)
            assert bias is not None
            bias += (self.rate * torch.sign(counts_E.mean() - counts_E)).to(bias).view_as(bias)
        ranges = [
            float(b.max() - b.min()) for b in map(selection_bias, self.blocks) if b is not None
        ]
        return {"balance/bias_range": max(ranges)}

    def loss(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {}  # the biases are part of the model

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class AuxiliaryLoss:
    """Auxiliary load-balancing loss per micro-batch (arXiv:2006.16668, 2101.03961).

    coefficient * E * sum_i f_i P_i, averaged over layers, with f_i the share of rows of expert i
    and P_i its mean softmax probability; balanced routing gives exactly the coefficient. A
    micro-batch counts by its share of the positions of the global batch. The loss joins the
    gradient at the router's weights and is never mixed into the reported language-model loss.
    """

    def __init__(self, coefficient: float = 1e-2) -> None:
        if coefficient <= 0:
            raise ValueError(f"balance.coefficient ({coefficient}) must be > 0")
        self.coefficient = coefficient
        self.num_positions = 1
        self.total = torch.zeros((), dtype=torch.float64)

    def attach(self, model: nn.Module) -> None:
        blocks = moe_blocks(model)
        for name, block in blocks:
            router = router_of(block)
            if router is None:
                raise ValueError(f"balance: no router found in {name}; use balance=none")
            router.register_forward_hook(partial(self._join, num_layers=len(blocks)))

    def before_step(self, num_positions: int) -> None:
        self.num_positions = num_positions
        self.total = torch.zeros((), dtype=torch.float64)

    def _join(
        self, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor], num_layers: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Join one layer's share of the step's loss to the weights that leave the router.

        Joined there, its gradient runs through the router in the backward pass of its own layer,
        while the layer's parameters are gathered.
        """
        logits_TE, weights_TK, ids_TK = output
        if not router.training or not len(logits_TE):
            return output
        share = len(logits_TE) / self.num_positions
        value = auxiliary_loss(logits_TE, ids_TK) * (self.coefficient * share / num_layers)
        if not is_replaying():
            self.total += value.detach().cpu()
        return logits_TE, _Join.apply(weights_TK, value), ids_TK

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        return {}

    def loss(self) -> Tensor:
        return self.total

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Auto:
    """Loss-free bias where the family's router has a selection bias, auxiliary loss elsewhere."""

    def __init__(self, rate: float = 1e-3, coefficient: float = 1e-2) -> None:
        self.choices = LossFreeBias(rate), AuxiliaryLoss(coefficient)

    def attach(self, model: nn.Module) -> None:
        has_bias = all(selection_bias(block) is not None for _, block in moe_blocks(model))
        self.chosen: Balancer = self.choices[0] if has_bias else self.choices[1]
        self.chosen.attach(model)

    def before_step(self, num_positions: int) -> None:
        self.chosen.before_step(num_positions)

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        return self.chosen.after_step(counts_LE)

    def loss(self) -> Tensor:
        return self.chosen.loss()

    def state_dict(self) -> dict[str, Any]:
        return self.chosen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chosen.load_state_dict(state)


def auxiliary_loss(logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """E * sum_i f_i P_i of one layer; ids equal to E ("no expert") do not count."""
    num_experts = logits_TE.shape[1]
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_TK.device)
    flat = ids_TK.flatten()
    counts_E = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    share_E = counts_E.to(dtype) / counts_E.sum().clamp(min=1)
    probability_E = torch.softmax(logits_TE.to(dtype), dim=-1).mean(0)
    return num_experts * (share_E * probability_E).sum()


def selection_bias(block: nn.Module) -> Tensor | None:
    """The bias that a router adds to its scores for the choice of experts, if it has one."""
    for module in block.modules():
        bias = getattr(module, SELECTION_BIAS, None)
        if isinstance(bias, Tensor):
            return bias
    return None


class _Join(torch.autograd.Function):
    """Passes the weights through and adds a loss to the backward pass."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return weights_TK.clone()  # a view would lose FSDP its hook

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.like)
