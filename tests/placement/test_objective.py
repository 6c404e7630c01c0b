"""Costs against loops over tokens, and the problem against the costs."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.batches import assign
from placement.formulate import problem_of
from placement.objective import AFFINITY, LOAD, MOETUNER, ExpertShape, Objective, cost, trace_cost
from placement.solve import solve
from placement.stats import RoutingStats
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace
from placement.traffic import copies, sends_of_stats, sends_of_trace, sources_of
from tests.placement.test_stats import some_trace

SHAPE = ExpertShape(hidden=10, parameters=100, bytes_per_value=4)


def topology(nodes: int, per_node: int) -> Topology:
    return Topology.even(
        nodes, per_node, intra_gbps=8.0, inter_gbps=2.0, flops=1e6, latency_us=50.0
    )


def some_placement(layers: int, experts: int, ranks: int, seed: int) -> ExpertPlacement:
    rng = np.random.default_rng(seed)
    homes = np.arange(experts) // (experts // ranks)
    return ExpertPlacement(
        torch.from_numpy(np.stack([rng.permutation(homes) for _ in range(layers)])), ranks
    )


def walked(
    placement: ExpertPlacement, trace: Trace, nodes: Topology, mode: str, two_level: bool
) -> np.ndarray:
    """Sends per layer, sender and receiver, token by token."""
    ranks, node, per_node = nodes.num_ranks, nodes.node_of_R, nodes.num_ranks // nodes.num_nodes
    sends = np.zeros((trace.num_layers, ranks, ranks), dtype=np.int64)

    def journey(layer: int, start: int, goals: set[int], back: bool) -> None:
        legs = []
        for goal in goals:
            relay = node[goal] * per_node + start % per_node
            if not two_level or node[goal] == node[start]:
                legs.append((start, goal))
            elif relay != goal:
                legs.append((relay, goal))
        if two_level:
            for other in {node[goal] for goal in goals} - {node[start]}:
                legs.append((start, other * per_node + start % per_node))
        for a, b in legs:
            sends[layer, b if back else a, a if back else b] += 1

    for token, source in enumerate(sources_of(trace, ranks).tolist()):
        at = source
        for layer in range(trace.num_layers):
            chosen = trace.ids_TLK[token, layer].tolist()
            homes = [int(placement.home_LE[layer, e]) for e in chosen if e < trace.num_experts]
            journey(layer, at, set(homes), back=False)
            if mode == "coherent":
                if chosen[0] < trace.num_experts:
                    at = homes[0]
                journey(layer, at, set(homes) - {at}, back=True)
    return sends


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 2), (2, 1)]),
    st.integers(0, 25),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from(["home", "batched", "coherent"]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_a_traces_sends_are_those_of_its_tokens(
    shape: tuple[int, int], tokens: int, layers: int, top_k: int, mode: str, two: bool, seed: int
) -> None:
    nodes = topology(*shape)
    experts = 2 * nodes.num_ranks
    trace = some_trace(tokens, layers, experts, min(top_k, experts), nodes.num_ranks, seed)
    placement = some_placement(layers, experts, nodes.num_ranks, seed)
    sends = sends_of_trace(placement, trace, nodes, mode=mode, two_level=two)
    np.testing.assert_array_equal(sends, walked(placement, trace, nodes, mode, two))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([(1, 4), (2, 2), (3, 2)]),
    st.sampled_from(["home", "coherent"]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_expected_sends_are_exact_for_one_choice(
    shape: tuple[int, int], mode: str, two_level: bool, seed: int
) -> None:
    nodes = topology(*shape)
    experts = 2 * nodes.num_ranks
    trace = some_trace(60, 3, experts, 1, nodes.num_ranks, seed, absent=0)
    placement = some_placement(3, experts, nodes.num_ranks, seed)
    stats = RoutingStats.of_trace(trace, nodes.num_ranks)
    settings = {"mode": mode, "two_level": two_level}
    expected = sends_of_stats(placement, stats, nodes, **settings)  # type: ignore[arg-type]
    exact = sends_of_trace(placement, trace, nodes, **settings)  # type: ignore[arg-type]
    np.testing.assert_allclose(expected, exact, atol=1e-9)
    assert cost(placement, stats, nodes, mode=mode, two_level=two_level).seconds == pytest.approx(
        trace_cost(placement, trace, nodes, mode=mode, two_level=two_level).seconds, rel=1e-12
    )


@pytest.mark.parametrize(("top_k", "off"), [(2, 1e-12), (3, 0.01), (6, 0.01)])
@pytest.mark.parametrize("absent", [0, 0.2])
def test_expected_copies_to_every_rank(top_k: int, off: float, absent: float) -> None:
    """Exact for two choices; "no expert" among them or not."""
    nodes = topology(2, 2)
    for seed in range(10):
        trace = some_trace(1000, 2, 12, top_k, 4, seed, absent=absent)
        placement = some_placement(2, 12, 4, seed)
        stats = RoutingStats.of_trace(trace, 4)
        expected = sends_of_stats(placement, stats, nodes).sum((0, 1))
        exact = sends_of_trace(placement, trace, nodes).sum((0, 1))
        np.testing.assert_allclose(expected, exact, rtol=off)


@pytest.mark.parametrize("top_k", [2, 4, 8])
@pytest.mark.parametrize("mode", ["home", "batched"])
def test_expected_copies_where_choices_and_sources_are_tied(top_k: int, mode: str) -> None:
    """Topics on one rank, and in `batched` domains too: what crosses is within 3 %."""
    nodes = topology(2, 2)
    trace = SyntheticRouter(2, 16, "domain", num_domains=4).sample(64, 32, top_k)
    trace = replace(trace, source_T=sources_of(trace, 4))
    start = ExpertPlacement.contiguous(2, 16, 4)
    objective = Objective("batched", load_weight=0, shape=SHAPE)
    stats = RoutingStats.of_trace(trace, 4)
    placement = solve(stats, nodes, start, objective=objective, time_limit_s=10).placement
    if mode == "batched":
        at_home_RT = [
            (placement.home_LE.numpy() == rank)[np.arange(2)[:, None], trace.ids_TLK].sum((1, 2))
            for rank in range(4)
        ]
        rows_SR = np.stack(at_home_RT, 1).reshape(64, 32, 4).sum(1)
        trace = replace(trace, source_T=np.repeat(assign(rows_SR, nodes.node_of_R), 32))
        stats = RoutingStats.of_trace(trace, 4)
    apart_RR = 1 - np.eye(4)
    expected = (sends_of_stats(placement, stats, nodes) * apart_RR).sum()
    exact = (sends_of_trace(placement, trace, nodes) * apart_RR).sum()
    assert expected == pytest.approx(exact, rel=0.03)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_copies_are_possible(top_k: int, places: int, sources: int, seed: int) -> None:
    """Not more than rows or tokens, not fewer than rows / K; two choices are exact in total."""
    rng = np.random.default_rng(seed)
    place_STK = rng.choice(places, (sources, 9, top_k), p=rng.dirichlet(np.ones(places)))
    count_STX = (place_STK[..., None] == np.arange(places)).sum(2)
    rows_RX, pairs_X = count_STX.sum(1), (count_STX * (count_STX - 1)).sum((0, 1)) / 2
    tokens_R = np.full(sources, 9.0)
    found_RX = copies(rows_RX.astype(float), pairs_X, tokens_R, top_k)
    assert (found_RX <= np.minimum(rows_RX, 9) + 1e-9).all()
    assert (found_RX >= rows_RX / top_k - 1e-9).all()
    if top_k <= 2:
        np.testing.assert_allclose(found_RX.sum(0), (count_STX > 0).sum((0, 1)), atol=1e-9)


@pytest.mark.parametrize(
    ("experts", "held", "top_k"), [(12, 3, 4), (8, 4, 3), (6, 1, 5), (5, 5, 5)]
)
def test_copies_of_even_choices_are_hypergeometric(experts: int, held: int, top_k: int) -> None:
    """All choices alike: a token misses a rank with C(E - H, K) / C(E, K)."""
    of_rank = top_k * held / experts
    pairs = comb(top_k, 2) * held * (held - 1) / (experts * (experts - 1))
    rows_RX = np.array([[of_rank, top_k - of_rank]])
    found_RX = copies(rows_RX, np.array([pairs, 0.0]), np.ones(1), top_k)
    missed = comb(experts - held, top_k) / comb(experts, top_k)
    assert found_RX[0, 0] == pytest.approx(1 - missed, rel=1e-12)


def test_seconds_by_hand() -> None:
    """Two nodes of one rank; four tokens of rank 0, three of whose experts live on rank 1."""
    nodes = topology(2, 1)
    placement = ExpertPlacement.contiguous(1, 2, 2)
    trace = Trace(np.array([[[0]], [[1]], [[1]], [[1]]]), 2, source_T=np.zeros(4, dtype=np.int64))
    found = trace_cost(placement, trace, nodes, shape=SHAPE)
    assert (found.rows_local, found.rows_intra, found.rows_inter) == (1, 0, 3)
    assert found.load_ratio_L.tolist() == [1.5]
    assert found.traffic_s == pytest.approx(4 * 3 * 40 / 0.25e9 / 2)  # there and back, twice
    assert found.compute_s == pytest.approx(3 * 6 * 100 / 1e6)
    assert found.latency_s == pytest.approx(4 * 50e-6)
    assert found.seconds == pytest.approx(found.traffic_s + found.compute_s + found.latency_s)
    coherent = trace_cost(placement, trace, nodes, mode="coherent", shape=SHAPE)
    assert coherent.traffic_s == pytest.approx(3 * 40 / 0.25e9 / 2)
    assert coherent.compute_s == pytest.approx(found.compute_s / 3)


def test_unlike_ranks_and_links() -> None:
    nodes = Topology(
        (0, 1, 2), 8.0, 2.0, 1e6, flops_R=(1e6, 2e6, 5e5),
        inter_gbps_NN=((0, 4, 1), (4, 0, 2), (1, 2, 0)),
    )  # fmt: skip
    placement = ExpertPlacement.contiguous(1, 3, 3)
    trace = Trace(np.array([[[1]], [[2]], [[2]]]), 3, source_T=np.array([0, 0, 1]))
    found = trace_cost(placement, trace, nodes, shape=SHAPE)
    seconds = 4 * 40 * 8e-9 * (1 / 4 + 1 / 1 + 1 / 2) / 3
    assert found.traffic_s == pytest.approx(seconds)
    assert found.compute_s == pytest.approx(2 * 600 / 5e5)
    with pytest.raises(ValueError, match=r"topology\.flops_R has 2 speeds for 3 ranks"):
        replace(nodes, flops_R=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"topology\.inter_gbps_NN must be symmetric"):
        replace(nodes, inter_gbps_NN=((0, 4, 1), (4, 0, 2), (2, 2, 0)))
    with pytest.raises(ValueError, match="must number the nodes"):
        replace(nodes, node_of_R=(0, 2, 3), inter_gbps_NN=None)


@pytest.mark.parametrize("objective", [AFFINITY, MOETUNER, LOAD, Objective()])
@pytest.mark.parametrize("two_level", [False, True])
def test_the_problem_is_the_objective(objective: Objective, two_level: bool) -> None:
    """One choice per token: values and judged costs of placements differ by a constant."""
    nodes = topology(2, 2)
    trace = some_trace(300, 3, 8, 1, 4, seed=3, absent=0)
    if objective.mode == "coherent":  # the way to the first layer is the same to all ranks
        trace = replace(trace, source_T=None)
    stats = RoutingStats.of_trace(trace)
    objective = replace(objective, two_level=two_level, shape=SHAPE)
    start = some_placement(3, 8, 4, 0)
    problem, constant = problem_of(stats, nodes, start, objective)
    offsets = []
    for seed in range(6):
        placement = some_placement(3, 8, 4, seed)
        found = cost(placement, stats, nodes, mode=objective.mode, two_level=two_level, shape=SHAPE)
        value = problem.value(placement.home_LE.numpy()) + constant
        offsets.append(objective.judge(found) - value)
    if objective.mode == "home" or not two_level:
        np.testing.assert_allclose(offsets, offsets[0], rtol=1e-12)
    else:  # the place to which a node's relay hands on counts as its mean
        scale = objective.judge(found)
        assert np.ptp(offsets) < 0.05 * scale


@pytest.mark.parametrize("per_node", [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("two_level", [False, True])
def test_two_choices_are_exact_too(per_node: tuple[int, int], two_level: bool) -> None:
    """What deduplication saves enters by pairs: of direct dispatch on one rank, not one node."""
    nodes = topology(*per_node)
    trace = some_trace(300, 2, 8, 2, 4, seed=3, absent=0)
    stats = RoutingStats.of_trace(replace(trace, source_T=None))  # even
    objective = Objective(two_level=two_level, shape=SHAPE)
    around = some_placement(2, 8, 4, 9)
    even_s = float(stats.load_LE.sum()) * 600 / 4e6
    for seed in range(6):
        placement = some_placement(2, 8, 4, seed)
        found = cost(placement, stats, nodes, two_level=two_level, shape=SHAPE)
        for near in (None, around):
            problem, constant = problem_of(
                stats, nodes, some_placement(2, 8, 4, 0), objective, around=near
            )
            value = problem.value(placement.home_LE.numpy()) + constant
            assert value + even_s == pytest.approx(objective.judge(found), rel=1e-12)


@pytest.mark.parametrize("top_k", [3, 4, 8])
@pytest.mark.parametrize("two_level", [False, True])
def test_of_more_choices_values_are_near_the_cost(top_k: int, two_level: bool) -> None:
    """Near a placement the value there is its cost (with two levels a pair's saving is a mean over
    the layers); elsewhere it is within 3 %."""
    nodes = topology(2, 2)
    stats = RoutingStats.of_trace(some_trace(300, 2, 16, top_k, 4, seed=3, absent=0))
    objective = Objective(two_level=two_level, load_weight=0, shape=SHAPE)
    for near in (None, *(some_placement(2, 16, 4, seed) for seed in range(3))):
        problem, constant = problem_of(
            stats, nodes, some_placement(2, 16, 4, 0), objective, around=near
        )
        for seed in range(6):
            placement = some_placement(2, 16, 4, seed)
            expected = cost(placement, stats, nodes, two_level=two_level, shape=SHAPE).traffic_s
            value = problem.value(placement.home_LE.numpy()) + constant
            assert value == pytest.approx(expected, rel=0.03)
        if near is not None:
            expected = cost(near, stats, nodes, two_level=two_level, shape=SHAPE).traffic_s
            value = problem.value(near.home_LE.numpy()) + constant
            assert value == pytest.approx(expected, rel=1e-3 if two_level else 1e-9)


def test_near_a_placement_sources_are_where_its_sequences_are() -> None:
    """One choice, in `batched`: the value at that placement is its cost, and falls as rows move to
    their domain's rank."""
    nodes = topology(2, 2)
    trace = replace(some_trace(400, 2, 8, 1, 4, seed=3, absent=0), domain_T=np.arange(400) % 4)
    stats = RoutingStats.of_trace(trace)
    objective = Objective("batched", load_weight=0, shape=SHAPE)
    for seed in range(4):
        near = some_placement(2, 8, 4, seed)
        problem, constant = problem_of(stats, nodes, near, objective, around=near)
        expected = cost(near, stats, nodes, mode="batched", shape=SHAPE).traffic_s
        assert problem.value(near.home_LE.numpy()) + constant == pytest.approx(expected, rel=1e-9)


def test_with_unlike_ranks_waiting_is_for_the_busiest() -> None:
    nodes = replace(topology(1, 4), flops_R=(1e6, 2e6, 2e6, 4e6))
    stats = RoutingStats.of_trace(some_trace(300, 2, 8, 1, 4, seed=3, absent=0))
    problem, _ = problem_of(stats, nodes, some_placement(2, 8, 4, 0), LOAD)
    offsets = []
    for seed in range(6):
        placement = some_placement(2, 8, 4, seed)
        judged = LOAD.judge(cost(placement, stats, nodes))
        offsets.append(judged - problem.value(placement.home_LE.numpy()))
    np.testing.assert_allclose(offsets, 0, atol=1e-9 * judged)


def test_batched_costs_fall_where_domains_have_their_own_experts() -> None:
    """Domain d chooses experts 2d and 2d + 1 only: with sources by domain nothing crosses."""
    nodes = topology(1, 2)
    rng = np.random.default_rng(0)
    domain_T = np.repeat([0, 1], 40)
    ids = (2 * domain_T[:, None] + rng.integers(0, 2, (80, 3)))[:, :, None]
    trace = Trace(ids, 4, domain_T=domain_T, source_T=np.arange(80) % 2)
    stats = RoutingStats.of_trace(trace, 2)
    placement = ExpertPlacement.contiguous(3, 4, 2)
    assert cost(placement, stats, nodes).rows_intra == 120
    assert cost(placement, stats, nodes, mode="batched").rows_intra == pytest.approx(0)
    with pytest.raises(ValueError, match="mode batched needs statistics by domain"):
        cost(placement, RoutingStats.of_trace(replace(trace, domain_T=None)), nodes, mode="batched")


def test_what_does_not_fit_is_refused() -> None:
    stats = RoutingStats.of_trace(some_trace(40, 2, 4, 1, 2, seed=1, absent=0), 2)
    start, nodes = ExpertPlacement.contiguous(2, 4, 2), topology(1, 2)
    with pytest.raises(ValueError, match=r"mode \('fast'\) must be one of home, batched"):
        cost(start, stats, nodes, mode="fast")
    with pytest.raises(ValueError, match="placement is for 2 ranks, the topology has 4"):
        cost(start, stats, topology(1, 4))
    with pytest.raises(ValueError, match="2 MoE layers x 4 experts, the model has 3 x 4"):
        cost(ExpertPlacement.contiguous(3, 4, 2), stats, nodes)
    with pytest.raises(ValueError, match="two_level dispatch needs equally many ranks"):
        cost(start, stats, Topology((0, 0, 1), 1.0, 1.0, 1.0), two_level=True)
    with pytest.raises(ValueError, match=r"max_load_ratio \(0.5\) must be >= 1"):
        Objective(max_load_ratio=0.5)
    with pytest.raises(ValueError, match="are both 0"):
        Objective(traffic_weight=0, load_weight=0)
    busy = RoutingStats(1, 4)
    busy.observe(0, np.array([[0]] * 9 + [[1], [2], [3]]))
    one = ExpertPlacement.contiguous(1, 4, 2)
    with pytest.raises(ValueError, match=r"cannot be met: the busiest expert of layer 0 .* 1\.667"):
        problem_of(busy, nodes, one, Objective(max_load_ratio=1.5))
    with pytest.raises(ValueError, match=r"max_bytes_per_rank \(1,000\) is 1,400 bytes short"):
        problem_of(busy, nodes, one, Objective(max_bytes_per_rank=1000, shape=SHAPE))
    with pytest.raises(ValueError, match=r"max_moves \(-1\) must be >= 0"):
        problem_of(busy, nodes, one, Objective(), max_moves=-1)
    with pytest.raises(ValueError, match=r"shape\.hidden \(0\) must be >= 1"):
        ExpertShape(hidden=0)


def test_moves_have_their_price() -> None:
    """Bytes over the link, of the mean rank; two within the node, one across."""
    nodes = topology(2, 2)
    stats = RoutingStats.of_trace(some_trace(40, 1, 4, 1, 4, seed=1, absent=0), 4)
    start = ExpertPlacement.contiguous(1, 4, 4)
    moved = ExpertPlacement(torch.tensor([[1, 2, 0, 3]]), 4)
    values = []
    for weight in (0.0, 2.0):
        problem, _ = problem_of(stats, nodes, start, replace(AFFINITY, move_weight=weight))
        assert problem.value(start.home_LE.numpy()) == 0
        values.append(problem.value(moved.home_LE.numpy()))
    move_bytes = ExpertShape().parameters * 12
    seconds = move_bytes * (1 / 1e9 + 2 / 0.25e9) / 4
    assert values[1] - values[0] == pytest.approx(2 * seconds)
