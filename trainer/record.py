"""Recorded routing: which experts the tokens of a step chose, layer by layer, in a file.

T tokens, L MoE layers, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import ParallelMesh
from placement.trace import Trace, joined
from trainer.data.packing import PackedDataset


def save_routing(
    path: Path,
    routing: list[tuple[int, Tensor]],
    micro_batches: Sequence[dict[str, Tensor]],
    dataset: PackedDataset,
    mesh: ParallelMesh,
    num_experts: int,
) -> None:
    """Write the routing of one optimizer step over all ranks, on rank 0, as a trace (.npz).

    Tokens by rank, micro-batch and place; `source` is the rank of every token in the job, `domain`
    the source of its sequence in the data.

    Args:
        routing: what `collect_routing` collected on this rank. micro_batches: of the step.
        dataset: they are from.
    """
    ids_TLK = torch.cat([torch.stack(layers, 1) for layers in _forwards(routing)]).numpy()
    tokens_ST = torch.cat([batch["input_ids"] for batch in micro_batches]).numpy()
    sequence_S = torch.cat([batch["sequence_ids"] for batch in micro_batches]).numpy()
    seq_len = tokens_ST.shape[1]
    mine = Trace(
        ids_TLK,
        num_experts,
        source_T=np.full(len(ids_TLK), mesh.rank),
        sequence_T=np.repeat(sequence_S, seq_len),
        token_T=tokens_ST.ravel(),
        domain_T=np.repeat(dataset.sources_of(sequence_S), seq_len),
    )
    everyones: list[Trace] | None = [mine] * mesh.world_size if mesh.rank == 0 else None
    dist.gather_object(mine, everyones, group=mesh.dp_group, group_dst=0)
    if everyones is not None:
        joined(everyones).save(path)


def _forwards(routing: list[tuple[int, Tensor]]) -> list[list[Tensor]]:
    """Choices [T, K] of all layers, forward pass by forward pass."""
    forwards: list[list[Tensor]] = []
    for layer, ids_TK in routing:
        if layer == 0:
            forwards.append([])
        forwards[-1].append(ids_TK)
    return forwards
