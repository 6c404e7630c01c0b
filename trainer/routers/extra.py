"""Routers with choices beside the experts, which stay on the token's rank and cost no row.

T tokens on this rank, K choices, E experts, N choices beside them, D hidden width, L MoE layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks
from trainer.balance.losses import balance_loss, counts
from trainer.routers.base import check_positive
from trainer.routers.family import Family
from trainer.routers.learned import Learned
from trainer.routers.with_loss import LossRouter


class ExtraChoices(Learned, LossRouter):
    """Ids from E on are choices beside the experts, with router weights of their own.

    Attributes:
        num_extra: choices beside the experts.
    """

    replaces_weights = False
    num_extra: int

    def __init__(self, coefficient: float, seed: int) -> None:
        Learned.__init__(self, seed)
        LossRouter.__init__(self, coefficient)

    def first_values(self, weight_LED: Tensor) -> dict[str, Tensor]:
        layers, _, hidden = weight_LED.shape
        std = float(weight_LED.double().std())
        return {"rows": self.normal(layers, self.num_extra, hidden, like=weight_LED, std=std)}

    def logits(self, layer: int, hidden_TD: Tensor, logits_TE: Tensor) -> Tensor:
        rows_ND = self.values["rows"][layer]
        extra_TN = F.linear(hidden_TD.to(rows_ND.dtype), rows_ND)
        return torch.cat([logits_TE.to(extra_TN.dtype), extra_TN], 1)


class NullExperts(ExtraChoices):
    """More choices, of which some are null experts that compute nothing (AdaMoE,
    arXiv:2406.13233): tokens differ in how many experts they have. Real ones share the weight.

    A loss evens the load of all: experts, and null experts by their mean, so that a token may have
    as many as it likes of them. With balance=none. Dispatch carries the rows of real experts: with
    even loads, choices * E / (E + null experts) of a token. The choice depends on the token alone.

    Args:
        choices: of a token; None for 2 K. null_experts: their number; None for as many as make the
            experts of a token K in the mean where loads are even.
        coefficient: of the loss.
    """

    name = "null_experts_loss"

    def __init__(
        self,
        choices: int | None = None,
        null_experts: int | None = None,
        coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(coefficient, seed)
        self.choices, self.null_experts = choices, null_experts

    def check(self, family: Family) -> None:
        experts, top_k = family.num_experts, family.top_k
        choices = 2 * top_k if self.choices is None else self.choices
        extra = self.null_experts
        if extra is None:
            extra = max(1, round(experts * (choices - top_k) / top_k))
        check_positive("router.null_experts", extra)
        if not top_k <= choices <= experts + extra:
            raise ValueError(
                f"router.choices ({choices}) must be between the experts of a token ({top_k}) and "
                f"experts and null experts together ({experts + extra})"
            )
        self.num_choices, self.num_extra = choices, extra

    def weigh(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        experts = self.family.num_experts
        return self.family.weights(scores_TE[:, :experts], ids_TK.clamp(max=experts))

    def of_layer(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        counts_E = counts(ids_TK[None], scores_TE.shape[1])[0].to(scores_TE.dtype)
        real_E, null_N = counts_E.split([self.family.num_experts, self.num_extra])
        counts_E = torch.cat([real_E, null_N.mean().expand_as(null_N)])
        return load_loss(scores_TE, counts_E, torch.full_like(counts_E, 1 / len(counts_E)))


class ZeroExperts(ExtraChoices):
    """Some of the K choices may be experts that cost nothing and never travel (MoE++,
    arXiv:2410.07348): zero ones give 0, copies the token itself, constant ones a mixture of the
    token and a learnt vector. Logits of a layer add a learnt map of those of the layer before.

    A loss evens the load: every zero-cost expert is to have 1 / tau times the rows of another.
    With balance=none. Dispatch carries E / (E + N / tau) of the rows where loads are as wanted. The
    choice depends on the token alone.

    Args:
        zero, copy, constant: numbers of experts.
        tau: > 0; below 1 more tokens cost nothing. coefficient: of the loss.
    """

    name = "zero_experts_loss"

    def __init__(
        self,
        zero: int = 1,
        copy: int = 1,
        constant: int = 2,
        tau: float = 0.75,
        coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(coefficient, seed)
        check_positive("router.tau", tau)
        if min(zero, copy, constant) < 0 or zero + copy + constant == 0:
            raise ValueError(
                f"router.zero, copy, constant ({zero}, {copy}, {constant}) must be >= 0 and not "
                f"all 0"
            )
        self.zero, self.copy, self.constant, self.tau = zero, copy, constant, tau
        self.num_extra = zero + copy + constant

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        for layer, (_, block) in enumerate(moe_blocks(model)):
            block.experts.register_forward_hook(
                lambda _, inputs, out, layer=layer: out + self.at_home(layer, inputs[0]).to(out)
            )

    def first_values(self, weight_LED: Tensor) -> dict[str, Tensor]:
        layers, experts, hidden = weight_LED.shape
        every, std = experts + self.num_extra, hidden**-0.5
        values = super().first_values(weight_LED)
        values["residual"] = weight_LED.new_zeros(layers, every, every)
        if self.constant:
            shape = layers, self.constant, hidden
            values["vectors"] = self.normal(*shape, like=weight_LED, std=std)
            values["mixes"] = self.normal(*shape[:2], 2, hidden, like=weight_LED, std=std)
        return values

    def logits(self, layer: int, hidden_TD: Tensor, logits_TE: Tensor) -> Tensor:
        logits_TE = super().logits(layer, hidden_TD, logits_TE)
        if layer:
            logits_TE = logits_TE + F.linear(
                self.carried[layer - 1], self.values["residual"][layer]
            )
        self.carry(layer, logits_TE)
        return logits_TE

    def weigh(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        experts = self.family.num_experts
        weights_TK = self.family.weights(scores_TE, ids_TK)
        is_free_TK = ids_TK >= experts
        free_TN = weights_TK.new_zeros(len(ids_TK), self.num_extra)
        place_TK = (ids_TK - experts).clamp(min=0)
        # read by the hook on the experts of the same block, which run next
        self.free_TN = free_TN.scatter_add(1, place_TK, weights_TK * is_free_TK)
        return weights_TK * ~is_free_TK

    def at_home(self, layer: int, hidden_TD: Tensor) -> Tensor:
        """What the chosen zero-cost experts give, times their weights [T, D]."""
        _, copy_TN, constant_TN = self.free_TN.split([self.zero, self.copy, self.constant], 1)
        hidden_TD = hidden_TD.to(self.free_TN.dtype)
        token_T1 = copy_TN.sum(1, keepdim=True)
        if not self.constant:
            return token_T1 * hidden_TD
        mixes_ND = self.values["mixes"][layer].to(hidden_TD.dtype)
        share_TN2 = torch.einsum("td,nsd->tns", hidden_TD, mixes_ND).softmax(-1)
        token_TN, vector_TN = (constant_TN[..., None] * share_TN2).unbind(-1)
        vectors_ND = self.values["vectors"][layer].to(hidden_TD.dtype)
        return (token_T1 + token_TN.sum(1, keepdim=True)) * hidden_TD + vector_TN @ vectors_ND

    def of_layer(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        counts_E = counts(ids_TK[None], scores_TE.shape[1])[0]
        wanted_E = torch.ones_like(counts_E, dtype=scores_TE.dtype)
        wanted_E[self.family.num_experts :] = 1 / self.tau
        return load_loss(scores_TE, counts_E, wanted_E / wanted_E.sum())


def load_loss(scores_TE: Tensor, counts_E: Tensor, wanted_E: Tensor) -> Tensor:
    """sum_i f_i P_i / wanted_i: f_i the share of the rows, P_i the mean share of the scores; 1
    where both are as wanted.

    Args:
        wanted_E: shares, in sum 1.
    """
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    mean_E = share_TE.sum(0) / max(1, len(share_TE))
    return balance_loss(counts_E[None], mean_E[None], wanted_E)[0]
