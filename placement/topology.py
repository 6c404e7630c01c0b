"""Ranks, the nodes they share, and the speeds between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

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

    Raises:
        ValueError: for no ranks or a speed that is not positive and finite.
    """

    node_of_R: tuple[int, ...]
    intra_gbps: float
    inter_gbps: float
    flops: float
    latency_us: float = 0.0

    def __post_init__(self) -> None:
        if not self.node_of_R:
            raise ValueError("topology.node_of_R is empty; name the node of every rank")
        for name in ("intra_gbps", "inter_gbps", "flops"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"topology.{name} ({value}) must be > 0 and finite")
        if not (self.latency_us >= 0 and math.isfinite(self.latency_us)):
            raise ValueError(f"topology.latency_us ({self.latency_us}) must be >= 0 and finite")

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_R)

    @property
    def num_nodes(self) -> int:
        return len(set(self.node_of_R))

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
