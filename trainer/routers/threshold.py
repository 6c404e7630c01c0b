"""Routers whose tokens have unlike numbers of experts.

T tokens on this rank, K choices, E experts.
"""

from __future__ import annotations

from torch import Tensor

from trainer.routers.base import Router
from trainer.routers.family import Family, scores_at


class TopP(Router):
    """The fewest experts whose probabilities add up to `p`, at most `most` (arXiv:2403.07652).

    Weights are the probabilities, not made to sum to 1. Tokens of which the router is sure cost
    fewer rows; balance=entropy_loss keeps it from becoming unsure of all.

    Args:
        p: between 0 and 1. most: experts of a token; None for the family's number.
    """

    normalises = False

    def __init__(self, p: float = 0.4, most: int | None = None) -> None:
        if not 0 < p <= 1:
            raise ValueError(f"router.p ({p}) must be > 0 and <= 1")
        self.p, self.most = p, most

    def check(self, family: Family) -> None:
        self.num_choices = family.top_k if self.most is None else self.most
        if not 1 <= self.num_choices <= family.num_experts:
            raise ValueError(
                f"router.most ({self.num_choices}) must be between 1 and the number of experts "
                f"({family.num_experts})"
            )
        if family.is_sigmoid:
            raise ValueError(f"router=top_p needs softmax routing; {family.name} has sigmoids")

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        ids_TK = chosen_by_TE.topk(self.num_choices).indices
        found_TK = scores_at(scores_TE.detach(), ids_TK)
        before_TK = found_TK.cumsum(1) - found_TK
        return ids_TK.masked_fill(before_TK >= self.p, self.family.num_experts)
