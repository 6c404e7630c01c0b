"""What balancers are: they nudge what routers prefer, around every optimizer step.

T tokens on this rank, K choices, E experts, L MoE layers.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parallel.decisions import is_replaying
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, router_of
from trainer.balance.schedule import Schedule


class Balancer:
    """Acts on a parallelized model before it is sharded, then around every optimizer step.

    By itself it does nothing.
    """

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        """Find the routers; once, after `parallelize` and before sharding."""

    def before_step(self, num_positions: int) -> None:
        """Begin a step whose global batch has so many positions."""

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        """End a step that was applied, in which the experts got so many rows over the global
        batch; metrics by name."""
        return {}

    def losses(self) -> dict[str, float]:
        """This rank's shares of the balancing losses of the step, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ScheduledLoss(Balancer):
    """A loss times a coefficient, joined to the gradient at the weights that leave the router.

    Its gradient runs in the backward pass of its own layer, while the layer's parameters are
    gathered. It is never mixed into the reported language-model loss. Validation has none.

    Args:
        coefficient: in the first step. schedule: constant, linear, cosine, inverse or inverse_sqrt.
        steps, final: of linear and cosine. until: last step with a loss; None for no end.

    Attributes:
        name: of the balancer in the configuration, and of its loss in the metrics.
        coefficient: by optimizer step.
    """

    name: str

    def __init__(
        self,
        coefficient: float,
        schedule: str = "constant",
        steps: int | None = None,
        final: float = 0.0,
        until: int | None = None,
    ) -> None:
        key = f"balance.{self.name}.coefficient"
        self.coefficient = Schedule(key, coefficient, schedule, steps, final, until)
        self.step = 1
        self.total = torch.zeros(())  # stays on the device until the step is over

    def before_step(self, num_positions: int) -> None:
        self.total = torch.zeros(())

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        metrics = {}
        if not self.coefficient.is_constant:
            metrics[f"balance/{self.name}_coefficient"] = self.coefficient.at(self.step)
        self.step += 1
        return metrics

    def losses(self) -> dict[str, float]:
        return {self.name: float(self.total)}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state.get("step", 1)

    def join(self, weights_TK: Tensor, share: Tensor) -> Tensor:
        """The same weights, with a share of the step's loss in their backward pass."""
        if not is_replaying():
            self.total = share.detach().double() + self.total.to(share.device)
        return joined(weights_TK, share)


class RouterLoss(ScheduledLoss):
    """A loss of what routers put out, averaged over layers and positions."""

    num_positions = 1  # of the global batch

    @abstractmethod
    def of_layer(self, layer: int, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """The loss of one layer for the tokens of a micro-batch on this rank, their mean.

        Args:
            ids_TK: chosen experts; E for "no expert".
        """

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        blocks = moe_blocks(model)
        for layer, (name, block) in enumerate(blocks):
            router = router_of(block)
            if router is None:
                raise ValueError(f"balance: no router found in {name}; use balance=none")
            router.register_forward_hook(partial(self._join, layer=layer, num_layers=len(blocks)))

    def before_step(self, num_positions: int) -> None:
        super().before_step(num_positions)
        self.num_positions = num_positions

    def _join(
        self,
        router: nn.Module,
        inputs: Any,
        output: tuple[Tensor, Tensor, Tensor],
        layer: int,
        num_layers: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Join one layer's share of the step's loss to the weights that leave the router."""
        logits_TE, weights_TK, ids_TK = output
        if not router.training:
            return output
        coefficient = self.coefficient.at(self.step)
        share = len(logits_TE) / self.num_positions
        value = self.of_layer(layer, logits_TE, ids_TK) * (coefficient * share / num_layers)
        return logits_TE, self.join(weights_TK, value), ids_TK


def joined(weights_TK: Tensor, loss: Tensor) -> Tensor:
    """The same weights, with a loss in their backward pass."""
    result: Tensor = _Join.apply(weights_TK, loss)
    return result


class _Join(torch.autograd.Function):
    """Passes the weights through and adds a loss to the backward pass."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return weights_TK.clone()  # a view would lose FSDP its hook

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.like)
