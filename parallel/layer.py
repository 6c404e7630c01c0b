"""The expert-parallel MoE layer: one data path for every plan.

T tokens on this rank, K choices, E experts, R ranks of the EP group, D hidden width, M rows
computed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel.decisions import Decision, decide
from parallel.dispatch import Dispatcher
from parallel.experts import Experts
from parallel.phases import phase
from parallel.plan import DispatchPlan, Planner


class ExpertParallel(nn.Module):
    """Takes the place of a MoE block's `experts`, with the same signature and the same results.

    Holds only the experts at home on this rank. For a given routing, output and gradients
    equal those of the family's own module, whatever the placement, the plan and the EP size.
    """

    def __init__(
        self,
        family_experts: nn.Module,
        *,
        layer_index: int,
        home_E: Tensor,
        planner: Planner,
        dispatcher: Dispatcher,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_experts = len(home_E)
        self.home_E = home_E
        self.planner = planner
        self.dispatcher = dispatcher
        self.local_experts = (home_E == dispatcher.rank).nonzero().flatten().tolist()
        self.experts = Experts(family_experts, self.local_experts)

    @torch.compiler.disable  # it reads counts on the host; the layers around it compile
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, [T, D].

        Args:
            hidden_states: [T, D]. top_k_index: [T, K] expert ids, E for "no expert".
            top_k_weights: [T, K].
        """
        x_TD, ids_TK = hidden_states, top_k_index.long()
        with phase("decide"):
            plan = decide(lambda: self._decide(ids_TK)).plan
            slot_E = self.slots(plan)
        with phase("borrow"):
            weights = self.experts.borrow(plan, self.dispatcher.group, slot_E)
        with phase("dispatch"):
            sent = self.dispatcher.dispatch(x_TD, ids_TK, plan, slot_E)
        with phase("compute"):
            y_MD = self.experts(sent.x_MD, sent.rows_S, weights)
        with phase("combine"):
            return self.dispatcher.combine(y_MD, sent, top_k_weights)

    def _decide(self, ids_TK: Tensor) -> Decision:
        counts_RE = self.dispatcher.count(ids_TK)  # the layer's one host sync
        return Decision(self.layer_index, counts_RE, self.planner(counts_RE, self.home_E))

    def slots(self, plan: DispatchPlan) -> Tensor:
        """This rank's slot of every expert, int64 [E]: native by id, then borrowed; -1 for none."""
        slot_E = torch.full((self.num_experts,), -1, dtype=torch.int64)
        here = plan.borrowed[plan.borrowed[:, 2] == self.dispatcher.rank, 0]
        held = torch.cat([torch.tensor(self.local_experts), here])
        slot_E[held] = torch.arange(len(held))
        return slot_E

    def extra_repr(self) -> str:
        return f"layer_index={self.layer_index}, num_experts={self.num_experts}"

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        raise TypeError("an expert-parallel layer is bound to its process group; export it instead")
