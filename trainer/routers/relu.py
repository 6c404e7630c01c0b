"""ReLU routing: as many experts as have positive logits.

T tokens on this rank, K choices, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel.decisions import is_replaying
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks
from trainer.routers.base import Router, check_positive
from trainer.routers.family import Family


class Relu(Router):
    """Weights are the positive parts of the logits (ReMoE, arXiv:2412.14711).

    An L1 loss keeps it sparse and balanced: coefficient * mean over tokens and layers of
    sum_e f_e relu(logit_e), with f_e the share of the micro-batch's tokens that expert e has, times
    E / K. Its coefficient follows the number of rows: after every step times `growth` if tokens had
    more than K experts in the mean, divided by it if fewer. Use it with balance=none.

    Args:
        coefficient: of the first step. growth: > 1.
        most: experts of a token; None for all. Of more positive ones the largest are taken.
    """

    normalises = False

    def __init__(
        self, coefficient: float = 1e-8, growth: float = 1.2, most: int | None = None
    ) -> None:
        check_positive("router.coefficient", coefficient)
        if not growth > 1:
            raise ValueError(f"router.growth ({growth}) must be > 1")
        self.coefficient, self.growth, self.most = coefficient, growth, most
        self.num_positions, self.total = 1, torch.zeros(())

    def check(self, family: Family) -> None:
        self.num_choices = family.num_experts if self.most is None else self.most
        if not family.top_k <= self.num_choices <= family.num_experts:
            raise ValueError(
                f"router.most ({self.num_choices}) must be between the experts of a token "
                f"({family.top_k}) and the number of experts ({family.num_experts})"
            )

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        self.num_layers = len(moe_blocks(model))

    def before_step(self, num_positions: int) -> None:
        super().before_step(num_positions)
        self.num_positions, self.total = num_positions, torch.zeros(())

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        per_token = float(counts_LE.sum()) / (len(counts_LE) * self.num_positions)
        used, top_k = self.coefficient, self.family.top_k
        self.coefficient *= self.growth ** ((per_token > top_k) - (per_token < top_k))
        super().after_step(counts_LE)
        return {"router/relu_coefficient": used, "router/experts_per_token": per_token}

    def losses(self) -> dict[str, float]:
        return {"relu_loss": float(self.total)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.coefficient = state["coefficient"]

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        best = chosen_by_TE.topk(self.num_choices)
        return best.indices.masked_fill(best.values <= 0, self.family.num_experts)

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).relu()

    def loss(self, scores_TE: Tensor) -> Tensor:
        share = self.coefficient * len(scores_TE) / self.num_layers / self.num_positions
        loss = share * l1_loss(scores_TE, self.family.top_k)
        if not is_replaying():
            self.total = loss.detach().double() + self.total.to(loss.device)
        return loss


def l1_loss(scores_TE: Tensor, top_k: int) -> Tensor:
    """Mean over tokens of sum_e f_e relu_e, f_e the share of tokens with expert e times E / K."""
    num_tokens, num_experts = scores_TE.shape
    share_E = (scores_TE > 0).to(scores_TE.dtype).sum(0) / max(1, num_tokens)
    return (scores_TE.sum(0) * share_E).sum() * num_experts / top_k / max(1, num_tokens)
