"""The simulator: numbers worked out by hand, a row-by-row oracle, and the objective's counts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from parallel.borrow import hops
from parallel.planners import LeastLoaded, Quota, Replicated, Sticky, home_plan
from placement.objective import ExpertShape, trace_cost
from placement.simulate import simulate_stats, simulate_trace
from placement.stats import RoutingStats
from placement.step_time import exchange_seconds, expert_hops, link_seconds
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace
from placement.traffic import sources_of

LEVEL = Quota(tolerance=0.0, alpha=1.0)
SHAPE = ExpertShape(hidden=100, parameters=1000, bytes_per_value=2)


def nodes(num_nodes: int = 2, ranks_per_node: int = 2, **more: Any) -> Topology:
    """8 Gbit/s within a node, 0.8 across: 1 GB/s and 0.1 GB/s."""
    speeds = {"intra_gbps": 8.0, "inter_gbps": 0.8, "flops": 1e9, "latency_us": 0.0} | more
    return Topology.even(num_nodes, ranks_per_node, **speeds)


def shuffled(num_layers: int, num_experts: int, num_ranks: int, seed: int) -> ExpertPlacement:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_experts, generator=generator) for _ in range(num_layers)]
    return ExpertPlacement(torch.stack(rows) % num_ranks, num_ranks)


def synthetic(num_layers: int = 3, num_experts: int = 8, top_k: int = 2, seed: int = 0) -> Trace:
    router = SyntheticRouter(num_layers, num_experts, "high", skew=1.0, seed=seed)
    return router.sample(12, 40, top_k)


# ---------------------------------------------------------------- links


def test_links_take_the_time_of_the_busiest_rank_by_hand() -> None:
    bytes_RR = np.zeros((4, 4))
    bytes_RR[0, 1], bytes_RR[1, 0] = 3e9, 2e9  # 3 s within a node, both ways at once
    bytes_RR[0, 2], bytes_RR[0, 3], bytes_RR[1, 3] = 0.1e9, 0.2e9, 0.1e9
    within, across = link_seconds(bytes_RR, nodes())
    assert (within, across) == (pytest.approx(3.0), pytest.approx(3.0))  # rank 0 and 3: 0.3 GB
    assert exchange_seconds(bytes_RR, nodes()) == pytest.approx(3.0)
    assert exchange_seconds(bytes_RR, nodes(), two_level=True) == pytest.approx(6.0)
    shared = nodes(node_gbps=0.4)  # node 0 sends 0.4 GB at 0.05 GB/s
    assert link_seconds(bytes_RR, shared)[1] == pytest.approx(8.0)
    assert link_seconds(bytes_RR.T, shared)[1] == pytest.approx(8.0)
    np.fill_diagonal(bytes_RR, 1e12)  # nothing to do
    assert link_seconds(bytes_RR, shared)[0] == pytest.approx(3.0)


def test_links_between_nodes_may_differ() -> None:
    gbps_NN = ((0.0, 0.8, 0.08), (0.8, 0.0, 0.8), (0.08, 0.8, 0.0))
    topology = dataclasses.replace(nodes(3, 1), inter_gbps_NN=gbps_NN)
    bytes_RR = np.array([[0, 1e8, 1e8], [0, 0, 0], [0, 0, 0]])
    assert link_seconds(bytes_RR, topology)[1] == pytest.approx(1.0 + 10.0)


# ---------------------------------------------------------------- by hand


def test_a_step_by_hand() -> None:
    """Two nodes of one rank, two experts; 3 tokens of rank 0 and 1 of rank 1 choose expert 1."""
    ids_TLK = np.array([1, 1, 1, 0, 1, 0, 0, 0]).reshape(8, 1, 1)
    trace = Trace(ids_TLK, 2, source_T=np.repeat([0, 1], 4))
    topology = nodes(2, 1, latency_us=50.0)
    placement = ExpertPlacement.contiguous(1, 2, 2)
    step = simulate_trace(placement, trace, topology, home_plan, micro_batch=4, shape=SHAPE)
    # 3 copies each way of 200 bytes, four journeys; 3 labels of 4 bytes and twice 2
    assert step.exchange_s == pytest.approx((4 * 3 * 200 + 3 * 8) / 1e8)
    assert step.compute_s == pytest.approx(4 * 6 * 1000 / 1e9)
    assert step.latency_s == pytest.approx(7 * 50e-6)
    assert step.borrow_s == step.borrowed == step.bytes_intra == step.rows_intra == 0
    assert step.seconds == pytest.approx(step.exchange_s + step.compute_s + step.latency_s)
    assert (step.rows_local, step.rows_inter, step.bytes_inter) == (2, 6, 6 * (4 * 200 + 8))
    assert step.sends_RR.tolist() == [[1, 3], [3, 1]]
    assert (step.load_ratio, step.load_ratio_home, step.steps, step.tokens) == (1, 1, 1, 8)


def test_borrowed_experts_by_hand() -> None:
    """All rows are of expert 0; Quota gives half of them to rank 1, which borrows it."""
    trace = Trace(np.zeros((8, 1, 1), dtype=np.int64), 2, source_T=np.repeat([0, 1], 4))
    placement, topology = ExpertPlacement.contiguous(1, 2, 2), nodes(2, 1, latency_us=50.0)
    step = simulate_trace(placement, trace, topology, LEVEL, micro_batch=4, shape=SHAPE)
    assert (step.load_ratio_home, step.load_ratio, step.borrowed) == (2, 1, 1)
    assert step.borrow_s == pytest.approx(1000 * (2 + 4) / 1e8)
    assert step.exchange_s == 0 and step.bytes_inter == 6000
    assert step.latency_s == pytest.approx((7 + 2) * 50e-6)
    assert step.compute_s == pytest.approx(4 * 6 * 1000 / 1e9)
    assert step.load_LR.tolist() == [[4, 4]] and step.load_home_LR.tolist() == [[8, 0]]


def test_the_other_node_fetches_a_borrowed_expert_once() -> None:
    trace = Trace(np.zeros((8, 1, 1), dtype=np.int64), 4, source_T=np.arange(8) // 2)
    placement = ExpertPlacement.contiguous(1, 4, 4)
    step = simulate_trace(placement, trace, nodes(), LEVEL, micro_batch=2, shape=SHAPE)
    assert step.borrowed == 3
    assert (step.bytes_inter, step.bytes_intra) == (6000, 2 * 6000)
    # from home: one within the node and, slower, one across; then one is handed on
    assert step.borrow_s == pytest.approx(6000 / 1e8 + 6000 / 1e9)


# ---------------------------------------------------------------- against an oracle


def oracle(
    placement: ExpertPlacement,
    trace: Trace,
    topology: Topology,
    planner: Any,
    micro_batch: int,
    two_level: bool,
) -> dict[str, Any]:
    """Row by row: who sends which copies, who computes how much, what is borrowed; one step."""
    ranks, node_of_R = topology.num_ranks, topology.node_of_R
    per_node = ranks // topology.num_nodes
    source_T = sources_of(trace, ranks).tolist()
    own = {r: [t for t, s in enumerate(source_T) if s == r] for r in range(ranks)}
    longest = max(len(tokens) for tokens in own.values())
    sends, load, borrowed, ratios, exchange_s = Counter[Any](), Counter[Any](), 0, [], 0.0
    for start in range(0, longest, micro_batch):
        for layer in range(trace.num_layers):
            rows = [
                (int(e), r, t)
                for r in range(ranks)
                for t in own[r][start : start + micro_batch]
                for e in trace.ids_TLK[t, layer]
                if e < trace.num_experts
            ]
            counts_RE = torch.zeros(ranks, trace.num_experts, dtype=torch.int64)
            for e, r, _ in rows:
                counts_RE[r, e] += 1
            plan = planner(counts_RE, placement.home_LE[layer])
            plan.check(counts_RE, placement.home_LE[layer])
            waiting: dict[tuple[int, int], list[int]] = {}
            for e, r, computing, number in plan.rows.tolist():
                waiting.setdefault((e, r), []).extend([computing] * number)
            here: set[tuple[int, int, int]] = set()  # token, source, computing rank
            loads, labels = Counter[int](), Counter[Any]()
            for e, r, t in rows:
                computing = waiting[e, r].pop(0)
                here.add((t, r, computing))
                loads[computing] += 1
                labels[r, computing] += 8 * (r != computing)
            first, second, marks = (Counter[Any]() for _ in range(3))
            if two_level:
                relays = {
                    (t, r, node_of_R[c] * per_node + r % per_node)
                    for t, r, c in here
                    if node_of_R[c] != node_of_R[r]
                }
                first.update((r, relay) for _, r, relay in relays)
                marks.update((r, relay) for _, r, relay in relays)
                for _, r, c in here:
                    relay = node_of_R[c] * per_node + r % per_node
                    if node_of_R[r] == node_of_R[c]:
                        second[r, c] += 1
                    elif relay != c:
                        second[relay, c] += 1
            else:
                first.update((r, c) for _, r, c in here)
            sends += first + second
            exchange_s += 4 * busiest(first, 200, topology) + 4 * busiest(second, 200, topology)
            exchange_s += busiest(
                labels + Counter({k: 8 * n for k, n in marks.items()}), 1, topology
            )
            load.update({(layer, r): rows for r, rows in loads.items()})
            borrowed += len(plan.borrowed)
            ratios.append(max(loads.values()) * ranks / sum(loads.values()))
    return {
        "sends_RR": [[sends[a, b] for b in range(ranks)] for a in range(ranks)],
        "load_LR": [[load[n, r] for r in range(ranks)] for n in range(trace.num_layers)],
        "borrowed": borrowed,
        "load_ratio": np.mean(ratios),
        "exchange_s": exchange_s,
    }


def busiest(copies: Counter[Any], size: int, topology: Topology) -> float:
    """Seconds of the busiest rank in or out, within its node or across; of a node's link."""
    seconds: Any = Counter()
    for (a, b), number in copies.items():
        node_a, node_b = topology.node_of_R[a], topology.node_of_R[b]
        if a == b:
            continue
        if node_a == node_b:
            rate = topology.intra_gbps
        else:
            rate = topology.inter_gbps
            if topology.node_gbps:
                for key in (("node out", node_a), ("node in", node_b)):
                    seconds[key] += number * size * 8 / topology.node_gbps / 1e9
        for end in (("out", a, node_a == node_b), ("in", b, node_a == node_b)):
            seconds[end] += number * size * 8 / rate / 1e9
    return max(seconds.values(), default=0.0)


PLANNERS: dict[str, Any] = {
    "home": home_plan,
    "quota": Quota(node_of_R=(0, 0, 1, 1)),
    "least_loaded": LeastLoaded(min_rows=1, trigger=1.0),
}


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_every_row_is_followed(planner: str, two_level: bool, top_k: int) -> None:
    trace = synthetic(top_k=top_k, seed=top_k)
    ids_TLK = trace.ids_TLK.copy()
    ids_TLK[::5, :, 0] = trace.num_experts  # no expert
    source_T = np.random.default_rng(3).integers(0, 4, len(ids_TLK))  # uneven
    trace = dataclasses.replace(trace, ids_TLK=ids_TLK, source_T=source_T)
    placement, topology = shuffled(3, 8, 4, seed=2), nodes(node_gbps=1.0)
    step = simulate_trace(
        placement,
        trace,
        topology,
        PLANNERS[planner],
        micro_batch=50,
        micro_batches=10,
        two_level=two_level,
        shape=SHAPE,
    )
    expected = oracle(placement, trace, topology, PLANNERS[planner], 50, two_level)
    assert step.sends_RR.tolist() == expected["sends_RR"]
    assert step.load_LR.tolist() == expected["load_LR"]
    assert step.borrowed == expected["borrowed"]
    assert step.load_ratio == pytest.approx(expected["load_ratio"])
    assert step.exchange_s == pytest.approx(expected["exchange_s"])
    assert (planner == "home") == (step.borrowed == 0)


@pytest.mark.parametrize("two_level", [False, True])
def test_the_home_plan_sends_what_the_objective_counts(two_level: bool) -> None:
    trace, topology = synthetic(4, 12, 3), nodes()
    placement = shuffled(4, 12, 4, seed=1)
    step = simulate_trace(
        placement, trace, topology, home_plan, micro_batch=10_000, two_level=two_level
    )
    cost = trace_cost(placement, trace, topology, two_level=two_level)
    assert step.rows_local == cost.rows_local
    assert step.rows_intra == cost.rows_intra and step.rows_inter == cost.rows_inter
    assert step.load_ratio == step.load_ratio_home == pytest.approx(cost.load_ratio_L.mean())
    assert step.compute_s == pytest.approx(cost.compute_s)
    assert step.exchange_s > cost.traffic_s  # the busiest, not the mean


def test_ways_of_borrowed_experts_are_those_of_the_executor() -> None:
    generator = torch.Generator().manual_seed(0)
    node_of_R = [0, 0, 1, 1, 2, 2]
    for _ in range(50):
        pairs = torch.randint(0, 6, (9, 3), generator=generator).tolist()
        borrowed = sorted({(e, e, b) for e, _, b in pairs if e != b})
        for mine, theirs in zip(
            expert_hops(borrowed, node_of_R), hops(borrowed, node_of_R), strict=True
        ):
            counted = Counter((hop.source, hop.destination) for hop in theirs)
            assert Counter({(a, b): int(n) for (a, b), n in np.ndenumerate(mine) if n}) == counted


# ---------------------------------------------------------------- steps and planners that remember


def test_a_step_is_the_mean_of_the_steps() -> None:
    trace, placement = synthetic(), shuffled(3, 8, 4, seed=2)
    run: Any = {"micro_batch": 30, "shape": SHAPE}
    ones = simulate_trace(placement, trace, nodes(), Quota(), **run)
    twos = simulate_trace(placement, trace, nodes(), Quota(), micro_batches=2, **run)
    assert (ones.steps, twos.steps, ones.tokens, twos.tokens) == (4, 2, 120, 240)
    assert twos.seconds == pytest.approx(2 * ones.seconds)
    assert twos.load_ratio == ones.load_ratio


def test_what_is_kept_travels_once_per_step() -> None:
    """Sticky holds the expert for both micro-batches of a step; Quota fetches it for each."""
    trace = Trace(np.zeros((16, 1, 1), dtype=np.int64), 2, source_T=np.arange(16) // 8)
    placement = ExpertPlacement.contiguous(1, 2, 2)
    run: Any = {"micro_batch": 2, "micro_batches": 2}
    fetched = {
        name: simulate_trace(placement, trace, nodes(2, 1), planner, **run).borrowed
        for name, planner in (("quota", Quota()), ("sticky", Sticky(Quota())))
    }
    assert fetched == {"quota": 2, "sticky": 1}


def test_planners_that_remember_learn_from_every_step() -> None:
    trace, placement = synthetic(1, 8, 2), ExpertPlacement.contiguous(1, 8, 4)
    planner = Replicated(slots=1, window=1, decay=0.0)
    once = simulate_trace(placement, trace, nodes(), planner, micro_batch=120)
    later = simulate_trace(placement, trace, nodes(), planner, micro_batch=30)
    assert once.load_ratio == once.load_ratio_home  # it has seen nothing yet
    assert later.load_ratio < later.load_ratio_home
    again = simulate_trace(placement, trace, nodes(), planner, micro_batch=30)
    assert again.load_ratio == later.load_ratio  # and it forgets between simulations


# ---------------------------------------------------------------- from statistics


@pytest.mark.parametrize("two_level", [False, True])
def test_statistics_of_single_choices_give_the_trace(two_level: bool) -> None:
    trace = synthetic(top_k=1)
    trace = dataclasses.replace(trace, source_T=sources_of(trace, 4))
    stats, placement = RoutingStats.of_trace(trace, num_ranks=4), shuffled(3, 8, 4, seed=2)
    run: Any = {"micro_batch": 120, "two_level": two_level, "shape": SHAPE}
    for planner in (home_plan, Quota()):
        exact = simulate_trace(placement, trace, nodes(), planner, **run)
        expected = simulate_stats(placement, stats, nodes(), planner, **run)
        np.testing.assert_allclose(expected.sends_RR, exact.sends_RR, rtol=1e-12)
        assert expected.seconds == pytest.approx(exact.seconds)
        assert expected.borrowed == exact.borrowed
        assert expected.load_ratio == pytest.approx(exact.load_ratio)


def test_statistics_of_several_choices_come_close() -> None:
    trace = synthetic(2, 16, 4)
    stats, placement = RoutingStats.of_trace(trace), shuffled(2, 16, 4, seed=2)
    for planner in (home_plan, Quota()):
        exact = simulate_trace(placement, trace, nodes(), planner, micro_batch=120)
        expected = simulate_stats(placement, stats, nodes(), planner, micro_batch=120)
        assert expected.seconds == pytest.approx(exact.seconds, rel=0.1)
        assert expected.rows_inter == pytest.approx(exact.rows_inter, rel=0.1)
        assert expected.load_LR.sum() == pytest.approx(exact.load_LR.sum())


def test_a_planner_that_remembers_has_seen_the_statistics() -> None:
    stats, placement = RoutingStats.of_trace(synthetic()), ExpertPlacement.contiguous(3, 8, 4)
    planner = Replicated(slots=2, window=1)
    run = simulate_stats(placement, stats, nodes(), planner, micro_batch=120, micro_batches=3)
    assert run.load_ratio < run.load_ratio_home
    assert run.borrowed <= 3 * 2 * 4  # kept for the step


# ---------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused() -> None:
    trace, topology = synthetic(), nodes()
    placement = ExpertPlacement.contiguous(3, 8, 4)
    with pytest.raises(ValueError, match="the trace is of 3 MoE layers x 8 experts"):
        simulate_trace(
            ExpertPlacement.contiguous(2, 8, 4), trace, topology, home_plan, micro_batch=4
        )
    with pytest.raises(ValueError, match="the placement is for 2 ranks, the topology has 4"):
        simulate_trace(
            ExpertPlacement.contiguous(3, 8, 2), trace, topology, home_plan, micro_batch=4
        )
    with pytest.raises(ValueError, match=r"micro_batch \(0\) must be >= 1"):
        simulate_trace(placement, trace, topology, home_plan, micro_batch=0)
    with pytest.raises(ValueError, match="the trace has no tokens"):
        empty = trace.take(np.arange(0))
        simulate_trace(placement, empty, topology, home_plan, micro_batch=4)
    with pytest.raises(ValueError, match="the statistics are of no tokens"):
        simulate_stats(placement, RoutingStats(3, 8), topology, home_plan, micro_batch=4)
    with pytest.raises(ValueError, match=r"topology.node_gbps \(0\) must be > 0"):
        nodes(node_gbps=0)
