"""Losses of router outputs: load balancing, the size of logits, entropy.

T tokens on this rank, S sequences, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.decisions import once
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks
from trainer.balance.base import RouterLoss
from trainer.balance.target import check_target, target_load
from trainer.routers.family import SIGMOID_SCORES

SCOPES = {"micro_batch": "aux_loss", "sequence": "sequence_loss", "global_batch": "global_loss"}


class AuxiliaryLoss(RouterLoss):
    """Auxiliary load-balancing loss (arXiv:2006.16668, 2101.03961).

    coefficient * E * sum_i f_i P_i per layer, with f_i the share of rows of expert i (no gradient)
    and P_i its mean probability: softmax, or in sigmoid families the score over the sum of scores
    (arXiv:2412.19437). Balanced routing gives exactly the coefficient. With a target t, in sum 1:
    coefficient * sum_i f_i P_i / t_i.

    Args:
        scope: over what f and P are taken. micro_batch: that of a rank. sequence: each sequence of
            it by itself (arXiv:2412.19437). global_batch: P of the micro-batch, f of all ranks and
            the micro-batches of the step so far (arXiv:2501.11873); one small all-reduce per layer
            and micro-batch.
        schedule: constant, linear, cosine, inverse or inverse_sqrt. steps, final: of linear and
            cosine. until: last step with a loss; None for no end.
        target: what experts are to have, in proportion; None for alike.

    Raises:
        ValueError: for a value out of bounds.
    """

    def __init__(
        self,
        coefficient: float = 1e-2,
        scope: str = "micro_batch",
        schedule: str = "constant",
        steps: int | None = None,
        final: float = 0.0,
        until: int | None = None,
        target: Sequence[float] | None = None,
    ) -> None:
        if scope not in SCOPES:
            raise ValueError(f"balance: scope ({scope}) must be one of {', '.join(SCOPES)}")
        self.name, self.scope, self.target = SCOPES[scope], scope, target
        check_target(f"balance.{self.name}", target)
        super().__init__(coefficient, schedule, steps, final, until)

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        blocks = [block for _, block in moe_blocks(model)]
        self.is_sigmoid = (
            getattr(getattr(model, "config", None), "model_type", "") in SIGMOID_SCORES
        )
        target_E = target_load(f"balance.{self.name}", self.target, blocks[0])
        self.target_E, self.group = target_E.to(mesh.device), mesh.dp_group
        self.num_sequences = [1] * len(blocks)
        if self.scope == "sequence":
            for layer, block in enumerate(blocks):
                block.register_forward_pre_hook(partial(self._note_sequences, layer=layer))

    def before_step(self, num_positions: int) -> None:
        super().before_step(num_positions)
        self.counts: dict[int, Tensor] = {}

    def of_layer(self, layer: int, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        parts = self.num_sequences[layer]
        probability_STE = probabilities(logits_TE, self.is_sigmoid).unflatten(0, (parts, -1))
        counts_SE = counts(ids_TK.unflatten(0, (parts, -1)), logits_TE.shape[1])
        if self.scope == "global_batch":
            counts_SE = once(partial(self._so_far, layer, counts_SE))
        mean_SE = probability_STE.sum(1) / max(1, probability_STE.shape[1])
        return balance_loss(counts_SE, mean_SE, self.target_E).mean()

    def _so_far(self, layer: int, counts_SE: Tensor) -> Tensor:
        """Rows of all ranks in the micro-batches of this step."""
        counts_SE = counts_SE.clone()
        dist.all_reduce(counts_SE, group=self.group)
        self.counts[layer] = self.counts.get(layer, 0) + counts_SE
        return self.counts[layer]

    def _note_sequences(self, block: nn.Module, inputs: tuple[Any, ...], layer: int) -> None:
        self.num_sequences[layer] = max(1, len(inputs[0]))


class ZLoss(RouterLoss):
    """Keeps logits small (arXiv:2202.08906): coefficient * mean over tokens of logsumexp^2."""

    name = "z_loss"

    def of_layer(self, layer: int, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        dtype = torch.promote_types(logits_TE.dtype, torch.float32)
        return (logits_TE.to(dtype).logsumexp(-1) ** 2).sum() / max(1, len(logits_TE))


class EntropyLoss(RouterLoss):
    """Keeps routers sure (arXiv:2403.07652): coefficient * mean entropy of the probabilities, in
    nats. Beside router=top_p, which else learns to be unsure of all experts.
    """

    name = "entropy_loss"

    def of_layer(self, layer: int, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        dtype = torch.promote_types(logits_TE.dtype, torch.float32)
        log_TE = logits_TE.to(dtype).log_softmax(-1)
        return -(log_TE.exp() * log_TE).sum() / max(1, len(logits_TE))


def probabilities(logits_TE: Tensor, is_sigmoid: bool) -> Tensor:
    """Of every expert, in sum 1, float32 or float64 [T, E]."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if not is_sigmoid:
        return logits_TE.softmax(-1)
    score_TE = logits_TE.sigmoid()
    return score_TE / score_TE.sum(-1, keepdim=True).clamp(min=1e-20)


def counts(ids_STK: Tensor, num_experts: int) -> Tensor:
    """Rows per sequence and expert, int64 [S, E]; ids equal to E ("no expert") do not count."""
    flat = ids_STK.flatten(1)
    zero_SE = torch.zeros(len(flat), num_experts + 1, dtype=torch.int64, device=flat.device)
    return zero_SE.scatter_add_(1, flat, torch.ones_like(flat))[:, :num_experts]


def balance_loss(counts_SE: Tensor, mean_SE: Tensor, target_E: Tensor) -> Tensor:
    """sum_i f_i P_i / t_i of every sequence [S]; E * sum_i f_i P_i where targets are alike."""
    share_SE = counts_SE.to(mean_SE.dtype) / counts_SE.sum(-1, keepdim=True).clamp(min=1)
    return (share_SE * mean_SE / target_E.to(mean_SE.dtype)).sum(-1)
