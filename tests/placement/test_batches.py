"""Sequences to ranks against brute force, and what that saves against loops over tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from placement.batches import (
    assign,
    assign_by_cost,
    assigned,
    expected_saving,
    predicted_rows,
)
from placement.formulate import TOKEN_SHARES, problem_of
from placement.objective import Objective, cost, trace_cost
from placement.search import search
from placement.solve import solve
from placement.stats import RoutingStats
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace
from placement.traffic import batched_sources

TRAFFIC = Objective(mode="batched", two_level=True, load_weight=0.0)


def topology(nodes: int, per_node: int) -> Topology:
    return Topology.even(nodes, per_node, intra_gbps=400.0, inter_gbps=100.0, flops=1e14)


def every_assignment(sequences: int, ranks: int) -> list[tuple[int, ...]]:
    """All ways to give each rank equally many sequences."""
    slots = [rank for rank in range(ranks) for _ in range(sequences // ranks)]
    return sorted(set(permutations(slots)))


# --- the assignment ---


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(2, 1), (4, 2), (6, 2), (3, 3), (6, 3), (4, 4)]),
    st.integers(1, 9),
    st.integers(0, 10**6),
)
def test_no_assignment_costs_less_nor_disturbs_less(
    shape: tuple[int, int], largest: int, seed: int
) -> None:
    """Small whole costs, so that there are many ties: of the cheapest, one that moves fewest."""
    sequences, ranks = shape
    cost_SR = np.random.default_rng(seed).integers(0, largest + 1, shape)
    undisturbed_S = np.arange(sequences) // (sequences // ranks)

    def key(rank_S: tuple[int, ...]) -> tuple[int, int]:
        total = int(cost_SR[np.arange(sequences), list(rank_S)].sum())
        return total, int((np.array(rank_S) != undisturbed_S).sum())

    found = assign_by_cost(cost_SR)
    assert key(tuple(found.tolist())) == min(map(key, every_assignment(*shape)))


@pytest.mark.parametrize("kind", ["noise", "clusters", "one rank is best for all"])
def test_larger_assignments_are_exact(kind: str) -> None:
    sequences, ranks = 120, 8
    rng = np.random.default_rng(5)
    cost_SR = rng.integers(0, 10**6, (sequences, ranks))
    if kind == "clusters":
        cost_SR = rng.integers(0, 10**6, (5, ranks))[rng.integers(0, 5, sequences)]
        cost_SR += rng.integers(0, 10**4, (sequences, ranks))
    if kind.startswith("one"):
        cost_SR[:, 3] //= 10**3
    slots = np.arange(ranks).repeat(sequences // ranks)
    best = cost_SR[:, slots][linear_sum_assignment(cost_SR[:, slots])].sum()
    rank_S = assign_by_cost(cost_SR)
    assert np.bincount(rank_S, minlength=ranks).tolist() == [sequences // ranks] * ranks
    assert cost_SR[np.arange(sequences), rank_S].sum() == best
    assert (assign_by_cost(cost_SR) == rank_S).all()
    assert (assign_by_cost(cost_SR + 7.0) == rank_S).all()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(4, (0, 1)), (4, (0, 0, 1, 1)), (6, (0, 1, 0))]),
    st.integers(1, 5),
    st.integers(0, 10**6),
)
def test_rows_pay_for_the_links_they_cross(
    case: tuple[int, tuple[int, ...]], inter: int, seed: int
) -> None:
    """0 on their own rank, 1 within the node, more to another node: row by row."""
    sequences, node_of_R = case
    ranks = len(node_of_R)
    rows_SR = np.random.default_rng(seed).integers(0, 20, (sequences, ranks))

    def price(rank_S: tuple[int, ...]) -> int:
        total = 0
        for sequence, own in enumerate(rank_S):
            for rank in range(ranks):
                price = 0 if rank == own else 1 if node_of_R[rank] == node_of_R[own] else inter
                total += price * int(rows_SR[sequence, rank])
        return total

    found = assign(rows_SR, node_of_R, intra=1.0, inter=float(inter))
    assert price(tuple(found.tolist())) == min(map(price, every_assignment(sequences, ranks)))


def test_a_node_counts_more_than_a_rank() -> None:
    """Two ranks on a node share most of a sequence's rows; the single best rank is elsewhere."""
    rows_SR = np.array([[0, 4, 4, 5], [9, 0, 0, 0], [0, 0, 0, 9], [0, 0, 0, 9]])
    assert assign(rows_SR[:, :4], (0, 1, 1, 2), inter=1.0).tolist()[0] != 0
    near = assign(rows_SR, (0, 1, 1, 2), inter=4.0)
    assert near[0] in (1, 2)


@pytest.mark.parametrize(("sequences", "ranks"), [(8, 4), (6, 6), (5, 1), (0, 3)])
def test_where_all_is_equal_nothing_moves(sequences: int, ranks: int) -> None:
    rank_S = assign(np.full((sequences, ranks), 3.5), range(ranks))
    assert rank_S.tolist() == [s // (sequences // ranks) for s in range(sequences)]


def test_batches_that_do_not_split_and_strange_costs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequences \(5\) must be a multiple of the ranks \(2\)"):
        assign(np.ones((5, 2)), (0, 0))
    with pytest.raises(ValueError, match=r"intra \(2.0\) must be >= 0 and <= inter \(1.0\)"):
        assign(np.ones((4, 2)), (0, 0), intra=2.0, inter=1.0)
    with pytest.raises(ValueError, match="must be finite"):
        assign_by_cost(np.array([[1.0, np.nan]] * 2))


# --- the prediction ---


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_predicted_rows_are_sums_over_tokens(dtype: type) -> None:
    rng = np.random.default_rng(0)
    token_ST = rng.integers(0, 12, (5, 40))
    rows_VR: npt.NDArray[Any] = rng.integers(0, 99, (9, 3)).astype(dtype)
    before = token_ST.copy()
    mean_R = [sum(int(x) for x in rows_VR[:, rank]) / 9 for rank in range(3)]
    if dtype is np.int64:
        mean_R = [int(mean) for mean in mean_R]
    for sequence, row_R in enumerate(predicted_rows(token_ST, rows_VR)):
        for rank in range(3):
            expected = sum(
                float(rows_VR[token, rank]) if token < 9 else mean_R[rank]
                for token in token_ST[sequence].tolist()
            )
            assert row_R[rank] == pytest.approx(expected, rel=1e-12)
    assert predicted_rows(token_ST, rows_VR).dtype == dtype
    assert (token_ST == before).all()


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(ValueError, match="no token ids"):
        predicted_rows(np.zeros((2, 3), dtype=np.int64), np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"token id \(-1\) must be >= 0"):
        predicted_rows(np.array([[0, -1]]), np.ones((4, 2)))


# --- traces ---


def shuffled(trace: Trace, seed: int) -> Trace:
    """The same tokens in another order."""
    return trace.take(np.random.default_rng(seed).permutation(trace.num_tokens))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return shuffled(SyntheticRouter(3, 8, "domain").sample(24, 10, 2), 0)


@pytest.fixture(scope="module")
def placement(trace: Trace) -> ExpertPlacement:
    return placed(trace, topology(2, 2))


def placed(trace: Trace, links: Topology) -> ExpertPlacement:
    start = ExpertPlacement.contiguous(trace.num_layers, trace.num_experts, links.num_ranks)
    problem, _ = problem_of(RoutingStats.of_trace(trace), links, start, TRAFFIC)
    return ExpertPlacement(torch.from_numpy(search(problem, restarts=3)), links.num_ranks)


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_sequences_go_where_their_rows_are(
    trace: Trace, placement: ExpertPlacement, predicted: bool, batch_size: int | None
) -> None:
    """Rows counted token by token, every batch assigned on its own."""
    links = topology(2, 2)
    stats = RoutingStats.of_trace(trace)
    assert trace.sequence_T is not None and trace.token_T is not None
    rows_VR = stats.by_token.rows_per_rank(placement.home_LE.numpy(), 4)
    rows_SR = np.zeros((24, 4))
    for token, sequence in enumerate(trace.sequence_T.tolist()):
        if predicted:
            rows_SR[sequence] += rows_VR[trace.token_T[token]]
            continue
        for layer in range(3):
            for expert in trace.ids_TLK[token, layer].tolist():
                if expert < 8:
                    rows_SR[sequence, placement.home_LE[layer, expert]] += 1
    found = assigned(
        trace,
        placement,
        links,
        preferences=stats.by_token if predicted else None,
        batch_size=batch_size,
    )
    assert found.source_T is not None and found.ids_TLK is trace.ids_TLK
    size = batch_size or 24
    rank_S = np.array([found.source_T[trace.sequence_T == s][0] for s in range(24)])
    assert (rank_S[trace.sequence_T] == found.source_T).all()
    for start in range(0, 24, size):
        batch = slice(start, start + size)
        assert Counter(rank_S[batch].tolist()) == dict.fromkeys(range(4), size // 4)
        expected = assign(rows_SR[batch], links.node_of_R)
        distance_RR = np.where(np.arange(4)[:, None] // 2 == np.arange(4) // 2, 1.0, 4.0)
        np.fill_diagonal(distance_RR, 0)
        cost_SR = rows_SR[batch] @ distance_RR
        place = np.arange(size)
        assert cost_SR[place, rank_S[batch]].sum() == pytest.approx(
            cost_SR[place, expected].sum(), rel=1e-9
        )


def copies_of(placement: ExpertPlacement, trace: Trace, per_node: int) -> tuple[int, int]:
    """Copies that leave their rank, within and across nodes, one per token and rank."""
    assert trace.source_T is not None
    within = across = 0
    for token, source in enumerate(trace.source_T.tolist()):
        for layer, chosen in enumerate(trace.ids_TLK[token].tolist()):
            goals = {int(placement.home_LE[layer, e]) for e in chosen if e < trace.num_experts}
            for goal in goals - {source}:
                near = goal // per_node == source // per_node
                within, across = within + near, across + (not near)
    return within, across


def test_savings_are_counted_token_by_token(trace: Trace, placement: ExpertPlacement) -> None:
    links = topology(2, 2)
    assert trace.sequence_T is not None
    dealt = replace(trace, source_T=trace.sequence_T // 6)
    saving = expected_saving(dealt, placement, links, two_level=False)
    after = assigned(trace, placement, links)
    for found, source in ((saving.before, dealt), (saving.after, after)):
        assert (found.rows_intra, found.rows_inter) == copies_of(placement, source, 2)
    assert saving.across == pytest.approx(1 - saving.after.rows_inter / saving.before.rows_inter)
    assert saving.helps and saving.across > 0.1
    assert "leave it off" not in saving.verdict()
    assert f"{100 * saving.across:.1f} % of the copies across nodes" in saving.verdict()


def test_where_every_token_visits_both_nodes_it_says_so() -> None:
    """All experts of every token: wherever a sequence is, as many copies leave it."""
    ids = np.tile(np.arange(8), (40, 2, 1))
    trace = Trace(ids, 8, sequence_T=np.arange(40) // 5)
    saving = expected_saving(trace, ExpertPlacement.contiguous(2, 8, 4), topology(2, 2))
    assert (saving.within, saving.across, saving.helps) == (0, 0, False)
    assert saving.verdict() == (
        "assignment saves 0.0 % of the copies across nodes and 0.0 % of the copies within nodes: "
        "leave it off"
    )
    alone = expected_saving(trace, ExpertPlacement.contiguous(2, 8, 1), topology(1, 1))
    assert alone.verdict() == "assignment saves nothing: no copy leaves its rank: leave it off"


def test_traces_that_cannot_be_assigned_are_refused(
    trace: Trace, placement: ExpertPlacement
) -> None:
    links, stats = topology(2, 2), RoutingStats.of_trace(trace)
    with pytest.raises(ValueError, match="does not know its sequences"):
        assigned(replace(trace, sequence_T=None), placement, links)
    with pytest.raises(ValueError, match="does not know its token ids"):
        assigned(replace(trace, token_T=None), placement, links, preferences=stats.by_token)
    with pytest.raises(ValueError, match="sequences have 9 to 10 tokens"):
        assigned(trace.take(np.arange(1, trace.num_tokens)), placement, links)
    with pytest.raises(ValueError, match=r"batch_size \(7\) must be >= 1 and divide .* \(24\)"):
        assigned(trace, placement, links, batch_size=7)
    with pytest.raises(ValueError, match=r"sequences \(6\) must be a multiple of the ranks \(4\)"):
        assigned(trace, placement, links, batch_size=6)


# --- placements for assigned sequences ---


def test_batched_pairs_are_what_comes_together_beyond_chance() -> None:
    """Transitions and domains less what independence would give, up to one number per layer."""
    trace = SyntheticRouter(3, 6, "domain", num_domains=3).sample(12, 20, 2)
    stats, links = RoutingStats.of_trace(trace), topology(1, 3)
    problem, _ = problem_of(stats, links, ExpertPlacement.contiguous(3, 6, 3), TRAFFIC)
    assert trace.domain_T is not None
    for layer in range(2):
        chosen = [
            (trace.ids_TLK[:, each, :, None] == np.arange(6)).any(1) for each in (layer, layer + 1)
        ]
        before_TE, after_TE = (part.astype(float) for part in chosen)
        tokens = len(before_TE)
        expected = before_TE.T @ after_TE
        expected -= np.outer(before_TE.sum(0), after_TE.sum(0)) / tokens
        expected *= TOKEN_SHARES[0]
        for domain in range(3):
            here = trace.domain_T == domain
            if here.any():
                a, b = (x[here].mean(0) - x.mean(0) for x in (before_TE, after_TE))
                expected += here.sum() * np.outer(a, b)
        found = problem.pair_LEE[layer]
        np.testing.assert_allclose(found - found.min(), expected - expected.min(), atol=1e-9)
        assert found.min() == 0


def test_few_nodes_and_many_choices_make_ranks_matter() -> None:
    """With few choices a crossing saved is a crossing saved; with many on two nodes it is not.

    Eight of eight experts: two on every rank and four on every node, so a row makes half a copy to
    a rank and a quarter to a node.
    """
    for top_k, to_ranks, to_nodes in ((1, 1.0, 1.0), (8, 1 / 2, 1 / 4)):
        stats = RoutingStats.of_trace(SyntheticRouter(2, 8, "none").sample(8, 50, top_k))
        start = ExpertPlacement.contiguous(2, 8, 4)
        problem, _ = problem_of(stats, topology(2, 2), start, TRAFFIC)
        ratio = problem.distance_RR[0, 2] / problem.distance_RR[0, 1]
        assert ratio == pytest.approx((4 * to_nodes + 0.5 * to_ranks) / to_ranks)


def placed_by_turns(
    trace: Trace, stats: RoutingStats, links: Topology, placement: ExpertPlacement
) -> ExpertPlacement:
    """Sequences go where a placement has their rows, then experts where their rows come from, and
    so on: domain by domain with the sources that `sends` counts."""
    for _ in range(3):
        sources_LRE = batched_sources(stats, placement.home_LE.numpy(), links.num_ranks)
        located = stats.with_sources(links.num_ranks)
        located.source_LRE.copy_(torch.from_numpy(sources_LRE))
        problem, _ = problem_of(located, links, placement, replace(TRAFFIC, mode="home"))
        home_LE = search(problem, restarts=3)
        placement = ExpertPlacement(torch.from_numpy(home_LE), links.num_ranks)
    return placement


@pytest.mark.parametrize("top_k", [1, 2])
def test_where_domains_rule_solving_moves_experts_and_sequences_in_turn(top_k: int) -> None:
    links = topology(2, 4)
    trace = SyntheticRouter(6, 16, "domain").sample(64, 40, top_k)
    stats = RoutingStats.of_trace(trace)
    start, first = ExpertPlacement.contiguous(6, 16, 8), placed(trace, links)
    settled = placed_by_turns(trace, stats, links, first)
    found = solve(stats, links, start, method="search", objective=TRAFFIC, time_limit_s=20)

    def exact(which: ExpertPlacement) -> float:
        by_id = assigned(trace, which, links, preferences=stats.by_token)
        return trace_cost(which, by_id, links, mode="batched", two_level=True).traffic_s

    def expected(which: ExpertPlacement) -> float:
        return cost(which, stats, links, mode="batched", two_level=True).traffic_s

    assert found.saved == pytest.approx(expected(start) - expected(found.placement), rel=1e-9)
    assert expected(found.placement) <= 1.001 * expected(settled)
    assert expected(found.placement) < expected(first)
    assert exact(found.placement) <= 1.01 * exact(settled)
    if top_k == 1:  # what is saved is what comes true
        assert found.saved == pytest.approx(exact(start) - exact(found.placement), rel=0.1)


def test_without_domains_the_problem_itself_is_judged() -> None:
    """It chooses; what is said to be saved is what random sequences would save: here nothing."""
    links = topology(1, 4)
    trace = replace(SyntheticRouter(3, 8, "high").sample(24, 10, 1), domain_T=None)
    stats, start = RoutingStats.of_trace(trace), ExpertPlacement.contiguous(3, 8, 4)
    found = solve(stats, links, start, objective=TRAFFIC, time_limit_s=5)
    assert found.moves and found.value < found.start_value
    assert found.saved == pytest.approx(0, abs=1e-9 * found.judged)
    assert found.cost.traffic_s == cost(found.placement, stats, links, two_level=True).traffic_s
