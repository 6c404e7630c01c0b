"""Recorded routing: which experts the tokens of a step chose, layer by layer, in a file.

T tokens, L MoE layers, K choices.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import ParallelMesh


def save_routing(
    path: Path, routing: list[tuple[int, Tensor]], mesh: ParallelMesh, num_experts: int
) -> None:
    """Write the routing of one optimizer step over all ranks, on rank 0, as one .npz.

    Its arrays: `ids` int32 [T, L, K], the tokens by rank, micro-batch and place; `source` int32
    [T], the rank of every token; `num_experts`. The id num_experts means "no expert".

    Args:
        routing: what `collect_routing` collected on this rank.
    """
    ids_TLK = torch.cat([torch.stack(layers, 1) for layers in _forwards(routing)]).numpy()
    everyones: list[np.ndarray] | None = None
    if mesh.rank == 0:
        everyones = [np.empty(0)] * mesh.world_size
    dist.gather_object(ids_TLK, everyones, group=mesh.dp_group, group_dst=0)
    if everyones is None:
        return
    source = np.repeat(np.arange(mesh.world_size), [len(ids) for ids in everyones])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        ids=np.concatenate(everyones),
        source=source.astype(np.int32),
        num_experts=np.int32(num_experts),
    )


def _forwards(routing: list[tuple[int, Tensor]]) -> list[list[Tensor]]:
    """Choices [T, K] of all layers, forward pass by forward pass."""
    forwards: list[list[Tensor]] = []
    for layer, ids_TK in routing:
        if layer == 0:
            forwards.append([])
        forwards[-1].append(ids_TK)
    return forwards
