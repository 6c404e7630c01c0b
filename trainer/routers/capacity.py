"""Routers with a fixed room for rows on every expert.

T tokens on this rank, K choices, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.routers.base import Router, check_positive
from trainer.routers.family import scores_at

DROPS = ("position", "score")


class Capacity(Router):
    """Some of a token's K choices may find no room."""

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        dropped = 1 - self.experts_per_token(counts_LE) / self.family.top_k
        return {**super().after_step(counts_LE), "router/dropped": dropped}


class Switch(Capacity):
    """The best experts, each with room for ceil(capacity * T * K / E) rows of a rank's micro-batch;
    the rest is dropped (arXiv:2101.03961; by score: arXiv:2202.08906).

    Training alone drops, so plain transformers choose alike afterwards. Dispatch carries at most
    the room of every expert, which bounds a rank's load by the capacity.

    Args:
        capacity: room, as a multiple of an expert's even share.
        drop: position: the last tokens of the micro-batch, so that no token's choice depends on
            later ones. score: those with the lowest scores.
    """

    is_coupled = True
    exports = True

    def __init__(self, capacity: float = 1.25, drop: str = "position") -> None:
        check_positive("router.capacity", capacity)
        if drop not in DROPS:
            raise ValueError(f"router.drop ({drop}) must be {' or '.join(DROPS)}")
        self.capacity, self.drop = capacity, drop
        self.looks_ahead = drop == "score"

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        num_tokens, num_experts = chosen_by_TE.shape
        ids_TK = chosen_by_TE.topk(self.family.top_k).indices
        if not training:
            return ids_TK
        room = math.ceil(self.capacity * num_tokens * self.family.top_k / num_experts)
        order_M = torch.arange(ids_TK.numel(), device=ids_TK.device)
        if self.drop == "score":
            order_M = (
                scores_at(scores_TE.detach(), ids_TK)
                .flatten()
                .argsort(descending=True, stable=True)
            )
        place_M = torch.empty_like(order_M)
        place_M[order_M] = places(ids_TK.flatten()[order_M], num_experts)
        return ids_TK.masked_fill(place_M.view_as(ids_TK) >= room, num_experts)


class ExpertChoice(Router):
    """Every expert takes its best capacity * T * K / E tokens of a rank's micro-batch
    (arXiv:2202.09368), in evaluation too.

    Experts of a rank's tokens have equal loads by construction; a token has between 0 and E. Looks
    ahead in the sequence.

    Args:
        capacity: tokens per expert, as a multiple of its even share.
    """

    looks_ahead = True
    is_coupled = True
    normalises = False

    def __init__(self, capacity: float = 1.0) -> None:
        check_positive("router.capacity", capacity)
        self.capacity = capacity

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        num_tokens, num_experts = chosen_by_TE.shape
        share = round(self.capacity * num_tokens * self.family.top_k / num_experts)
        taken_CE = chosen_by_TE.topk(min(num_tokens, max(1, share)), dim=0).indices
        none_TE = torch.full_like(chosen_by_TE, num_experts, dtype=torch.int64)
        expert_CE = torch.arange(num_experts, device=taken_CE.device).expand_as(taken_CE)
        return none_TE.scatter(0, taken_CE, expert_CE)


def places(ids_M: Tensor, num_experts: int) -> Tensor:
    """How many before each have the same id, int64 [M]."""
    order_M = ids_M.argsort(stable=True)
    counts_E = torch.bincount(ids_M, minlength=num_experts + 1)
    first_E = counts_E.cumsum(0) - counts_E
    place_M = torch.empty_like(ids_M)
    place_M[order_M] = torch.arange(len(ids_M), device=ids_M.device) - first_E[ids_M[order_M]]
    return place_M
