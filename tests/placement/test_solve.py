"""Solutions: never worse than the start, within the limits, with bounds that hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from placement.formulate import problem_of
from placement.objective import AFFINITY, LOAD, MOETUNER, ExpertShape, Objective, cost
from placement.solve import solve
from placement.stats import RoutingStats
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology

SHAPE = ExpertShape(hidden=64, parameters=1000)


def nodes(number: int, per_node: int) -> Topology:
    return Topology.even(number, per_node, intra_gbps=8.0, inter_gbps=2.0, flops=1e9)


def recorded(layers: int, experts: int, top_k: int = 1) -> RoutingStats:
    return RoutingStats.of_trace(SyntheticRouter(layers, experts, "high").sample(30, 32, top_k))


def every_placement(layers: int, experts: int, ranks: int) -> list[np.ndarray]:
    homes = np.arange(experts) // (experts // ranks)
    rows = sorted(set(itertools.permutations(homes.tolist())))
    return [np.array(table) for table in itertools.product(rows, repeat=layers)]


@pytest.mark.parametrize("method", ["auto", "exact", "search"])
@pytest.mark.parametrize(
    "objective",
    [AFFINITY, MOETUNER, LOAD, Objective(), Objective(mode="batched")],
    ids=["affinity", "moetuner", "load", "home", "batched"],
)
def test_bounds_hold_and_the_best_is_found(method: str, objective: Objective) -> None:
    """Every placement of 2 layers x 4 experts on 2 ranks."""
    stats, topology = recorded(2, 4, 2), nodes(1, 2)
    start = ExpertPlacement.contiguous(2, 4, 2)
    problem, constant = problem_of(stats, topology, start, objective)
    values = [problem.value(home_LE) + constant for home_LE in every_placement(2, 4, 2)]
    found = solve(stats, topology, start, method=method, objective=objective, time_limit_s=20)
    assert found.value == pytest.approx(min(values), rel=1e-9)
    assert found.lower_bound <= min(values) * (1 + 1e-9)
    assert found.value <= found.start_value
    assert found.method == ("search" if method == "search" else "exact")
    if found.method == "exact":
        assert found.proven and found.gap == 0
    assert 0 <= found.gap < 1 and found.finished
    assert found.cost.seconds == cost(found.placement, stats, topology, mode=objective.mode).seconds


def test_real_sizes_are_searched_and_two_starts_agree() -> None:
    stats, topology = recorded(6, 16), nodes(2, 2)
    start = ExpertPlacement.contiguous(6, 16, 4)
    found, again = (
        solve(stats, topology, start, objective=AFFINITY, method="search", time_limit_s=30, seed=3)
        for _ in range(2)
    )
    assert found.placement.digest() == again.placement.digest()
    assert found.value < 0.7 * found.start_value
    assert found.gap < 0.3
    assert "experts move and save" in found.describe() and "from optimal" in found.describe()
    settled = solve(stats, topology, found.placement, objective=AFFINITY, time_limit_s=10, seed=4)
    assert settled.value <= found.value * (1 + 1e-12)


def test_limits_hold() -> None:
    stats, topology = recorded(3, 8), nodes(1, 4)
    start = ExpertPlacement.contiguous(3, 8, 4)
    free = solve(stats, topology, start, objective=AFFINITY, time_limit_s=20)
    for most in (0, 2, 6):
        few = solve(stats, topology, start, objective=AFFINITY, max_moves=most, time_limit_s=20)
        assert few.moves == len(start.moves_to(few.placement)) <= most
        assert free.value <= few.value + 1e-12
    ratio = float(free.cost.load_ratio_L.max())
    level = solve(
        stats,
        topology,
        start,
        objective=Objective(mode="coherent", load_weight=0, max_load_ratio=max(1.3, 0.9 * ratio)),
        time_limit_s=20,
    )
    assert level.cost.load_ratio_L.max() <= max(1.3, 0.9 * ratio) + 1e-9


def test_node_first_where_only_the_node_matters() -> None:
    """Expert e is followed by expert 3 - e on the other node: one layer's experts change node."""
    first = np.arange(4).repeat(10)
    stats = RoutingStats(2, 4)
    stats.observe_trace(np.stack([first, 3 - first], 1))
    fast = Topology.even(2, 2, intra_gbps=1e6, inter_gbps=1.0, flops=1e9)
    start = ExpertPlacement.contiguous(2, 4, 4)
    entering = 20  # rows to the first layer's experts that cross nodes from sources anywhere
    assert cost(start, stats, fast, mode="coherent").rows_inter == entering + 40
    objective = Objective(mode="coherent", load_weight=0, move_weight=1e-6, shape=SHAPE)
    found = solve(stats, fast, start, objective=objective, time_limit_s=20)
    assert found.cost.rows_inter == entering
    assert found.moves == 4
    assert all(
        fast.node_of_R[m.source] != fast.node_of_R[m.destination]
        for m in start.moves_to(found.placement)
    )


def test_what_is_refused() -> None:
    stats, topology = recorded(2, 4), nodes(1, 2)
    start = ExpertPlacement.contiguous(2, 4, 2)
    with pytest.raises(ValueError, match=r"method \('fast'\) must be one of auto, exact, search"):
        solve(stats, topology, start, method="fast")
    with pytest.raises(ValueError, match=r"time_limit_s \(0\) must be > 0"):
        solve(stats, topology, start, time_limit_s=0)
    with pytest.raises(ValueError, match="2 MoE layers x 4 experts, the model has 3 x 4"):
        solve(stats, topology, ExpertPlacement.contiguous(3, 4, 2))
    stats.source_LRE[0, 0, 0] += 5
    with pytest.raises(ValueError, match="source_LRE does not sum to load_LE"):
        solve(stats, topology, start)


def test_one_rank_and_one_layer() -> None:
    stats = recorded(1, 4)
    alone = solve(stats, nodes(1, 1), ExpertPlacement.contiguous(1, 4, 1), time_limit_s=5)
    assert alone.moves == 0 and alone.gap == 0
    found = solve(stats, nodes(1, 4), ExpertPlacement.contiguous(1, 4, 4), time_limit_s=5)
    assert torch.equal(found.placement.home_LE.sort().values, torch.arange(4)[None])
