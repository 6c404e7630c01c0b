"""The probe of the machine's speeds: the same on all ranks, and only for what is not known."""

from __future__ import annotations

import math

import pytest
import torch

from parallel.mesh import ParallelMesh
from parallel.probe import UNUSED_GBPS, measure_topology
from placement.topology import Topology
from tests.ranks import run_ranks


def probe(ep: int, ranks_per_node: int, known: dict[str, float]) -> Topology:
    mesh = ParallelMesh.build(ep=ep, ranks_per_node=ranks_per_node, device_type="cpu")
    return measure_topology(mesh, torch.float32, **known)


@pytest.mark.parametrize(
    ("world", "ep", "ranks_per_node"), [(4, 4, 2), (4, 4, 1), (4, 2, 2), (1, 1, 1), (6, 3, 2)]
)
def test_all_ranks_measure_the_same(world: int, ep: int, ranks_per_node: int) -> None:
    results = run_ranks(probe, world, ep, ranks_per_node, {})
    for topology in results:
        assert topology.intra_gbps == results[0].intra_gbps > 0
        assert topology.inter_gbps == results[0].inter_gbps > 0
        assert topology.flops == results[0].flops > 1e6
        assert math.isfinite(topology.latency_us)
        assert topology.num_ranks == ep


def test_known_speeds_are_taken_as_they_are() -> None:
    known = {"intra_gbps": 7.0, "inter_gbps": 3.0, "flops": 1e12, "latency_us": 5.0}
    (topology, _) = run_ranks(probe, 2, 2, 1, known)
    assert topology == Topology((0, 1), 7.0, 3.0, 1e12, 5.0)


def test_links_that_are_not_there_are_free() -> None:
    (topology, _) = run_ranks(probe, 2, 2, 2, {})
    assert topology.inter_gbps == UNUSED_GBPS
    assert topology.intra_gbps < UNUSED_GBPS
