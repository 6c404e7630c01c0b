"""Two views of the same ranks: dense (dp) and expert (edp x ep)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class ParallelMesh:
    """The ranks of a job, seen twice.

    `dense` has the axis "dp" over all ranks: dense parameters are sharded there. `expert` has
    the axes "edp" x "ep": the ranks of one EP group are contiguous and together hold every
    expert once; the EDP group holds the copies of the same experts. Borrowed experts travel in
    `weights_group`, the ranks of the EP group again, where a backend cannot tell messages apart.
    """

    dense: DeviceMesh
    expert: DeviceMesh
    device: torch.device
    ranks_per_node: int
    weights_group: dist.ProcessGroup | None = None

    @classmethod
    def build(
        cls, *, ep: int, ranks_per_node: int | None = None, device_type: str | None = None
    ) -> ParallelMesh:
        """Build both views over the initialised default process group.

        Args:
            ep: size of an expert-parallel group; a divisor of the world size.
            ranks_per_node: ranks that share a node; default LOCAL_WORLD_SIZE, else the world.
            device_type: "cuda" or "cpu"; default "cuda" where there is one.

        Raises:
            ValueError: if `ep` or `ranks_per_node` does not divide the world size.
        """
        world = dist.get_world_size()
        if ep < 1 or world % ep:
            raise ValueError(
                f"mesh.ep ({ep}) must divide the world size ({world}); use one of {divisors(world)}"
            )
        if ranks_per_node is None:
            ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if ranks_per_node < 1 or world % ranks_per_node:
            raise ValueError(
                f"mesh.ranks_per_node ({ranks_per_node}) must divide the world size ({world}); "
                f"use one of {divisors(world)}"
            )
        device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        if device_type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        else:
            device = torch.device(device_type)
        dense = init_device_mesh(device_type, (world,), mesh_dim_names=("dp",))
        expert = init_device_mesh(device_type, (world // ep, ep), mesh_dim_names=("edp", "ep"))
        weights_group = None
        if device_type == "cuda":
            expert_again = init_device_mesh(
                device_type, (world // ep, ep), mesh_dim_names=("edp", "lending")
            )
            weights_group = expert_again.get_group("lending")
        return cls(dense, expert, device, ranks_per_node, weights_group)

    @property
    def rank(self) -> int:
        return self.dense.get_local_rank("dp")

    @property
    def world_size(self) -> int:
        return self.dense.size()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return self.dense.get_group("dp")

    @property
    def ep_group(self) -> dist.ProcessGroup:
        return self.expert.get_group("ep")

    @property
    def edp_group(self) -> dist.ProcessGroup:
        return self.expert.get_group("edp")

    @property
    def ep_size(self) -> int:
        return self.expert.size(1)

    @property
    def edp_size(self) -> int:
        return self.expert.size(0)

    @property
    def ep_rank(self) -> int:
        return self.expert.get_local_rank("ep")

    @property
    def edp_rank(self) -> int:
        return self.expert.get_local_rank("edp")

    def node_of_ep_ranks(self) -> list[int]:
        """Node of every rank of this rank's EP group, in EP order."""
        first = self.rank - self.ep_rank
        return [(first + r) // self.ranks_per_node for r in range(self.ep_size)]
