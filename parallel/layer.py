"""The expert-parallel MoE layer: one data path for every plan.

T tokens on this rank, K choices, E experts, D hidden width, M rows computed here, S slots.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from parallel.borrow import Loan
from parallel.decisions import (
    Decision,
    Traffic,
    decide,
    is_replaying,
    once,
    report_routing,
    report_traffic,
)
from parallel.dispatch import Dispatched, Dispatcher
from parallel.experts import Experts, expert_outputs
from parallel.lending import join_returned, notice_backward
from parallel.phases import phase, timed_layer, watch_backward
from parallel.plan import DispatchPlan, Planner
from parallel.planners.stateful import StatefulPlanner
from parallel.step import current_step


class ExpertParallel(nn.Module):
    """Takes the place of a MoE block's `experts`, with the same signature and the same results.

    Holds only the experts at home on this rank. For a given routing, output and gradients
    equal those of the family's own module, whatever the placement, the plan and the EP size.

    Args:
        num_chunks: parts of the rows whose journeys and products overlap; see `Dispatcher`.
        refetch: drop borrowed weights after the forward pass and fetch them again for the
            backward pass: less memory, one more journey.
    """

    def __init__(
        self,
        family_experts: nn.Module,
        *,
        layer_index: int,
        home_E: Tensor,
        planner: Planner,
        dispatcher: Dispatcher,
        num_chunks: int = 1,
        refetch: bool = False,
    ) -> None:
        super().__init__()
        local_experts = (home_E == dispatcher.rank).nonzero().flatten().tolist()
        self.experts = Experts(family_experts, local_experts)
        self.path = DataPath(
            self.experts,
            family_experts,
            layer_index=layer_index,
            home_E=home_E,
            planner=planner,
            dispatcher=dispatcher,
            num_chunks=num_chunks,
            refetch=refetch,
        )

    @property
    def layer_index(self) -> int:
        return self.path.layer_index

    @property
    def num_experts(self) -> int:
        return len(self.path.home_E)

    @property
    def local_experts(self) -> list[int]:
        """Experts at home on this rank, by slot."""
        return self.path.local_experts

    def experts_in(self, stack: Tensor) -> list[int]:
        """Experts that this rank holds of a stack [S, ...], or parts of, by local slot.

        Args:
            stack: plain, or a DTensor sharded over EDP by experts (dim 0) or within each (dim 1).
        """
        if not isinstance(stack, DTensor) or stack.placements != (Shard(0),):
            return self.local_experts
        number = len(stack.to_local())
        first = number * stack.device_mesh.get_local_rank()
        return self.local_experts[first : first + number]

    @torch.compiler.disable  # it reads counts on the host; the layers around it compile
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, [T, D].

        Args:
            hidden_states: [T, D]. top_k_index: [T, K] expert ids, E for "no expert".
            top_k_weights: [T, K].
        """
        with timed_layer(self.layer_index):
            out = self.path(hidden_states, top_k_index.long(), top_k_weights, self.experts.stacks())
        watch_backward(hidden_states, out)
        return out

    def extra_repr(self) -> str:
        return f"layer_index={self.layer_index}, num_experts={self.num_experts}"

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        raise TypeError("an expert-parallel layer is bound to its process group; export it instead")


class DataPath:
    """Plan, dispatch, compute, combine: what one layer does with its tokens. Holds no parameters.

    Args:
        owner: module whose parameters are the native stacks. family: supplies the mathematics.
        meanwhile: computed while the tokens travel.
    """

    def __init__(
        self,
        owner: nn.Module,
        family: nn.Module,
        *,
        layer_index: int,
        home_E: Tensor,
        planner: Planner,
        dispatcher: Dispatcher,
        num_chunks: int = 1,
        refetch: bool = False,
    ) -> None:
        self.owner, self.family = owner, family
        self.layer_index = layer_index
        self.planner, self.dispatcher = planner, dispatcher
        self.num_chunks, self.refetch = num_chunks, refetch
        self.meanwhile: Callable[[], None] | None = None
        self.agreed = layer_index  # digest of all decisions
        self.rehome(home_E)
        self._mix = torch.arange(len(home_E) * dispatcher.num_ranks) * 2 + 1

    def rehome(self, home_E: Tensor) -> None:
        """Take the homes [E] as they are from now on; the weights are there already."""
        self.home_E = home_E
        self.local_experts = (home_E == self.dispatcher.rank).nonzero().flatten().tolist()
        self.slots = {expert: slot for slot, expert in enumerate(self.local_experts)}
        self.agreed = zlib.crc32(home_E.numpy().tobytes(), self.agreed)

    def __call__(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, stacks: Mapping[str, Tensor]
    ) -> Tensor:
        """Weighted sums [T, D]. Args: stacks: the native weights [S, ...] by name."""
        report_routing(self.layer_index, ids_TK)
        with phase("decide"):
            plan = decide(lambda: self._decide(ids_TK)).plan
        with phase("borrow"):
            loans = once(lambda: self._borrow(plan, stacks))
            fetched = [loan for loan in loans if loan.start_fetch(stacks)]
            stacks = join_returned(stacks, loans)
        with phase("dispatch"):
            slot_E = self._slot_E(loans)
            sent = self.dispatcher.dispatch(x_TD, ids_TK, weights_TK, plan, slot_E, self.num_chunks)
            if self.meanwhile is not None:
                self.meanwhile()
        with phase("compute"):
            back = []
            for chunk in sent.chunks:
                x_MD = chunk.receive()
                y_MD = expert_outputs(self.family, x_MD, chunk.rows_S, stacks, loans)
                back.append(chunk.send_back(y_MD))
        with phase("combine"):
            finished = [c.finish(ticket) for c, ticket in zip(sent.chunks, back, strict=True)]
            out_TD = sum(finished[1:], finished[0])
        report_traffic(lambda: self._traffic(sent, x_TD, fetched))
        if self.refetch and not is_replaying():
            for loan in loans:
                if not loan.keep:
                    loan.drop_weights()
        return notice_backward(out_TD, loans, stacks, self.refetch)

    def _decide(self, ids_TK: Tensor) -> Decision:
        """Count, plan, and take the plan into the digest that the next count compares."""
        where = f"MoE layer {self.layer_index}"
        counts_RE = self.dispatcher.count(ids_TK, self.agreed, where)
        start = time.perf_counter()
        planner: Planner = self.planner
        if not torch.is_grad_enabled() and isinstance(planner, StatefulPlanner):
            planner = planner.stateless
        plan = planner(counts_RE, self.home_E)
        seconds = time.perf_counter() - start
        decided = (counts_RE.flatten() * self._mix).sum(), plan.load_R()
        parts = torch.cat([decided[0][None], decided[1], plan.borrowed.flatten()])
        self.agreed = zlib.crc32(parts.numpy().tobytes(), self.agreed)
        return Decision(self.layer_index, counts_RE, plan, seconds)

    def _borrow(self, plan: DispatchPlan, stacks: Mapping[str, Tensor]) -> list[Loan]:
        """Loans that bring what the plan borrows: one, or those that are kept for the step."""
        step = current_step()
        wanted = [tuple(row) for row in plan.borrowed.tolist()]
        if step is None or not plan.keep:
            return [self._lend(wanted, stacks)] if wanted else []
        kept = step.kept(self.owner)
        there = {row for loan in kept for row in loan.borrowed}
        missing = [row for row in wanted if row not in there]
        if missing:
            kept.append(self._lend(missing, stacks, keep=True))
        return list(kept)

    def _lend(
        self,
        borrowed: list[tuple[int, int, int]],
        stacks: Mapping[str, Tensor],
        keep: bool = False,
    ) -> Loan:
        step = current_step()
        loan = Loan(
            borrowed,
            self.slots,
            stacks,
            self.dispatcher.lending,
            self.dispatcher.node_of_R,
            keep=keep,
        )
        if step is not None:
            loan.on_return = lambda loan: step.expect(self.owner, loan)
        return loan

    def _traffic(self, sent: Dispatched, x_TD: Tensor, fetched: list[Loan]) -> Traffic:
        row = 2 * x_TD.shape[1] * x_TD.itemsize  # a token there, its sum back
        experts = [loan.bytes_sent(1 + self.refetch) for loan in fetched]
        return Traffic(
            self.layer_index,
            sent.within * row,
            sent.across * row,
            sum(within for within, _ in experts),
            sum(across for _, across in experts),
        )

    def _slot_E(self, loans: list[Loan]) -> Tensor:
        """This rank's slot of every expert, int64 [E]: native by id, then borrowed; -1 for none."""
        slot_E = torch.full((len(self.home_E),), -1, dtype=torch.int64)
        held = [*self.local_experts, *(expert for loan in loans for expert in loan.experts)]
        slot_E[torch.tensor(held)] = torch.arange(len(held))
        return slot_E
