"""Evenkeel's data path as an expert-parallel implementation of `transformers` itself.

T tokens, K choices, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from parallel.dispatch import Dispatcher
from parallel.layer import DataPath
from parallel.plan import Planner
from parallel.planners import Quota
from placement.table import ExpertPlacement


def register_ep_implementation(
    name: str = "evenkeel",
    *,
    planner: Planner | None = None,
    node_of_R: Sequence[int] | None = None,
    dispatcher: type[Dispatcher] = Dispatcher,
    num_chunks: int = 1,
    refetch: bool = False,
) -> None:
    """Let `DistributedConfig(ep_implementation=name)` of `transformers` run experts by plans.

    Args:
        name: under which `transformers` finds it; several may be registered side by side.
        planner: decides who computes which rows; default `Quota()`.
        node_of_R: node of every rank of an expert-parallel group; default: all on one.
        dispatcher, num_chunks, refetch: see `ExpertParallel`.
    """
    implementation = partial(
        EvenkeelEP,
        planner=planner or Quota(),
        node_of_R=node_of_R,
        dispatcher=dispatcher,
        num_chunks=num_chunks,
        refetch=refetch,
    )
    EPImplementationInterface.register(name, implementation)


class EvenkeelEP(EPImplementation):
    """The data path of `ExpertParallel` over experts that `transformers` sharded and owns.

    Experts live where the library puts them: equal runs of neighbours. The ranks of a
    tensor-parallel group share a batch; each of them sends a slice of its tokens.
    """

    def __init__(
        self,
        experts: nn.Module,
        ep_mesh: DeviceMesh,
        tp_mesh: DeviceMesh,
        *,
        planner: Planner,
        node_of_R: Sequence[int] | None,
        dispatcher: type[Dispatcher],
        num_chunks: int,
        refetch: bool,
    ) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        num_local: Any = self.num_local_experts
        num_experts = num_local * ep_mesh.size()
        placement = ExpertPlacement.contiguous(1, num_experts, ep_mesh.size())
        self.path = DataPath(
            experts,
            experts,
            layer_index=0,
            home_E=placement.home_LE[0],
            planner=planner.for_layer(0) if hasattr(planner, "for_layer") else planner,
            dispatcher=dispatcher(ep_mesh.get_group(), num_experts, node_of_R),
            num_chunks=num_chunks,
            refetch=refetch,
        )

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted expert outputs [T, D] of the tokens of this rank's batch."""
        stacks = dict(self.experts.named_parameters(recurse=False))  # local parts, in here
        if self.tp_mesh.size() == 1:
            return self.path(hidden_states, top_k_index.long(), top_k_weights, stacks)
        mine = [self._slice(part) for part in (hidden_states, top_k_index, top_k_weights)]
        out_TD = self.path(mine[0], mine[1].long(), mine[2], stacks)
        whole = DTensor.from_local(
            out_TD.contiguous(),
            self.tp_mesh,
            [Shard(0)],
            shape=hidden_states.shape,
            stride=(hidden_states.shape[1], 1),
        )
        return whole.full_tensor()

    def _slice(self, shared: Tensor) -> Tensor:
        """This rank's tokens of a batch that its tensor-parallel group shares; differentiable."""
        whole = DTensor.from_local(shared, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(self.tp_mesh, [Shard(0)]).to_local()
