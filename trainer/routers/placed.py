"""Routers that know where experts live: they trade the router's choice for less traffic.

T tokens on this rank, K choices, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from parallel.mesh import ParallelMesh
from parallel.model import moe_layers
from trainer.routers.base import Router, check_positive
from trainer.routers.capacity import Capacity, places


class Placed(Router):
    """Reads the homes of experts, which may change between steps. Training alone differs from the
    family, so plain transformers choose alike afterwards."""

    exports = True

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        self.paths: list[Any] = [layer.path for _, layer in moe_layers(model)]

    def homes(self, layer: int) -> Tensor:
        """Home of every expert of a layer, int64 [E]."""
        home_E: Tensor = self.paths[layer].home_E
        return home_E


class Rectified(Placed, Capacity):
    """Capacity without dropping (Rectify-Router, arXiv:2402.12399): a row that finds no room goes
    to the best expert of its own rank that has some; room that is left goes to tokens whose next
    best expert has it.

    Every expert has room for ceil(capacity * T * K / E) rows of a rank's micro-batch, first tokens
    first. A row without room then tries the experts of its rank that the token has not, by score,
    one a round; without room anywhere it is dropped. Looks ahead: later tokens' first choices take
    room before that. Dispatch carries at most the room of every expert, and such rows do not
    travel. Results depend on the number of ranks and on where experts live.

    Args:
        capacity: room, as a multiple of an expert's even share.
        fill: give left room to the tokens with the highest scores whose next best expert has it.
    """

    looks_ahead = True
    is_coupled = True

    def __init__(self, capacity: float = 1.25, fill: bool = False) -> None:
        check_positive("router.capacity", capacity)
        self.capacity, self.fill = capacity, fill

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        ids_TK = chosen_by_TE.topk(self.family.top_k).indices
        if not training:
            return ids_TK
        num_tokens, num_experts = chosen_by_TE.shape
        room = math.ceil(self.capacity * num_tokens * self.family.top_k / num_experts)
        place_TK = places(ids_TK.flatten(), num_experts).view_as(ids_TK)
        kept_TK = ids_TK.masked_fill(place_TK >= room, num_experts)
        here_N = (self.homes(layer) == self.mesh.ep_rank).nonzero().flatten()
        kept_TK = take_at_home(kept_TK, ids_TK, chosen_by_TE, here_N.to(ids_TK.device), room)
        if self.fill:
            kept_TK = fill_room(kept_TK, ids_TK, chosen_by_TE, room)
        return kept_TK


class Local(Placed):
    """A bonus for experts whose home is on the token's node, decayed (after LocMoE,
    arXiv:2401.13920): fewer rows cross nodes at first, until the router decides alone.

    Results depend on the number of nodes and on where experts live; how much the router is
    overruled is in the metrics.

    Args:
        bonus: on the scores, in the first step. half_life: steps in which it halves.
    """

    def __init__(self, bonus: float = 0.1, half_life: float = 1000.0) -> None:
        check_positive("router.bonus", bonus)
        check_positive("router.half_life", half_life)
        self.bonus, self.half_life = bonus, half_life

    def prepare(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().prepare(model, mesh)
        if len(set(mesh.node_of_ep_ranks())) == 1:
            raise ValueError(
                f"router=local prefers experts on the token's node, but the {mesh.ep_size} ranks "
                f"of an EP group share one; use another router, or mesh.ranks_per_node < mesh.ep"
            )

    def now(self) -> float:
        """The bonus in this step."""
        return self.bonus * 0.5 ** ((self.step - 1) / self.half_life)

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        if training:
            node_R = torch.tensor(self.mesh.node_of_ep_ranks())
            is_near_E = (node_R == node_R[self.mesh.ep_rank])[self.homes(layer)]
            chosen_by_TE = chosen_by_TE + self.now() * is_near_E.to(chosen_by_TE)
        return chosen_by_TE.topk(self.family.top_k).indices

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        used = self.now()
        return {**super().after_step(counts_LE), "router/local_bonus": used}


def take_at_home(
    kept_TK: Tensor, ids_TK: Tensor, chosen_by_TE: Tensor, here_N: Tensor, room: int
) -> Tensor:
    """Refused rows (id E) go to experts of this rank that have room and that the token has not.

    Args:
        ids_TK: what tokens chose. here_N: experts of this rank.
    """
    num_experts = chosen_by_TE.shape[1]
    taken_TE = one_hot_sum(ids_TK, num_experts) > 0
    ranked_TN = here_N[chosen_by_TE[:, here_N].argsort(dim=1, descending=True, stable=True)]
    for number in range(len(here_N)):  # a round for each: what is taken in one is taken in the next
        wish_T1 = ranked_TN[:, number, None]
        is_free_T1 = ~taken_TE.gather(1, wish_T1)
        refused_TK = (kept_TK == num_experts) & is_free_T1
        first_TK = refused_TK & (refused_TK.cumsum(1) == 1)  # a row of a token at a time
        wish_TK = wish_T1.expand_as(kept_TK).masked_fill(~first_TK, num_experts)
        left_E = room - one_hot_sum(kept_TK, num_experts).sum(0)
        place_TK = places(wish_TK.flatten(), num_experts).view_as(wish_TK)
        fits_TK = first_TK & (place_TK < left_E[wish_T1])
        kept_TK = torch.where(fits_TK, wish_TK, kept_TK)
        taken_TE = taken_TE.scatter(1, wish_T1, ~is_free_T1 | fits_TK.any(1, keepdim=True))
    return kept_TK


def fill_room(kept_TK: Tensor, ids_TK: Tensor, chosen_by_TE: Tensor, room: int) -> Tensor:
    """One more choice [T, K + 1]: of every token's next best expert, as long as that has room, for
    the tokens with the highest scores."""
    num_experts = chosen_by_TE.shape[1]
    has_TE = (one_hot_sum(ids_TK, num_experts) + one_hot_sum(kept_TK, num_experts)) > 0
    free_TE = chosen_by_TE.masked_fill(has_TE, -torch.inf)
    score_T, next_T = free_TE.max(1)
    order_T = score_T.argsort(descending=True, stable=True)
    place_T = torch.empty_like(next_T)
    place_T[order_T] = places(next_T[order_T], num_experts)
    left_E = room - one_hot_sum(kept_TK, num_experts).sum(0)
    fits_T = (place_T < left_E[next_T]) & (score_T > -torch.inf)
    return torch.cat([kept_TK, next_T.masked_fill(~fits_T, num_experts)[:, None]], 1)


def one_hot_sum(ids_TK: Tensor, num_experts: int) -> Tensor:
    """How often each token has each expert, int64 [T, E]; E itself does not count."""
    zero_TE = ids_TK.new_zeros(len(ids_TK), num_experts + 1)
    return zero_TE.scatter_add(1, ids_TK, torch.ones_like(ids_TK))[:, :num_experts]
