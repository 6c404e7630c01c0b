"""The balancer that suits the family."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks
from trainer.balance.base import Balancer
from trainer.balance.bias import LossFreeBias, selection_bias
from trainer.balance.losses import AuxiliaryLoss


class Auto(Balancer):
    """Loss-free bias where the family's router has a selection bias, auxiliary loss elsewhere."""

    def __init__(self, rate: float = 1e-3, coefficient: float = 1e-2) -> None:
        self.choices = LossFreeBias(rate), AuxiliaryLoss(coefficient)

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        has_bias = all(selection_bias(block) is not None for _, block in moe_blocks(model))
        self.chosen: Balancer = self.choices[0] if has_bias else self.choices[1]
        self.chosen.attach(model, mesh)

    def before_step(self, num_positions: int) -> None:
        self.chosen.before_step(num_positions)

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        return self.chosen.after_step(counts_LE)

    def losses(self) -> dict[str, float]:
        return self.chosen.losses()

    def state_dict(self) -> dict[str, Any]:
        return self.chosen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chosen.load_state_dict(state)
