"""How families make weights of their routers' logits.

T tokens on this rank, K choices, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.model import router_of

SOFTMAX = ("deepseek_v2", "ernie4_5_moe", "flex_olmo", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
# sigmoid scores, divided by their sum with norm_topk_prob
SIGMOID = ("deepseek_v3", "dots1", "glm4_moe")
SIGMOID_SCORES = (*SIGMOID, "exaone_moe", "solar_open")  # of which only that is known


@dataclass(frozen=True)
class Family:
    """The arithmetic of a family's router around the choice of experts.

    Attributes:
        is_sigmoid: scores are sigmoids of the logits, else their softmax.
        normalises: weights of the chosen experts are made to sum to 1. factor: times them.
    """

    name: str
    num_experts: int
    top_k: int
    is_sigmoid: bool
    normalises: bool
    factor: float

    @classmethod
    def of(cls, model: nn.Module) -> Family:
        """That of a model.

        Raises:
            ValueError: for a family whose router is not known, and settings that are not.
        """
        config: Any = getattr(model, "config", None)
        name = getattr(config, "model_type", type(model).__name__)
        if name not in SOFTMAX + SIGMOID:
            raise ValueError(
                f"router: only router=native is known for {name}; others are for "
                f"{', '.join(sorted(SOFTMAX + SIGMOID))}"
            )
        own: Any = next(router_of(m) for m in model.modules() if hasattr(m, "experts"))
        return cls(
            name,
            int(own.num_experts),
            int(own.top_k),
            is_sigmoid=name in SIGMOID,
            normalises=name != "deepseek_v2" and getattr(own, "norm_topk_prob", True),
            factor=float(getattr(own, "routed_scaling_factor", 1.0)),
        )

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Of every expert, in fp32 or fp64."""
        logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        return logits_TE.sigmoid() if self.is_sigmoid else logits_TE.softmax(-1)

    def weights(self, scores_TE: Tensor, ids_TK: Tensor, normalised: bool = True) -> Tensor:
        """Of the chosen experts; 0 for "no expert".

        Args:
            normalised: made to sum to 1 where the family does that; else never.
        """
        weights_TK = scores_at(scores_TE, ids_TK)
        if self.normalises and normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-12)
        return weights_TK * self.factor


def scores_at(scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Scores [T, K] of experts; 0 for ids equal to E ("no expert")."""
    return torch.cat([scores_TE, torch.zeros_like(scores_TE[:, :1])], 1).gather(1, ids_TK)
