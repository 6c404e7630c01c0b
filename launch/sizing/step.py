"""Seconds of an optimizer step, part by part, on described links and GPUs.

The MoE layers are simulated (`placement.simulate`); the rest are matrix products at a share of the
peak, and the journeys of sharded parameters at the nominal speed of the links. R ranks of an EP
group, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from configs.schema import ClusterConfig
from launch.sizing.activations import Routed
from launch.sizing.memory import SUMMED, Engine
from launch.sizing.shapes import Mesh, ModelShape
from parallel.plan import Planner
from placement.objective import ExpertShape
from placement.simulate import simulate_stats
from placement.stats import RoutingStats
from placement.step_time import GRADIENT_BYTES
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import GIGABIT, Topology

LAYERS, SEQUENCES, SEQ_LEN = 2, 16, 2048  # of the made-up routing
PLANS = 5  # timed of every layer; the fastest counts, others may use this machine too
FORWARD_AGAIN = 1 / 3  # of products, and 1/2 of the exchanges, if a layer is recomputed


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of one micro-batch in one EP group; seconds of the busiest rank or link.

    Attributes:
        products_s, exchange_s, borrow_s, latency_s: as in `placement.step_time.Simulation`.
        plan_s: to plan, on the machine that runs this.
        load_ratio: max/mean rows per rank. routed: sizes on the busiest rank.
        borrowed: experts that the busiest rank borrows.
        bytes_intra, bytes_inter: that the mean rank sends for tokens, labels and experts.
    """

    products_s: float
    exchange_s: float
    borrow_s: float
    latency_s: float
    plan_s: float
    load_ratio: float
    routed: Routed
    borrowed: int
    bytes_intra: float
    bytes_inter: float


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step.

    Attributes:
        products: matrix products, those of the busiest ranks. exchange: tokens there and back.
        borrow: borrowed experts. shards: parameters gathered, gradients summed and sharded.
        latency: of messages that wait for each other. plan: of the planner, on the host.
    """

    products: float
    exchange: float
    borrow: float
    shards: float
    latency: float
    plan: float

    @property
    def slowest(self) -> float:
        """If nothing overlaps."""
        return sum(asdict(self).values())

    @property
    def fastest(self) -> float:
        """If all journeys hide behind products, or products behind them; planning never hides."""
        journeys = self.exchange + self.borrow + self.shards
        return max(self.products, journeys) + self.latency + self.plan


def made_up_routing(model: ModelShape, skew: float, seed: int) -> RoutingStats:
    """Statistics of routing with structure and of unequal popularity, where no run has any yet."""
    router = SyntheticRouter(LAYERS, model.num_experts, skew=skew, seed=seed)
    return RoutingStats.of_trace(router.sample(SEQUENCES, SEQ_LEN, model.top_k))


def ep_topology(mesh: Mesh, cluster: ClusterConfig, compute_share: float) -> Topology:
    """Ranks of one EP group, which are neighbours; products reach a share of the peak."""
    assert cluster.intra_gbps and cluster.flops
    per_node = min(mesh.ep, mesh.ranks_per_node)
    return Topology.even(
        mesh.ep // per_node,
        per_node,
        intra_gbps=cluster.intra_gbps,
        inter_gbps=cluster.inter_gbps or cluster.intra_gbps,  # nowhere used if it is null
        flops=cluster.flops * compute_share,
        latency_us=cluster.latency_us or 0.0,
        node_gbps=cluster.node_gbps,
    )


def moe_layer(
    model: ModelShape,
    topology: Topology,
    planner: Planner,
    stats: RoutingStats,
    *,
    tokens: int,
    value: int,
) -> MoELayer:
    """Simulate a layer. Args: tokens: of a rank. value: bytes of an activation and a weight."""
    num_ranks = topology.num_ranks
    placement = ExpertPlacement.contiguous(LAYERS, model.num_experts, num_ranks)
    shape = ExpertShape(model.hidden, model.expert, value)
    mean = simulate_stats(placement, stats, topology, planner, micro_batch=tokens, shape=shape)
    plan_s, borrowed = _plans(placement, stats, planner, tokens)
    copies_RR = mean.sends_RR / LAYERS
    copies = float(max(copies_RR.sum(0).max(), copies_RR.sum(1).max()))
    return MoELayer(
        products_s=mean.compute_s / LAYERS,
        exchange_s=mean.exchange_s / LAYERS,
        borrow_s=mean.borrow_s / LAYERS,
        latency_s=mean.latency_s / LAYERS,
        plan_s=plan_s,
        load_ratio=mean.load_ratio,
        routed=Routed(_up(mean.load_LR.max() / tokens), _up(copies / tokens)),
        borrowed=borrowed,
        bytes_intra=mean.bytes_intra / LAYERS / num_ranks,
        bytes_inter=mean.bytes_inter / LAYERS / num_ranks,
    )


def _up(number: float) -> float:
    """To two digits, so that nearly equal layers are measured once."""
    return math.ceil(number * 100) / 100


def _plans(
    placement: ExpertPlacement, stats: RoutingStats, planner: Planner, tokens: int
) -> tuple[float, int]:
    """Processor seconds of a plan, and most experts that a rank borrows in a layer."""
    num_ranks = placement.num_ranks
    counts_LRE = stats.with_sources(num_ranks).source_LRE * (tokens * num_ranks / stats.tokens)
    seconds, borrowed = [], 0
    for counts_RE, home_E in zip(counts_LRE.round().long(), placement.home_LE, strict=True):
        for _ in range(PLANS):
            start = time.thread_time()
            plan = planner(counts_RE, home_E)
            seconds.append(time.thread_time() - start)
        if len(plan.borrowed):
            borrowed = max(borrowed, int(torch.bincount(plan.borrowed[:, 2]).max()))
    return min(seconds), borrowed


def step(
    model: ModelShape,
    mesh: Mesh,
    engine: Engine,
    layer: MoELayer,
    cluster: ClusterConfig,
    *,
    tokens: int,
    micro_batches: int,
    value: int,
    recompute: bool,
    refetch: bool,
    compute_share: float,
) -> Step:
    """Seconds of an optimizer step. Args: tokens: of a rank and micro-batch."""
    assert cluster.flops
    others = model.flops_per_token - model.expert_flops_per_token
    products = tokens * others / (cluster.flops * compute_share)
    products = (products + model.num_moe * layer.products_s) * (1 + recompute * FORWARD_AGAIN)
    exchanges = model.num_moe * (1 + recompute / 2)
    journeys = 1 + refetch * value / (value + GRADIENT_BYTES)
    return Step(
        products=micro_batches * products,
        exchange=micro_batches * exchanges * layer.exchange_s,
        borrow=micro_batches * model.num_moe * journeys * layer.borrow_s,
        shards=_shards(model, mesh, engine, cluster, micro_batches, value),
        latency=micro_batches * exchanges * layer.latency_s,
        plan=micro_batches * model.num_moe * layer.plan_s,
    )


def _shards(
    model: ModelShape,
    mesh: Mesh,
    engine: Engine,
    cluster: ClusterConfig,
    micro_batches: int,
    value: int,
) -> float:
    """Gathers of weights and sums of gradients, over all ranks for dense and EDP for experts.

    Times that each happens in a step: FSDP2 gathers twice in every micro-batch, or once if the
    weights are kept until the backward pass, and sums gradients once, or in every micro-batch if
    they are split there; ZeRO 1 and 2 gather the new weights once, and ZeRO 2 sums in every
    micro-batch; ZeRO 3 gathers twice and sums in each.
    """
    gathers, sums = {
        Engine.torch: (2 * micro_batches, 1),
        Engine.torch_keep: (micro_batches, 1),
        Engine.torch_split: (2 * micro_batches, micro_batches),
        Engine.zero1: (1, 1),
        Engine.zero2: (1, micro_batches),
        Engine.zero3: (2 * micro_batches, micro_batches),
    }[engine]
    dense, experts = (sum(both) for both in zip(*(u.whole(mesh) for u in model.units), strict=True))
    per_element = gathers * value + sums * SUMMED
    over_all = ring_seconds(dense * per_element, range(mesh.num_ranks), mesh, cluster)
    same_experts = range(0, mesh.num_ranks, mesh.ep)
    return over_all + ring_seconds(experts * per_element, same_experts, mesh, cluster)


def ring_seconds(
    num_bytes: float, members: Sequence[int], mesh: Mesh, cluster: ClusterConfig
) -> float:
    """A gather to, or a sum over, the members of a group: the volume of rings over every link.

    What is gathered enters every node once, over the ports of all members there; within a node
    every rank receives what the others have. All groups of the same kind run at once.

    Args:
        num_bytes: of the whole. members: ranks of one group, evenly over nodes.
    """
    assert cluster.intra_gbps
    on_node = sum(rank < mesh.ranks_per_node for rank in members)
    nodes = len(members) // on_node
    within = num_bytes * (on_node - 1) / on_node / (cluster.intra_gbps * GIGABIT)
    if nodes == 1:
        return within
    assert cluster.inter_gbps
    enters = num_bytes * (nodes - 1) / nodes
    across = enters / on_node / (cluster.inter_gbps * GIGABIT)
    if cluster.node_gbps is not None:
        groups = mesh.ranks_per_node // on_node
        across = max(across, groups * enters / (cluster.node_gbps * GIGABIT))
    return max(within, across)
