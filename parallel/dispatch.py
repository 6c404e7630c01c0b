"""Rows to where the plan computes them, and their outputs back home.

T tokens on this rank, K choices, E experts, R ranks of the EP group, S slots of this rank, D hidden
width, J steps of the ring of ranks (comm.py). N rows that this rank sends, M rows that it computes.
U copies of tokens: a token travels once to every rank that computes some of its rows, however many,
and what these add up to travels back once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.bags import Bags, expand, reduce
from parallel.comm import Exchange, Ring, Tag
from parallel.plan import DispatchPlan
from parallel.routes import Copies, Direct, Own, Route

PLACE_BYTES = 4


@dataclass(frozen=True)
class Chunk:
    """Rows that some source ranks have computed here, together.

    Attributes:
        rows_S: rows of every slot: native experts by id, then borrowed ones.
        bags: the copy of every row; rows are ordered by slot, then source, then token.
        weight_M: routing weight of every row.
        route: of the copies. ticket: for their arrival.
    """

    rows_S: list[int]
    bags: Bags
    weight_M: Tensor
    route: Route
    ticket: Tensor

    def receive(self) -> Tensor:
        """Rows [M, D] to compute, once they are here."""
        return expand(self.route.arrive(self.ticket), self.bags)

    def send_back(self, y_MD: Tensor) -> Tensor:
        """Set out the weighted sums of the outputs by copy; `finish` takes what is returned."""
        return self.route.back(reduce(y_MD, self.bags, self.weight_M))

    def finish(self, ticket: Tensor) -> Tensor:
        """This rank's tokens' sums over these rows, [T, D], once they are here."""
        return self.route.home(ticket)


@dataclass(frozen=True)
class Dispatched:
    """Rows under way to this rank, in chunks, and what this rank sent.

    Attributes:
        within, across: copies of tokens that left this rank, for its node and for others.
    """

    chunks: list[Chunk]
    within: int
    across: int


class Dispatcher:
    """Dropless dispatch over one EP group: every copy straight to its rank.

    Args:
        node_of_R: node of every rank of the group; default: all on one.
        weights_group: the same ranks, for borrowed experts, on backends that need a group of its
            own for what is in flight beside the rows; default: `group`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        node_of_R: Sequence[int] | None = None,
        weights_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.num_experts = num_experts
        self.node_of_R = list(node_of_R or [0] * self.num_ranks)
        self.ring = Ring.of(group, node_of_R)
        self.lending = Ring.of(weights_group or group, node_of_R)
        self.sent_in_R = _inverse(self.ring.to_J)
        self.source_J = torch.tensor(self.ring.from_J)
        self.received_in_R = _inverse(self.ring.from_J)

    def count(self, ids_TK: Tensor, digest: int = 0, where: str = "a layer") -> Tensor:
        """Rows per source rank and expert, int64 [R, E] on the CPU: a host sync.

        The id E means "no expert": such choices are not counted, not sent and add nothing.

        Args:
            ids_TK: int64.
            digest: of all that the ranks must have agreed on before. where: for the error.

        Raises:
            ValueError: on every rank alike if the digests differ, naming the ranks.
        """
        ids = ids_TK.flatten()
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=ids.device)
        counts.scatter_add_(0, ids, torch.ones_like(ids))
        counts[-1] = digest  # in the place of the choices of no expert
        everyones = counts
        if self.num_ranks > 1:
            everyones = counts.new_empty(self.num_ranks * len(counts))
            dist.all_gather_single(everyones, counts, group=self.group)
        everyones = everyones.cpu().view(self.num_ranks, -1)
        differing = (everyones[:, -1] != everyones[0, -1]).nonzero().flatten().tolist()
        if differing:
            raise ValueError(
                f"{where}: ranks {differing} of the expert-parallel group disagree with its rank 0 "
                f"about placement, planner, counts or an earlier plan; a planner must be a pure "
                f"function of what it is given, and all ranks must run the same layers in order"
            )
        return everyones[:, :-1].contiguous()

    def dispatch(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        plan: DispatchPlan,
        slot_E: Tensor,
        num_chunks: int = 1,
    ) -> Dispatched:
        """Send every token to the ranks that compute its rows: a second host sync, for the sizes.

        Args:
            x_TD: hidden states. ids_TK: int64 expert ids, E for none. weights_TK: routing weights.
            plan: who computes which rows.
            slot_E: int64 [E], this rank's slot of every expert it holds or borrows.
            num_chunks: 1: all rows at once. More: this rank's own rows first, which need no
                journey, then those of the other ranks in num_chunks - 1 groups.
        """
        num_tokens, device = x_TD.shape[0], x_TD.device
        segments = plan.rows
        leaving = _Steps.of(segments[segments[:, 1] == self.rank], 2, self.sent_in_R)
        coming = _Steps.of(segments[segments[:, 2] == self.rank], 1, self.received_in_R)
        groups = self.groups(num_chunks)
        stay = len(groups) > 1 or self.num_ranks == 1  # own rows make no journey

        row_N = torch.argsort(ids_TK.flatten(), stable=True)[: sum(leaving.rows_J)]
        row_N = row_N[_ranges(leaving.sizes_before, leaving.order).to(device)]
        token_N = torch.div(row_N, ids_TK.shape[1], rounding_mode="floor")
        weight_N = weights_TK.flatten().index_select(0, row_N)
        num_own = leaving.rows_J[0] if stay else 0
        step_N = leaving.step_of_rows().to(device)
        copies = Copies.of(token_N[num_own:], step_N[num_own:], num_tokens, self.num_ranks)

        labels = Exchange(
            self.ring, range(int(stay), self.num_ranks), leaving.rows_J[int(stay) :],
            coming.rows_J[int(stay) :], Tag.LABELS,
        )  # fmt: skip
        weight_M, place_M = _Labels.apply(weight_N[num_own:], copies.place_N, labels)
        if stay:
            weight_M = torch.cat([weight_N[:num_own], weight_M])
            place_M = torch.cat([token_N[:num_own], place_M])
        coming_J = torch.zeros(self.num_ranks, dtype=torch.int64, device=device)
        coming_J.scatter_reduce_(0, coming.step_of_rows().to(device), place_M + 1, "amax")
        copies_J, coming_J = torch.stack([copies.number_J, coming_J]).cpu()
        num_slots = int(slot_E.max()) + 1

        chunks, within, across = [], 0, 0
        for steps in groups:
            if stay and steps[0] == 0:
                route: Route = Own()
                start_J, num_copies = torch.zeros(1, dtype=torch.int64), num_tokens
            else:
                route, start_J = self.route(copies, steps, copies_J, coming_J)
                num_copies = int(coming_J[steps.start : steps.stop].sum())
            part, rows = coming.within(steps)
            slots = slot_E[coming.expert[part]]
            start = torch.repeat_interleave(
                start_J[coming.step[part] - steps.start], coming.rows[part]
            )
            source = self.source_J[coming.step[part]]
            by_slot = torch.argsort(slots * self.num_ranks + source)
            order = _ranges(coming.rows[part], by_slot).to(device)
            bags = Bags.of((place_M[rows] + start.to(device))[order], num_copies)
            rows_S = _sum_by(slots, coming.rows[part], num_slots)
            ticket = route.out(x_TD)
            chunks.append(Chunk(rows_S, bags, weight_M[rows].index_select(0, order), route, ticket))
            within, across = within + route.within, across + route.across
        return Dispatched(chunks, within, across)

    def groups(self, num_chunks: int) -> list[range]:
        """Steps of the ring whose rows are computed together, in the order of computation."""
        if num_chunks == 1 or self.num_ranks == 1:
            return [range(self.num_ranks)]
        return [range(1), *split_steps(range(1, self.num_ranks), num_chunks - 1)]

    def route(
        self, copies: Copies, steps: range, copies_J: Tensor, coming_J: Tensor
    ) -> tuple[Route, Tensor]:
        """The way of the copies of some steps, and where those of each source start on arrival.

        Args:
            copies: all that leave. copies_J, coming_J: copies that leave and come in each step.
        """
        some = slice(steps.start, steps.stop)
        exchange = Exchange(self.ring, steps, copies_J[some].tolist(), coming_J[some].tolist())
        token_U = copies.tokens(steps, int(copies_J[some].sum()))
        start_J = coming_J[some].cumsum(0) - coming_J[some]
        return Direct(Bags.of(token_U, copies.num_tokens), exchange), start_J


@dataclass(frozen=True)
class _Steps:
    """Segments of a plan that leave or reach this rank, by step of the ring, then by expert.

    Attributes:
        expert, step, rows: of every segment. rows_J: rows of every step.
        order: from the segments by expert. sizes_before: rows of these.
    """

    expert: Tensor
    step: Tensor
    rows: Tensor
    rows_J: list[int]
    order: Tensor
    sizes_before: Tensor

    @classmethod
    def of(cls, segments: Tensor, peer: int, step_of_R: Tensor) -> _Steps:
        """Args: segments by expert. peer: their column with the other rank."""
        step = step_of_R[segments[:, peer]]
        order = torch.argsort(step, stable=True)
        rows_J = _sum_by(step, segments[:, 3], len(step_of_R))
        by_step = segments[order]
        return cls(by_step[:, 0], step[order], by_step[:, 3], rows_J, order, segments[:, 3])

    def step_of_rows(self) -> Tensor:
        return torch.repeat_interleave(self.step, self.rows)

    def within(self, steps: range) -> tuple[slice, slice]:
        """The segments and the rows of consecutive steps."""
        ends = torch.tensor([steps.start, steps.stop])
        first, last = torch.searchsorted(self.step.contiguous(), ends).tolist()
        return (
            slice(first, last),
            slice(sum(self.rows_J[: steps.start]), sum(self.rows_J[: steps.stop])),
        )


class _Labels(torch.autograd.Function):
    """Routing weights of rows, with the places of their copies, in one message to each rank."""

    @staticmethod
    def forward(
        ctx: Any, weight_N: Tensor, place_N: Tensor, exchange: Exchange
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        place = place_N.int().contiguous().view(torch.uint8).view(len(place_N), PLACE_BYTES)
        weight = weight_N.contiguous().view(torch.uint8).view(len(weight_N), weight_N.itemsize)
        labels = exchange.now(torch.cat([place, weight], dim=1))
        place, weight = (
            part.clone(memory_format=torch.contiguous_format)
            for part in labels.split([PLACE_BYTES, weight_N.itemsize], dim=1)
        )
        place_M = place.view(torch.int32).flatten().long()
        weight_M = weight.view(weight_N.dtype).flatten()
        ctx.mark_non_differentiable(place_M)
        return weight_M, place_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.now(grads[0], back=True), None, None


def split_steps(steps: range, number: int) -> list[range]:
    """Consecutive parts of nearly equal length, none empty."""
    number = min(number, len(steps))
    ends = [steps.start + len(steps) * part // number for part in range(number + 1)]
    return [range(first, last) for first, last in pairwise(ends)]


def _inverse(peers: Sequence[int]) -> Tensor:
    """Step of the ring of every rank, int64 [R]."""
    return torch.argsort(torch.tensor(peers))


def _ranges(sizes: Tensor, order: Tensor) -> Tensor:
    """Indices of consecutive blocks of the given sizes, the blocks taken in another order."""
    starts = torch.cumsum(sizes, 0) - sizes
    sizes, starts = sizes[order], starts[order]
    shifts = starts - (torch.cumsum(sizes, 0) - sizes)
    total = int(sizes.sum())
    return torch.arange(total) + torch.repeat_interleave(shifts, sizes, output_size=total)


def _sum_by(key: Tensor, number: Tensor, num_keys: int) -> list[int]:
    return torch.zeros(num_keys, dtype=torch.int64).index_add_(0, key, number).tolist()
