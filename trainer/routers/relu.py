"""ReLU routing: as many experts as have positive logits.

T tokens on this rank, K choices, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.routers.base import check_positive
from trainer.routers.family import Family
from trainer.routers.with_loss import LossRouter


class Relu(LossRouter):
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
    name = "relu_loss"

    def __init__(
        self, coefficient: float = 1e-8, growth: float = 1.2, most: int | None = None
    ) -> None:
        check_positive("router.coefficient", coefficient)
        if not growth > 1:
            raise ValueError(f"router.growth ({growth}) must be > 1")
        super().__init__(coefficient)
        self.growth, self.most = growth, most

    def check(self, family: Family) -> None:
        self.num_choices = family.num_experts if self.most is None else self.most
        if not family.top_k <= self.num_choices <= family.num_experts:
            raise ValueError(
                f"router.most ({self.num_choices}) must be between the experts of a token "
                f"({family.top_k}) and the number of experts ({family.num_experts})"
            )

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        metrics = super().after_step(counts_LE)
        per_token, top_k = metrics["router/experts_per_token"], self.family.top_k
        used = self.coefficient
        self.coefficient *= self.growth ** ((per_token > top_k) - (per_token < top_k))
        return {"router/relu_coefficient": used, **metrics}

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

    def of_layer(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        return l1_loss(scores_TE, self.family.top_k)


def l1_loss(scores_TE: Tensor, top_k: int) -> Tensor:
    """Mean over tokens of sum_e f_e relu_e, f_e the share of tokens with expert e times E / K."""
    num_tokens, num_experts = scores_TE.shape
    share_E = (scores_TE > 0).to(scores_TE.dtype).sum(0) / max(1, num_tokens)
    return (scores_TE.sum(0) * share_E).sum() * num_experts / top_k / max(1, num_tokens)
