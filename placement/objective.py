"""What a placement costs, in seconds, rows and balance.

L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.stats import RoutingStats
from placement.table import ExpertPlacement
from placement.topology import FLOPS_PER_PARAMETER, Topology
from placement.trace import Trace
from placement.traffic import check_mode, sends_of_stats, sends_of_trace

FORWARD_SHARE = 1 / 3  # of the operations of a forward and backward pass
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExpertShape:
    """Sizes that turn rows into seconds; the default is one expert of Qwen3-30B-A3B in bf16.

    Attributes:
        hidden: width of a token. parameters: of one expert. bytes_per_value: of a sent activation.
        state_bytes: of one parameter at rest: master weight and optimizer state.
    """

    hidden: int = 2048
    parameters: int = 3 * 2048 * 768
    bytes_per_value: int = 2
    state_bytes: int = 12

    def __post_init__(self) -> None:
        for name in ("hidden", "parameters", "bytes_per_value", "state_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"shape.{name} ({getattr(self, name)}) must be >= 1")

    @property
    def row_bytes(self) -> int:
        """Bytes of a token under way."""
        return self.hidden * self.bytes_per_value

    @property
    def move_bytes(self) -> int:
        """Bytes of an expert that moves: its weights and optimizer state."""
        return self.parameters * self.state_bytes


@dataclass(frozen=True)
class Cost:
    """What the MoE layers cost for the tokens of the statistics or the trace, once through.

    Attributes:
        seconds: traffic_s + compute_s + latency_s.
        rows_local, rows_intra, rows_inter: copies of tokens on their way to their experts that
            stay on their rank, stay on their node, and cross nodes, over all layers. What comes
            back is as much again (in `coherent`: nothing).
        load_ratio_L: max/mean rows per rank of every layer, float64 [L].
        traffic_s: over all layers, of the mean rank. compute_s: of the busiest rank of each layer.
        latency_s: of the exchanges.
    """

    seconds: float
    rows_local: float
    rows_intra: float
    rows_inter: float
    load_ratio_L: Floats
    traffic_s: float
    compute_s: float
    latency_s: float


@dataclass(frozen=True)
class Objective:
    """What placements are judged by.

    Attributes:
        mode: as in `cost`. two_level: tokens cross to a node once.
        traffic_weight: of the seconds of traffic.
        load_weight: of the seconds for which ranks wait for the busiest one. 1: nothing evens out
            the load; 0: a planner does, such as Quota.
        move_weight: of the seconds that moving experts away from the current placement takes, as
            they are counted in a cost: an expert moves only where it saves more. Moves within a
            node are cheap, so they come first where only the node matters.
        max_load_ratio: hard bound of max/mean rows per rank in every layer; None for none.
        max_bytes_per_rank: hard bound of the experts' weights and optimizer state on a rank.
        shape: of an expert.

    Raises:
        ValueError: for weights below 0 or both 0, and for bounds that nothing can meet.
    """

    mode: str = "home"
    two_level: bool = False
    traffic_weight: float = 1.0
    load_weight: float = 1.0
    move_weight: float = 0.0
    max_load_ratio: float | None = None
    max_bytes_per_rank: float | None = None
    shape: ExpertShape = ExpertShape()

    def __post_init__(self) -> None:
        for name in ("traffic_weight", "load_weight", "move_weight"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"objective.{name} ({getattr(self, name)}) must be >= 0")
        if not self.traffic_weight and not self.load_weight:
            raise ValueError(
                "objective.traffic_weight and objective.load_weight are both 0: every placement "
                "would be as good; raise one"
            )
        if self.max_load_ratio is not None and self.max_load_ratio < 1:
            raise ValueError(
                f"objective.max_load_ratio ({self.max_load_ratio}) must be >= 1: the busiest rank "
                f"has at least the mean load"
            )

    def judge(self, cost: Cost) -> float:
        """The weighted seconds of a cost."""
        return self.traffic_weight * cost.traffic_s + self.load_weight * cost.compute_s


# Traffic between consecutive layers alone (ExFlow, arXiv:2401.08383).
AFFINITY = Objective(mode="coherent", load_weight=0.0)
# Load and traffic between layers together (MoETuner, arXiv:2502.06643).
MOETUNER = Objective(mode="coherent")
# The busiest rank alone.
LOAD = Objective(traffic_weight=0.0)


def cost(
    placement: ExpertPlacement,
    stats: RoutingStats,
    topology: Topology,
    *,
    mode: str = "home",
    two_level: bool = False,
    shape: ExpertShape | None = None,
) -> Cost:
    """Expected cost of a placement for the tokens of the statistics.

    Args:
        mode: `home`: tokens return to their source after every layer (training); `batched`: the
            same, with sequences on the rank where most of their rows are (batches.py); `coherent`:
            tokens stay where their expert was (ExFlow's inference, forward pass only).
        two_level: tokens cross to a node once and are handed on there.
        shape: of an expert; default that of Qwen3-30B-A3B.

    Raises:
        ValueError: for statistics, placement and topology that do not fit each other.
    """
    check_mode(mode, topology, two_level)
    check_fit(placement, topology)
    stats.check_model(placement.num_layers, placement.num_experts)
    sends_LRR = sends_of_stats(placement, stats, topology, mode=mode, two_level=two_level)
    load_LR = rank_load(placement, stats.load_LE.numpy())
    return priced(sends_LRR, load_LR, topology, shape or ExpertShape(), mode)


def trace_cost(
    placement: ExpertPlacement,
    trace: Trace,
    topology: Topology,
    *,
    mode: str = "home",
    two_level: bool = False,
    shape: ExpertShape | None = None,
) -> Cost:
    """Exact cost of a placement on a trace, to the row. Arguments and errors as `cost`.

    For `batched`, give a trace whose sources are those that batches.py assigned.
    """
    check_mode(mode, topology, two_level)
    check_fit(placement, topology)
    if (trace.num_layers, trace.num_experts) != (placement.num_layers, placement.num_experts):
        raise ValueError(
            f"the trace is of {trace.num_layers} MoE layers x {trace.num_experts} experts, the "
            f"placement has {placement.num_layers} x {placement.num_experts}"
        )
    sends_LRR = sends_of_trace(placement, trace, topology, mode=mode, two_level=two_level)
    bins = trace.num_experts + 1
    load_LE = np.stack(
        [
            np.bincount(ids_TK.ravel(), minlength=bins)[:-1]
            for ids_TK in trace.ids_TLK.swapaxes(0, 1)
        ]
    )
    load_LR = rank_load(placement, load_LE.astype(np.float64))
    return priced(sends_LRR.astype(np.float64), load_LR, topology, shape or ExpertShape(), mode)


def rank_load(placement: ExpertPlacement, load_LE: Floats) -> Floats:
    """Rows that every rank computes if all stay at home, float64 [L, R]."""
    load_LR = np.zeros((placement.num_layers, placement.num_ranks))
    np.add.at(load_LR, (np.arange(len(load_LE))[:, None], placement.home_LE.numpy()), load_LE)
    return load_LR


def priced(
    sends_LRR: Floats, load_LR: Floats, topology: Topology, shape: ExpertShape, mode: str
) -> Cost:
    """Seconds for copies [L, R, R] by sender and receiver, and rows [L, R] by computing rank."""
    sends_RR, num_layers = sends_LRR.sum(0), len(load_LR)
    node_R = np.array(topology.node_of_R)
    same_rank_RR = np.eye(topology.num_ranks, dtype=bool)
    same_node_RR = (node_R[:, None] == node_R) & ~same_rank_RR
    times = journeys(mode)
    seconds_RR = sends_RR * shape.row_bytes / topology.bytes_per_s_RR()
    traffic_s = times * float(seconds_RR.sum()) / topology.num_ranks
    slow_R = row_operations(shape, mode) / topology.flops_per_s_R()
    compute_s = float((load_LR * slow_R).max(1).sum())
    latency_s = times * num_layers * topology.latency_us * 1e-6 * (topology.num_nodes > 1)
    mean_L = load_LR.mean(1)
    ratio_L = np.divide(load_LR.max(1), mean_L, out=np.ones(num_layers), where=mean_L > 0)
    return Cost(
        seconds=traffic_s + compute_s + latency_s,
        rows_local=float(sends_RR[same_rank_RR].sum()),
        rows_intra=float(sends_RR[same_node_RR].sum()),
        rows_inter=float(sends_RR[~same_rank_RR & ~same_node_RR].sum()),
        load_ratio_L=ratio_L,
        traffic_s=traffic_s,
        compute_s=compute_s,
        latency_s=latency_s,
    )


def journeys(mode: str) -> int:
    """How often a copy travels: there and back, forward and backward; coherent: there, forward."""
    return 1 if mode == "coherent" else 4


def row_operations(shape: ExpertShape, mode: str) -> float:
    """Operations that one row costs its rank."""
    share = FORWARD_SHARE if mode == "coherent" else 1.0
    return share * FLOPS_PER_PARAMETER * shape.parameters


def check_fit(placement: ExpertPlacement, topology: Topology) -> None:
    """Refuse a placement for another number of ranks.

    Raises:
        ValueError: naming both.
    """
    if placement.num_ranks != topology.num_ranks:
        raise ValueError(
            f"the placement is for {placement.num_ranks} ranks, the topology has "
            f"{topology.num_ranks}; give both the same"
        )
