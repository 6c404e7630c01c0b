"""Expert merging: a warm-up in which the experts of a layer draw nearer to those most like them.

E experts, S experts of a rank, K neighbours of an expert, A x B a matrix of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.model import moe_layers
from trainer.balance.base import Balancer

BLOCK = 2**18  # elements of an expert that are multiplied at a time, in float64
DECIMALS = 9  # cosines that differ by less are ties: sums in another order give no other neighbours


class MergeExperts(Balancer):
    """Moves every expert a little towards those most like it (SPES), less and less.

    After every `interval`-th applied optimizer step t, while t < steps, in every layer:
    w_i += alpha * (1 - t / steps) * mean_j(w_j - w_i), for all of an expert's trained parameters.
    The j are the other experts whose gate matrices have the largest cosine with that of i; of
    equal ones those of lower ids. All experts move at once, from what they were before. The fp32
    masters change, the optimizer's moments do not. Equal experts stay equal.

    The same on every mesh and placement, to rounding. Every rank's experts are broadcast in turn;
    a rank needs memory for two stacks of one rank's experts of one layer, and a block of each.

    Args:
        interval: optimizer steps between two merges.
        alpha: share of the way to the neighbours at step 0, > 0 and < 1.
        steps: of the warm-up; the share falls in a straight line to 0 there.
        neighbours: other experts that an expert moves towards.

    Raises:
        ValueError: for a value out of bounds.
    """

    def __init__(
        self, interval: int = 500, alpha: float = 0.01, steps: int = 10_000, neighbours: int = 4
    ) -> None:
        numbers = {"interval": interval, "steps": steps, "neighbours": neighbours}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"balance.merge_experts.{name} ({number}) must be >= 1")
        if not 0 < alpha < 1:
            raise ValueError(f"balance.merge_experts.alpha ({alpha}) must be > 0, < 1")
        self.interval, self.alpha, self.steps, self.neighbours = interval, alpha, steps, neighbours
        self.step = 0

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        num_experts = moe_layers(model)[0][1].num_experts
        if self.neighbours >= num_experts:
            raise ValueError(
                f"balance.merge_experts.neighbours ({self.neighbours}) must be <= "
                f"{num_experts - 1}: a layer has {num_experts} experts; use fewer neighbours"
            )
        self.model = model

    @torch.no_grad()
    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        """Count the step and merge if it is time; the mean cosine of neighbours before that."""
        self.step += 1
        if self.step % self.interval or self.step >= self.steps:
            return {}
        rate = self.alpha * (1 - self.step / self.steps)
        layers = [layer for _, layer in moe_layers(self.model)]
        similarities = []
        for layer in layers:
            neighbours_EK, cosine_EK = nearest(gate_gram(layer), self.neighbours)
            similarities.append(float(cosine_EK.mean()))
            for parameter in layer.experts.parameters(recurse=False):
                if parameter.requires_grad:
                    merge_(layer, parameter, neighbours_EK.tolist(), rate)
        return {"balance/merge_similarity": sum(similarities) / len(layers)}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def nearest(gram_EE: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The K most similar other experts of every expert, nearest first, and their cosines.

    Args:
        gram_EE: products of the experts' matrices, float64; a matrix of zeros is like none.

    Returns:
        ids, int64 [E, K], and cosines, float64 [E, K].
    """
    norm_E = gram_EE.diagonal().sqrt()
    scale_EE = norm_E[:, None] * norm_E
    cosine_EE = torch.where(scale_EE > 0, gram_EE / scale_EE, 0.0)
    ranked_EE = cosine_EE.round(decimals=DECIMALS).fill_diagonal_(-torch.inf)
    ids_EK = ranked_EE.argsort(dim=1, descending=True, stable=True)[:, :number]
    return ids_EK, cosine_EE.gather(1, ids_EK)


def gate_gram(layer: ExpertParallel) -> Tensor:
    """Inner products of the gate matrices of a layer's experts, float64 [E, E]; a collective."""
    stack = layer.experts.stacks()["gate_up_proj" if layer.path.family.has_gate else "up_proj"]
    gate_SAB = gate_of(layer.path.family, stack).contiguous()
    number = layer.num_experts
    gram_EE = torch.zeros(number, number, dtype=torch.float64, device=gate_SAB.device)
    mine = torch.tensor(layer.experts_in(stack), device=gate_SAB.device)
    for theirs, part_SAB in parts(layer, stack, gate_SAB):
        blocks = (t.flatten(1).split(BLOCK, dim=1) for t in (gate_SAB, part_SAB))
        for own_SN, other_SN in zip(*blocks, strict=True):
            gram_EE[mine[:, None], theirs] += own_SN.double() @ other_SN.double().T
    dist.all_reduce(gram_EE)  # every row is one rank's, or the sum of the parts that EDP splits
    return gram_EE


def gate_of(family: Any, stack: Tensor) -> Tensor:
    """This rank's part of the gate matrices [S, A, B], a view; the whole of what has no gate.

    Args:
        stack: gate and up of every expert, halves side by side or alternating.
    """
    local, first = local_of(stack), 0
    if not family.has_gate:
        return local
    if family.is_transposed:
        local, half = local.transpose(1, 2), stack.shape[2] // 2
    else:
        half = stack.shape[1] // 2
        if isinstance(stack, DTensor) and stack.placements == (Shard(1),):
            first = local.shape[1] * stack.device_mesh.get_local_rank()
    if family.is_concatenated:
        return local[:, : max(0, half - first)]
    return local[:, first % 2 :: 2]


def merge_(
    layer: ExpertParallel, stack: Tensor, neighbours_EK: list[list[int]], rate: float
) -> None:
    """Move the experts of one stack towards the mean of their neighbours; a collective."""
    local_S = local_of(stack)
    total_S = torch.zeros_like(local_S)
    mine = layer.experts_in(stack)
    for theirs, part_S in parts(layer, stack, local_S):
        there = dict(zip(theirs.tolist(), part_S, strict=True))
        for slot, expert in enumerate(mine):
            for other in neighbours_EK[expert]:
                if other in there:
                    total_S[slot] += there[other] - local_S[slot]
    local_S.add_(total_S, alpha=rate / len(neighbours_EK[0]))


def parts(layer: ExpertParallel, stack: Tensor, mine_S: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What every rank has of a stack, rank by rank: all experts once; a collective.

    Where EDP splits the stack by experts, from all ranks, else from the ranks of the EP group,
    which hold the same part of each expert.

    Args:
        stack: a parameter of the layer. mine_S: what this rank gives of it.

    Yields:
        the ids of the experts, int64 [S], and their tensors [S, ...], until the next ones.
    """
    by_expert = isinstance(stack, DTensor) and stack.placements == (Shard(0),)
    group = dist.group.WORLD if by_expert else layer.path.dispatcher.group
    ids_S = torch.tensor(layer.experts_in(stack), device=mine_S.device)
    buffer_S = torch.empty_like(mine_S)
    for rank in range(dist.get_world_size(group)):
        here = rank == dist.get_rank(group)
        theirs_S, part_S = (ids_S, mine_S) if here else (torch.empty_like(ids_S), buffer_S)
        for tensor in (theirs_S, part_S):
            dist.broadcast(tensor, group=group, group_src=rank)
        yield theirs_S, part_S


def local_of(stack: Tensor) -> Tensor:
    """This rank's part of a stack, as a view."""
    return stack.to_local() if isinstance(stack, DTensor) else stack
