"""Ranks, the nodes they share, and the speeds between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FLOPS_PER_PARAMETER = 6  # of a matrix per row, forward and backward
GIGABIT = 1e9 / 8  # bytes


@dataclass(frozen=True)
class Topology:
    """The ranks of an expert-parallel group on their nodes, and two classes of links.

    Attributes:
        node_of_R: node of every rank.
        intra_gbps, inter_gbps: bandwidth of one rank to another on its node, and to another node,
            Gbit/s in one direction.
        flops: floating-point operations per second that one rank reaches on matrix products.
        latency_us: time of an empty message between two nodes, microseconds.
        flops_R: as `flops`, rank by rank, where ranks differ. inter_gbps_NN: as `inter_gbps`, node
            by node, symmetric, where links differ; its diagonal is not read.
        node_gbps: bandwidth of all ranks of a node together to other nodes, Gbit/s in one
            direction, read by `simulate` alone; None if each rank has `inter_gbps` for itself.

    Raises:
        ValueError: for no ranks, a speed that is not positive and finite, or tables whose sizes do
            not fit the ranks and nodes.
    """

    node_of_R: tuple[int, ...]
    intra_gbps: float
    inter_gbps: float
    flops: float
    latency_us: float = 0.0
    flops_R: tuple[float, ...] | None = None
    inter_gbps_NN: tuple[tuple[float, ...], ...] | None = None
    node_gbps: float | None = None

    def __post_init__(self) -> None:
        if not self.node_of_R:
            raise ValueError("topology.node_of_R is empty; name the node of every rank")
        for name in ("intra_gbps", "inter_gbps", "flops", "node_gbps"):
            value = getattr(self, name)
            if name == "node_gbps" and value is None:
                continue
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"topology.{name} ({value}) must be > 0 and finite")
        if not (self.latency_us >= 0 and math.isfinite(self.latency_us)):
            raise ValueError(f"topology.latency_us ({self.latency_us}) must be >= 0 and finite")

        if sorted(set(self.node_of_R)) != list(range(self.num_nodes)):
            raise ValueError(
                f"topology.node_of_R {self.node_of_R} must number the nodes 0..N-1 without gaps"
            )
        self._check_tables()

    @classmethod
    def even(
        cls,
        num_nodes: int,
        ranks_per_node: int,
        *,
        intra_gbps: float,
        inter_gbps: float,
        flops: float,
        latency_us: float = 0.0,
        node_gbps: float | None = None,
    ) -> Topology:
        """Nodes of equally many ranks, in order."""
        node_of_R = tuple(r // ranks_per_node for r in range(num_nodes * ranks_per_node))
        return cls(node_of_R, intra_gbps, inter_gbps, flops, latency_us, node_gbps=node_gbps)

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_R)

    @property
    def num_nodes(self) -> int:
        return len(set(self.node_of_R))

    def is_even(self) -> bool:
        """Whether every node has equally many ranks, in order: what two-level dispatch needs."""
        per_node = self.num_ranks // self.num_nodes
        return self.node_of_R == tuple(r // per_node for r in range(self.num_ranks))

    def bytes_per_s_RR(self) -> npt.NDArray[np.float64]:
        """Bandwidth of every pair of ranks, float64 [R, R]; infinite from a rank to itself."""
        node_R = np.array(self.node_of_R)
        if self.inter_gbps_NN is None:
            gbps_RR = np.full((self.num_ranks, self.num_ranks), float(self.inter_gbps))
        else:
            gbps_RR = np.array(self.inter_gbps_NN, dtype=np.float64)[node_R[:, None], node_R]
        gbps_RR[node_R[:, None] == node_R] = self.intra_gbps
        np.fill_diagonal(gbps_RR, np.inf)
        return gbps_RR * GIGABIT

    def flops_per_s_R(self) -> npt.NDArray[np.float64]:
        """Speed of every rank, float64 [R]."""
        return np.array(self.flops_R or [self.flops] * self.num_ranks, dtype=np.float64)

    def rows_worth_moving(self, bytes_per_parameter: float = 6.0) -> tuple[int, int]:
        """Rows from which moving an expert takes less time than it saves: (intra, inter) node.

        A row costs 6 operations per parameter of the expert and a moved expert
        `bytes_per_parameter` bytes per parameter, so the expert's size cancels out: the bound is
        flops / bandwidth (arXiv:2601.17111 asserts such a bound without stating it).

        Args:
            bytes_per_parameter: both ways: 6 for bf16 weights and fp32 gradients, 8 if the
                weights are fetched again for the backward pass.
        """
        flops_per_byte = bytes_per_parameter / FLOPS_PER_PARAMETER * self.flops / GIGABIT
        return (
            max(1, math.ceil(flops_per_byte / self.intra_gbps)),
            max(1, math.ceil(flops_per_byte / self.inter_gbps)),
        )

    def _check_tables(self) -> None:
        if self.flops_R is not None:
            if len(self.flops_R) != self.num_ranks:
                raise ValueError(
                    f"topology.flops_R has {len(self.flops_R)} speeds for {self.num_ranks} ranks"
                )
            if not all(value > 0 and math.isfinite(value) for value in self.flops_R):
                raise ValueError(f"topology.flops_R {self.flops_R} must be > 0 and finite")
        if self.inter_gbps_NN is None:
            return
        gbps_NN = np.array(self.inter_gbps_NN, dtype=np.float64)
        if gbps_NN.shape != (self.num_nodes, self.num_nodes):
            raise ValueError(
                f"topology.inter_gbps_NN is {gbps_NN.shape}, the nodes are {self.num_nodes}"
            )
        links = gbps_NN[~np.eye(self.num_nodes, dtype=bool)]
        if not (np.isfinite(links) & (links > 0)).all() or (gbps_NN != gbps_NN.T).any():
            raise ValueError(
                "topology.inter_gbps_NN must be symmetric, and its links > 0 and finite"
            )
