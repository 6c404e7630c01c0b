"""Routers that choose by groups of neighbouring experts.

T tokens on this rank, K choices, E experts, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel.mesh import ParallelMesh
from parallel.model import moe_layers
from trainer.routers.base import Router
from trainer.routers.family import Family, scores_at


class GroupBalanced(Router):
    """The best K / G experts of each of G groups (MoGE, arXiv:2505.21411).

    With one group per EP rank and contiguous homes every rank gets equally many rows whatever the
    router prefers: planners have nothing to do.

    Args:
        groups: of E / G neighbouring experts; None for one per EP rank, whose homes they must be.
    """

    def __init__(self, groups: int | None = None) -> None:
        if groups is not None and groups < 1:
            raise ValueError(f"router.groups ({groups}) must be >= 1")
        self.groups = groups

    def check(self, family: Family) -> None:
        self.num_groups = self.mesh.ep_size if self.groups is None else self.groups
        check_groups(family, self.num_groups)
        if family.top_k % self.num_groups:
            raise ValueError(
                f"router.groups ({self.num_groups}) must divide the experts of a token "
                f"({family.top_k})"
            )

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        size = self.family.num_experts // self.num_groups
        for name, layer in moe_layers(model):
            homes = layer.path.home_E.tolist()
            if self.groups is None and homes != [e // size for e in range(len(homes))]:
                raise ValueError(
                    f"router.groups (null) is one group of neighbouring experts per EP rank, but "
                    f"experts of {name} have homes {homes}; use placement=contiguous, or set "
                    f"router.groups ({self.num_groups})"
                )

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        each = self.family.top_k // self.num_groups
        grouped_TGE = chosen_by_TE.unflatten(1, (self.num_groups, -1))
        first_G1 = torch.arange(self.num_groups, device=chosen_by_TE.device)[:, None]
        return (grouped_TGE.topk(each).indices + first_G1 * grouped_TGE.shape[2]).flatten(1)


class Prototypes(GroupBalanced):
    """The best expert of each of K groups, weighed by the softmax of its own group (M6-T,
    arXiv:2105.15082)."""

    def __init__(self) -> None:
        super().__init__()

    def check(self, family: Family) -> None:
        self.num_groups = self.groups = family.top_k
        check_groups(family, self.num_groups)

    def weigh(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """A softmax of the group's logits is the scores' share of its sum."""
        of_group_TG = scores_TE.unflatten(1, (self.num_groups, -1)).sum(2)
        return scores_at(scores_TE, ids_TK) / of_group_TG.clamp(min=1e-12) * self.family.factor


class GroupLimited(Router):
    """The best K experts of the best groups (arXiv:2405.04434; by the sum of the best two:
    arXiv:2412.19437). Bounds the ranks or nodes that a token visits.

    Families with sigmoids have it themselves: their exported configuration names the groups.

    Args:
        groups: of neighbouring experts; None for one per EP rank. kept: groups of a token.
    """

    def __init__(self, groups: int | None = None, kept: int = 1) -> None:
        if groups is not None and groups < 1:
            raise ValueError(f"router.groups ({groups}) must be >= 1")
        self.groups, self.kept = groups, kept

    def check(self, family: Family) -> None:
        self.num_groups = self.mesh.ep_size if self.groups is None else self.groups
        check_groups(family, self.num_groups)
        if not 1 <= self.kept <= self.num_groups:
            raise ValueError(
                f"router.kept ({self.kept}) must be between 1 and router.groups ({self.num_groups})"
            )
        self.exports = family.is_sigmoid and family.num_experts >= 2 * self.num_groups
        room = self.kept * family.num_experts // self.num_groups
        if room < family.top_k:
            raise ValueError(
                f"router.kept ({self.kept}) groups have {room} experts, a token needs "
                f"{family.top_k}; keep more"
            )

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        if self.exports:
            config: Any = model.config
            config.n_group, config.topk_group = self.num_groups, self.kept

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        grouped_TGE = chosen_by_TE.unflatten(1, (self.num_groups, -1))
        group_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[2])).values.sum(2)
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        kept_TG.scatter_(1, group_TG.topk(self.kept).indices, True)
        allowed_TE = grouped_TGE.masked_fill(~kept_TG[:, :, None], -torch.inf).flatten(1)
        return allowed_TE.topk(self.family.top_k).indices


def check_groups(family: Family, num_groups: int) -> None:
    """Refuse groups of unlike size.

    Raises:
        ValueError: naming both numbers.
    """
    if family.num_experts % num_groups:
        raise ValueError(
            f"router.groups ({num_groups}) must divide the number of experts ({family.num_experts})"
        )
