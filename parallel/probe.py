"""Speeds of this machine, measured once at the start: products, links within and across nodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from parallel.comm import Exchange, Ring
from parallel.mesh import ParallelMesh
from placement.topology import Topology

REPEATS = 5
SIDE = {"cpu": 512, "cuda": 4096}  # of the square matrices that are multiplied
MESSAGE_BYTES = {"cpu": 1 << 21, "cuda": 1 << 26}
UNUSED_GBPS = 1e6  # of a link that no two ranks of the group have


def measure_topology(
    mesh: ParallelMesh,
    dtype: torch.dtype,
    *,
    intra_gbps: float | None = None,
    inter_gbps: float | None = None,
    flops: float | None = None,
    latency_us: float | None = None,
) -> Topology:
    """The ranks of this EP group and their speeds; what is not given is measured, in a second.

    Links are measured with all ranks at once, each sending to a neighbour, so ranks that share a
    link or a core share it here too. All ranks get the same figures, those of the slowest.

    Args:
        dtype: of the matrix products.
    """
    nodes, kind = mesh.node_of_ep_ranks(), mesh.device.type
    ring = Ring.of(mesh.ep_group, nodes)
    near = 1 if ring.num_ranks > 1 else None  # step of the ring; over all links if nodes are uneven
    far = ring.per_node % ring.num_ranks or near
    within, across = len(set(nodes)) < len(nodes), len(set(nodes)) > 1
    if flops is None:
        side = SIDE[kind]
        a = torch.ones(side, side, dtype=dtype, device=mesh.device)
        flops = 2 * side**3 / _slowest(lambda: torch.mm(a, a), mesh)
    if intra_gbps is None:
        intra_gbps = _gbps(ring, near, mesh) if within and near else UNUSED_GBPS
    if inter_gbps is None:
        inter_gbps = _gbps(ring, far, mesh) if across and far else UNUSED_GBPS
    if latency_us is None:
        latency_us = 1e6 * _seconds_of_message(ring, far, 8, mesh) if far else 0.0
    node_of_R = tuple(node - nodes[0] for node in nodes)
    return Topology(node_of_R, intra_gbps, inter_gbps, flops, latency_us)


def describe_topology(topology: Topology, bytes_per_parameter: float) -> str:
    """The speeds, and from how many rows a borrowed expert pays, in one line."""
    intra, inter = topology.rows_worth_moving(bytes_per_parameter)
    links = [f"{topology.intra_gbps:.3g} Gbit/s within a node ({intra:,} rows)"]
    if topology.num_nodes > 1:
        links.append(
            f"{topology.inter_gbps:.3g} Gbit/s and {topology.latency_us:.3g} us across nodes "
            f"({inter:,} rows)"
        )
    return (
        f"speeds of a rank: {topology.flops / 1e9:,.3g} GFLOP/s, {', '.join(links)}; "
        f"in brackets the rows from which borrowing an expert pays"
    )


def _gbps(ring: Ring, step: int, mesh: ParallelMesh) -> float:
    size = MESSAGE_BYTES[mesh.device.type]
    return size * 8 / 1e9 / _seconds_of_message(ring, step, size, mesh)


def _seconds_of_message(ring: Ring, step: int, size: int, mesh: ParallelMesh) -> float:
    message = torch.ones(size, dtype=torch.uint8, device=mesh.device)
    return _slowest(lambda: Exchange(ring, [step], [size], [size]).now(message), mesh)


def _slowest(run: Callable[[], object], mesh: ParallelMesh) -> float:
    """Seconds, median of some runs after one, of the slowest rank of the job."""
    seconds = []
    for _ in range(1 + REPEATS):
        dist.barrier(group=mesh.dp_group)
        start = time.perf_counter()
        run()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor([statistics.median(seconds[1:])], dtype=torch.float64)
    slowest = slowest.to(mesh.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=mesh.dp_group)
    return float(slowest)
