"""What placement predicts is what the dispatchers send, rank by rank and to the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel.dispatch import Dispatcher
from parallel.planners import home_plan
from parallel.two_level import TwoLevelDispatcher
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace
from placement.traffic import sends_of_trace
from tests.ranks import run_ranks


def _sent(
    trace: Trace, home_LE: torch.Tensor, node_of_R: tuple[int, ...], two_level: bool
) -> list[tuple[int, int]]:
    """Copies that this rank sends within its node and to others, layer by layer."""
    kind = TwoLevelDispatcher if two_level else Dispatcher
    assert dist.group.WORLD is not None
    dispatcher = kind(dist.group.WORLD, trace.num_experts, node_of_R)
    assert trace.source_T is not None
    mine = torch.from_numpy(trace.ids_TLK[trace.source_T == dispatcher.rank]).long()
    sent = []
    for layer, home_E in enumerate(home_LE):
        ids_TK = mine[:, layer].contiguous()
        plan = home_plan(dispatcher.count(ids_TK), home_E)
        slot_E = torch.full_like(home_E, -1)
        local = (home_E == dispatcher.rank).nonzero().flatten()
        slot_E[local] = torch.arange(len(local))
        weights_TK = torch.ones(ids_TK.shape)
        dispatched = dispatcher.dispatch(
            torch.zeros(len(mine), 2), ids_TK, weights_TK, plan, slot_E, 1
        )
        for chunk in dispatched.chunks:
            x_MD = chunk.receive()
            chunk.finish(chunk.send_back(x_MD))
        sent.append((dispatched.within, dispatched.across))
    return sent


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("nodes", [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 3)])
def test_sends_are_those_of_the_dispatcher(
    nodes: tuple[int, ...], top_k: int, two_level: bool
) -> None:
    trace = SyntheticRouter(3, 12, "high").sample(7, 9, top_k)
    ids = trace.ids_TLK.copy()
    ids[::5, 1, -1] = 12  # no expert
    rng = np.random.default_rng(top_k)
    source_T = np.sort(rng.integers(0, 3, trace.num_tokens))  # none from the last rank
    trace = Trace(ids, 12, source_T=source_T)
    home_LE = torch.stack([torch.from_numpy(rng.permutation(np.arange(12) // 3)) for _ in range(3)])
    topology = Topology(nodes, 1.0, 1.0, 1.0)
    sends_LRR = sends_of_trace(ExpertPlacement(home_LE, 4), trace, topology, two_level=two_level)
    node_R = np.array(nodes)
    same_RR = (node_R[:, None] == node_R) & ~np.eye(4, dtype=bool)
    across_RR = node_R[:, None] != node_R
    sent = run_ranks(_sent, 4, trace, home_LE, nodes, two_level)
    for rank, layers in enumerate(sent):
        for layer, (within, across) in enumerate(layers):
            assert within == sends_LRR[layer, rank][same_RR[rank]].sum()
            assert across == sends_LRR[layer, rank][across_RR[rank]].sum()
