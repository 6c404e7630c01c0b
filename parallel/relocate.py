"""Move experts to new homes between optimizer steps: parameters and moments, in place.

A rank holds as many experts of a layer after a relocation as before, so for every expert that it
sends it receives one. The moves of a layer are made in rounds in which a rank sends at most one
expert and receives one at the same time; at the end every rank puts its slots in order. One buffer
for a parameter of one expert is enough for both.

L MoE layers, E experts, F expert width, W ranks of the job, S slots of a rank.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from parallel.comm import Tag, post
from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.model import check_same_on_all_ranks, moe_layers
from parallel.step import current_step
from placement.table import ExpertPlacement


@dataclass(frozen=True)
class Relocation:
    """What a relocation did, the same on every rank.

    Attributes:
        experts: that have another home now, counted once per layer.
        bytes: that left a rank for another one, of all ranks: the parameters and moments of these
            experts. Where EDP splits stacks by experts, also of those that stay in their EP rank
            but whose slot now belongs to another rank of the EDP group.
        seconds: that the slowest rank took.
    """

    experts: int
    bytes: int
    seconds: float


@torch.no_grad()
def relocate(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: ParallelMesh, new: ExpertPlacement
) -> Relocation:
    """Give every expert the home that the new table names; every rank calls this.

    Parameters and moments are the same as before, bit for bit, only elsewhere; a rank needs memory
    for one parameter of one expert. The steps that follow are the same bit for bit as well, in
    fp32 and float64, where no sum depends on homes: the home plan, which computes all rows of an
    expert together, top_k <= 2, EDP <= 2, and rows in one chunk or EP <= 2. (On CPUs some families'
    activations round the last few elements of a tensor otherwise: then F must be a multiple of 32
    too.) Elsewhere, and in bf16, they are the same to rounding.

    If this fails underway the model is torn: end the job and go on from a checkpoint.

    Raises:
        ValueError: on all ranks alike and before anything moves, if they hold different tables or
            the table does not fit the model; also within an optimizer step.
    """
    if current_step() is not None or any(p.grad is not None for p in model.parameters()):
        raise ValueError("relocate: there are gradients of an optimizer step; relocate after it")
    check_same_on_all_ranks(new, mesh)
    layers = [layer for _, layer in moe_layers(model)]
    old = ExpertPlacement(torch.stack([layer.path.home_E for layer in layers]), mesh.ep_size)
    moves = old.moves_to(new)
    start, num_bytes = time.perf_counter(), 0
    for index in sorted({move.layer for move in moves}):
        way_of = cache(partial(Way.of, old.home_LE[index], new.home_LE[index], mesh))
        for stack_S, by_expert in local_stacks(layers[index], optimizer):
            way = way_of(by_expert)
            way.move_(stack_S, mesh.dp_group)
            num_bytes += way.num_trips * stack_S[0].nbytes
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=mesh.dp_group)  # and all have arrived
    for layer, home_E in zip(layers, new.home_LE, strict=True):
        layer.path.rehome(home_E.clone())
    return Relocation(len(moves), num_bytes, float(seconds))


class Trip(NamedTuple):
    """One expert on its way from rank to rank of the job."""

    expert: int
    source: int
    destination: int


@dataclass(frozen=True)
class Way:
    """What this rank does to one stack of experts [S, ...] of a layer.

    Attributes:
        rounds: the expert that leaves and the one that comes, round by round.
        before_S, after_S: the experts in its slots.
        num_trips: of one parameter of one expert, of all ranks.
    """

    rounds: list[tuple[Trip, Trip]]
    before_S: list[int]
    after_S: list[int]
    num_trips: int

    @classmethod
    def of(cls, old_E: Tensor, new_E: Tensor, mesh: ParallelMesh, by_expert: bool) -> Way:
        """The way from one row of a table to another.

        Args:
            by_expert: whether EDP splits the stack by experts. Else every EP group moves what it
                holds, which is all of every expert or the same part of each.
        """
        before_E, after_E = (owners(home_E, mesh, by_expert) for home_E in (old_E, new_E))
        trips = [
            Trip(expert, int(before_E[expert]), int(after_E[expert]))
            for expert in (before_E != after_E).nonzero().flatten().tolist()
        ]
        mine: list[tuple[Trip, Trip]] = []
        for trips_of_round in rounds_of(trips, mesh.world_size):
            leaving = [trip for trip in trips_of_round if trip.source == mesh.rank]
            coming = [trip for trip in trips_of_round if trip.destination == mesh.rank]
            mine += zip(leaving, coming, strict=True)
        before_S, after_S = (
            (rank_E == mesh.rank).nonzero().flatten().tolist() for rank_E in (before_E, after_E)
        )
        return cls(mine, before_S, after_S, len(trips) * (1 if by_expert else mesh.edp_size))

    def move_(self, stack_S: Tensor, group: dist.ProcessGroup) -> None:
        """Make the trips in place, then put the slots in order.

        One place is always free, at first and at last a buffer: what comes goes there, and leaves
        free what went meanwhile.
        """
        buffer = torch.empty_like(stack_S[0])
        places = [*stack_S, buffer]
        held: list[int | None] = [*self.before_S, None]
        free = last = len(stack_S)
        for leaving, coming in self.rounds:
            place = held.index(leaving.expert)
            sends, receives = (leaving.destination, places[place]), (coming.source, places[free])
            for work in post([sends], [receives], group, Tag.WEIGHTS):
                work.wait()
            held[free], held[place], free = coming.expert, None, place
        wanted = [*self.after_S, None]
        while held != wanted:
            if free == last:
                place = next(slot for slot in range(last) if held[slot] != wanted[slot])
            else:
                place = held.index(wanted[free])
            places[free].copy_(places[place])
            held[free], held[place], free = held[place], None, place


def owners(home_E: Tensor, mesh: ParallelMesh, by_expert: bool) -> Tensor:
    """Rank of the job that holds every expert, int64 [E]: of this EP group, or of all ranks."""
    edp_E: Tensor | int = mesh.edp_rank
    if by_expert:
        num_slots = len(home_E) // mesh.ep_size
        slot_E = torch.empty_like(home_E)
        slot_E[torch.argsort(home_E, stable=True)] = torch.arange(len(home_E)) % num_slots
        edp_E = slot_E * mesh.edp_size // num_slots
    return edp_E * mesh.ep_size + home_E


def rounds_of(trips: list[Trip], num_ranks: int) -> list[list[Trip]]:
    """As few rounds as possible in which a rank sends one expert and receives one, or neither.

    Every rank must receive as many experts as it sends. With stays added so that all ranks have
    equally many, every round is a perfect matching of senders and receivers, which then exists.
    """
    left: dict[tuple[int, int], list[int]] = defaultdict(list)
    for expert, source, destination in trips:
        left[source, destination].append(expert)
    number_WW = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for pair, experts in left.items():
        number_WW[pair] = len(experts)
    leaving_W = number_WW.sum(1)
    assert (leaving_W == number_WW.sum(0)).all(), "a rank would hold another number of experts"
    np.fill_diagonal(number_WW, leaving_W.max() - leaving_W)
    rounds = []
    for _ in range(leaving_W.max()):
        to_W = maximum_bipartite_matching(csr_matrix(number_WW), perm_type="column")
        number_WW[np.arange(num_ranks), to_W] -= 1
        pairs = [pair for pair in enumerate(to_W.tolist()) if pair in left]
        rounds.append([Trip(left[pair].pop(), *pair) for pair in pairs])
    return rounds


def local_stacks(
    layer: ExpertParallel, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[Tensor, bool]]:
    """This rank's part of every stack of a layer, parameters and their moments.

    Yields:
        the stack [S, ...], as a view, and whether EDP splits it by experts.
    """
    if isinstance(layer, FSDPModule):
        layer.reshard()  # an evaluation may have left it gathered
    for parameter in layer.experts.parameters(recurse=False):
        state = optimizer.state.get(parameter, {}).values()
        moments = [value for value in state if isinstance(value, Tensor) and value.dim() > 0]
        for stack in (parameter, *moments):
            assert stack.shape == parameter.shape, "optimizer state that is not per element"
            if isinstance(stack, DTensor):
                yield stack.to_local(), stack.placements == (Shard(0),)
            else:
                yield stack, False
