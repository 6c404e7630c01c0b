"""Routers that even out a micro-batch while they choose.

T tokens on this rank, K choices, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.decisions import once
from placement.batches import assign_by_cost
from trainer.routers.base import Router, check_positive
from trainer.routers.family import Family


class Sinkhorn(Router):
    """Chooses by scores that are scaled to nearly equal sums of experts (Sinkhorn's iteration, as
    in arXiv:2202.01169); weights are of the unscaled scores. Evaluation takes the best scores, so
    plain transformers choose alike. Looks ahead in training.

    Args:
        rounds: of scaling rows and columns. temperature: of the scores' logarithms; smaller follows
            the router more and balances less.
        share: of the steps that are evened out (selective Sinkhorn); the others take the best
            scores.
    """

    looks_ahead = True
    is_coupled = True
    exports = True

    def __init__(self, rounds: int = 8, temperature: float = 1.0, share: float = 1.0) -> None:
        if rounds < 1:
            raise ValueError(f"router.rounds ({rounds}) must be >= 1")
        check_positive("router.temperature", temperature)
        if not 0 < share <= 1:
            raise ValueError(f"router.share ({share}) must be > 0 and <= 1")
        self.rounds, self.temperature, self.share = rounds, temperature, share

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        if not training or int(self.step * self.share) == int((self.step - 1) * self.share):
            return chosen_by_TE.topk(self.family.top_k).indices
        plan_TE = sinkhorn(chosen_by_TE.clamp(min=1e-20).log() / self.temperature, self.rounds)
        return plan_TE.topk(self.family.top_k).indices


class Assignment(Router):
    """Every expert gets T / E tokens of a rank's micro-batch, so that the sum of scores is largest
    (BASE, arXiv:2103.16716); evaluation takes the best expert. One expert per token, weighed by its
    score. Looks ahead in training; the assignment is solved on the host, exactly.
    """

    looks_ahead = True
    is_coupled = True
    normalises = False

    def check(self, family: Family) -> None:
        if family.top_k != 1:
            raise ValueError(
                f"router=assignment gives a token one expert, the model {family.top_k}; set "
                f"num_experts_per_tok to 1, or use router=sinkhorn"
            )

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        if not training:
            return chosen_by_TE.argmax(1, keepdim=True)
        return once(lambda: self._assigned(chosen_by_TE))

    def _assigned(self, chosen_by_TE: Tensor) -> Tensor:
        num_tokens, num_experts = chosen_by_TE.shape
        if num_tokens % num_experts:
            raise ValueError(
                f"router=assignment: a rank's micro-batch of {num_tokens} tokens cannot be shared "
                f"evenly among {num_experts} experts; choose train.micro_batch_size and "
                f"train.seq_len whose product is a multiple"
            )
        cost_TE = -chosen_by_TE.double().cpu().numpy()
        return torch.from_numpy(assign_by_cost(cost_TE))[:, None].to(chosen_by_TE.device)


def sinkhorn(logits_TE: Tensor, rounds: int) -> Tensor:
    """Logarithms of the scaled exponentials: rows sum to 1, columns nearly alike."""
    for _ in range(rounds):
        logits_TE = logits_TE - logits_TE.logsumexp(0, keepdim=True)
        logits_TE = logits_TE - logits_TE.logsumexp(1, keepdim=True)
    return logits_TE
