"""What routers with a loss of their own share.

T tokens on this rank, K choices, E experts and further choices.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from parallel.decisions import is_replaying
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks
from trainer.routers.base import Router


class LossRouter(Router):
    """A router with a loss, averaged over layers and positions and logged as `balance/NAME`; the
    number of experts that tokens have is logged too.

    Attributes:
        name: of the loss. coefficient: of the loss.
    """

    name: str

    def __init__(self, coefficient: float) -> None:
        if not coefficient >= 0:
            raise ValueError(f"router.coefficient ({coefficient}) must be >= 0")
        self.coefficient = coefficient
        self.num_layers, self.total = 1, torch.zeros(())

    @abstractmethod
    def of_layer(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """The loss of one layer for the tokens of a micro-batch on this rank, their mean."""

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        self.num_layers = len(moe_blocks(model))

    def before_step(self, num_positions: int) -> None:
        super().before_step(num_positions)
        self.total = torch.zeros(())

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        metrics = super().after_step(counts_LE)
        return {**metrics, "router/experts_per_token": self.experts_per_token(counts_LE)}

    def losses(self) -> dict[str, float]:
        return {self.name: float(self.total)}

    def loss(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        share = self.coefficient * len(scores_TE) / self.num_layers / self.num_positions
        loss = share * self.of_layer(scores_TE, ids_TK)
        if not is_replaying():
            self.total = loss.detach().double() + self.total.to(loss.device)
        return loss
