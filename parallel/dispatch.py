"""Rows to where the plan computes them, and their outputs back home.

T tokens on this rank, K choices, E experts, R ranks of the EP group, S slots of this rank,
D hidden width, N rows that this rank sends, M rows that it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.comm import exchange
from parallel.memory import cache_blocks
from parallel.plan import DispatchPlan


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived at this rank, and the way back.

    Attributes:
        x_MD: rows to compute, ordered by slot, then source rank, then token.
        rows_S: rows of every slot: native experts by id, then borrowed ones by id.
        row_N: index into the flattened [T*K] choices of every row sent, in sending order.
        send_R, receive_R: rows sent to and received from every rank.
        arrival_M: place among the arrivals of every row of x_MD; None if they came in slot order.
        num_tokens: T.
    """

    x_MD: Tensor
    rows_S: list[int]
    row_N: Tensor
    send_R: list[int]
    receive_R: list[int]
    arrival_M: Tensor | None
    num_tokens: int


class Dispatcher:
    """Dropless dispatch with uneven splits over one EP group; holds no per-step state."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.num_experts = num_experts

    def count(self, ids_TK: Tensor) -> Tensor:
        """Rows per source rank and expert, int64 [R, E] on the CPU: the layer's one host sync.

        The id E means "no expert": such choices are not counted, not sent and add nothing.
        """
        ids = ids_TK.flatten()
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=ids.device)
        counts = counts.scatter_add_(0, ids, torch.ones_like(ids))[: self.num_experts]
        if self.num_ranks == 1:
            return counts[None].cpu()
        everyones = counts.new_empty(self.num_ranks * self.num_experts)
        dist.all_gather_single(everyones, counts.contiguous(), group=self.group)
        return everyones.view(self.num_ranks, self.num_experts).cpu()

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, plan: DispatchPlan, slot_E: Tensor
    ) -> Dispatched:
        """Send every row to the rank that computes it.

        Args:
            x_TD: hidden states. ids_TK: int64 expert ids, E for none.
            plan: who computes which rows.
            slot_E: int64 [E], this rank's slot of every expert it holds or borrows.
        """
        device, num_choices = x_TD.device, ids_TK.shape[1]
        segments, source, computing = plan.rows, plan.rows[:, 1], plan.rows[:, 2]

        mine = segments[source == self.rank]  # by expert: the order of the sorted rows
        by_rank = torch.argsort(mine[:, 2], stable=True)
        num_sent = int(mine[:, 3].sum())
        row_N = torch.argsort(ids_TK.flatten(), stable=True)[:num_sent]
        if not _is_sorted(by_rank):
            row_N = row_N[_ranges(mine[:, 3], by_rank).to(device)]
        send_R = _sum_by(mine[:, 2], mine[:, 3], self.num_ranks)

        arriving = segments[computing == self.rank]
        arriving = arriving[torch.argsort(arriving[:, 1], stable=True)]  # by source, then expert
        slots = slot_E[arriving[:, 0]]
        receive_R = _sum_by(arriving[:, 1], arriving[:, 3], self.num_ranks)
        by_slot = torch.argsort(slots, stable=True)
        arrival_M = None
        if not _is_sorted(by_slot):
            arrival_M = _ranges(arriving[:, 3], by_slot).to(device)
        num_slots = int(slot_E.max()) + 1
        rows_S = _sum_by(slots, arriving[:, 3], num_slots)

        x_ND = _Spread.apply(x_TD, row_N, num_choices)
        x_MD = exchange(x_ND, send_R, receive_R, self.group)
        if arrival_M is not None:
            x_MD = _Permute.apply(x_MD, arrival_M, _inverse(arrival_M))
        return Dispatched(x_MD, rows_S, row_N, send_R, receive_R, arrival_M, x_TD.shape[0])

    def combine(self, y_MD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        """Bring the outputs home and sum them with their weights: [T, D] in y's dtype."""
        if sent.arrival_M is not None:
            y_MD = _Permute.apply(y_MD, _inverse(sent.arrival_M), sent.arrival_M)
        y_ND = exchange(y_MD, sent.receive_R, sent.send_R, self.group)
        return _WeightedSum.apply(y_ND, weights_TK.to(y_ND.dtype), sent.row_N)


class _Spread(torch.autograd.Function):
    """Rows of tokens: one copy for every choice; gradients of a token's rows are summed."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_N: Tensor, num_choices: int) -> Tensor:
        ctx.save_for_backward(row_N)
        ctx.shape_TK = x_TD.shape[0], num_choices
        return x_TD.index_select(0, torch.div(row_N, num_choices, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_N,) = ctx.saved_tensors
        return _sum_rows(grads[0], row_N, grads[0].new_ones(ctx.shape_TK)), None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient takes the inverse order (a gather, not a scatter)."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD.index_select(0, order_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_M,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_M), None, None


class _WeightedSum(torch.autograd.Function):
    """out[t] = sum of weights[t, k] * y over the rows of token t, in one pass over the rows.

    Sums of bf16 rows are accumulated in fp32.
    """

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, row_N: Tensor) -> Tensor:
        num_choices = weights_TK.shape[1]
        token_N = torch.div(row_N, num_choices, rounding_mode="floor")
        weight_N = weights_TK.flatten()[row_N]
        ctx.save_for_backward(y_ND, weight_N, row_N, token_N)
        ctx.weights_shape = weights_TK.shape
        return _sum_rows(y_ND, row_N, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y_ND, weight_N, row_N, token_N = ctx.saved_tensors
        grad_ND = grads[0].index_select(0, token_N)
        grad_weight_N = torch.cat(
            [
                torch.linalg.vecdot(g, y)
                for g, y in zip(cache_blocks(grad_ND), cache_blocks(y_ND), strict=True)
            ]
        )
        grad_weights = weight_N.new_zeros(ctx.weights_shape).flatten()
        grad_weights[row_N] = grad_weight_N.to(weight_N.dtype)
        grad_ND *= weight_N[:, None]  # in place: every fresh block of memory costs page faults
        return grad_ND, grad_weights.view(ctx.weights_shape), None


def _sum_rows(y_ND: Tensor, row_N: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of rows by token: `row_N` gives the place in [T*K] of every row."""
    num_tokens, num_choices = weights_TK.shape
    if not len(y_ND):
        return y_ND.new_zeros(num_tokens, y_ND.shape[1])
    place = torch.zeros(num_tokens * num_choices, dtype=row_N.dtype, device=row_N.device)
    place[row_N] = torch.arange(len(row_N), device=row_N.device)
    if len(row_N) < len(place):  # choices of no expert point anywhere, with weight 0
        weights = torch.zeros_like(weights_TK).flatten()
        weights[row_N] = weights_TK.flatten()[row_N]
        weights_TK = weights.view(num_tokens, num_choices)
    return F.embedding_bag(
        place.view(num_tokens, num_choices),
        y_ND,
        mode="sum",
        per_sample_weights=weights_TK,
    )


def _inverse(order_M: Tensor) -> Tensor:
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return inverse_M


def _ranges(sizes: Tensor, order: Tensor) -> Tensor:
    """Indices of consecutive blocks of the given sizes, the blocks taken in another order."""
    starts = torch.cumsum(sizes, 0) - sizes
    sizes, starts = sizes[order], starts[order]
    shifts = starts - (torch.cumsum(sizes, 0) - sizes)
    total = int(sizes.sum())
    return torch.arange(total) + torch.repeat_interleave(shifts, sizes, output_size=total)


def _sum_by(key: Tensor, number: Tensor, num_keys: int) -> list[int]:
    return torch.zeros(num_keys, dtype=torch.int64).index_add_(0, key, number).tolist()


def _is_sorted(order: Tensor) -> bool:
    return bool((order[1:] > order[:-1]).all())
