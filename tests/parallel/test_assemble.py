"""Assembly of plans against a slow oracle: coverage, nearest first, canonical order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.plan import DispatchPlan
from parallel.planners.assemble import assemble, overlaps
from tests.parallel.loads import random_home

Quota = dict[tuple[int, int], int]  # rows by (expert, rank), homes included


def slow_oracle(
    counts_RE: Tensor, quota: Quota, node_of_R: list[int]
) -> tuple[int, int, dict[tuple[int, int], int]]:
    """Rows at their source, rows on their source's node, and rows by (expert, rank)."""
    num_ranks, num_experts = counts_RE.shape
    local = on_node = 0
    for expert in range(num_experts):
        for node in set(node_of_R):
            ranks = [rank for rank in range(num_ranks) if node_of_R[rank] == node]
            there = sum(int(counts_RE[rank, expert]) for rank in ranks)
            on_node += min(there, sum(quota.get((expert, rank), 0) for rank in ranks))
        for rank in range(num_ranks):
            local += min(int(counts_RE[rank, expert]), quota.get((expert, rank), 0))
    return local, on_node, {pair: rows for pair, rows in quota.items() if rows}


def measured(
    plan: DispatchPlan, node_of_R: list[int]
) -> tuple[int, int, dict[tuple[int, int], int]]:
    local = on_node = 0
    computed: Quota = {}
    for expert, source, computing, rows in plan.rows.tolist():
        local += rows * (source == computing)
        on_node += rows * (node_of_R[source] == node_of_R[computing])
        computed[expert, computing] = computed.get((expert, computing), 0) + rows
    return local, on_node, computed


def random_away(
    counts_RE: Tensor, home_E: Tensor, generator: np.random.Generator
) -> tuple[np.ndarray, Quota]:
    """Some rows of some experts on other ranks, in random order, and all (expert, rank) rows."""
    num_ranks, num_experts = counts_RE.shape
    away, quota = [], {}
    for expert in range(num_experts):
        left, home = int(counts_RE[:, expert].sum()), int(home_E[expert])
        if generator.random() < 0.6:
            for rank in generator.permutation(num_ranks)[: generator.integers(num_ranks + 1)]:
                rows = int(generator.integers(left + 1))
                if rank != home and rows:
                    away.append((expert, int(rank), rows))
                    quota[expert, int(rank)] = rows
                    left -= rows
        quota[expert, home] = left
    generator.shuffle(away)
    return np.array(away, dtype=np.int64).reshape(-1, 3), quota


@settings(deadline=None, max_examples=300)
@given(
    num_ranks=st.integers(1, 7),
    experts_per_rank=st.integers(1, 4),
    largest=st.sampled_from([0, 1, 3, 100]),
    num_nodes=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
def test_every_row_once_and_nearest_first(
    num_ranks: int, experts_per_rank: int, largest: int, num_nodes: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    num_experts = num_ranks * experts_per_rank
    counts_RE = torch.from_numpy(generator.integers(0, largest + 1, (num_ranks, num_experts)))
    home_E = random_home(num_experts, num_ranks, seed)
    node_of_R = generator.integers(0, num_nodes, num_ranks).tolist()
    away_N3, quota = random_away(counts_RE, home_E, generator)
    plan = assemble(counts_RE, home_E, away_N3, node_of_R=node_of_R if num_nodes > 1 else None)
    plan.check(counts_RE, home_E)
    if num_nodes == 1:
        node_of_R = [0] * num_ranks
    assert measured(plan, node_of_R) == slow_oracle(counts_RE, quota, node_of_R)
    borrowed = {(expert, int(home_E[expert]), rank) for expert, rank, _ in away_N3.tolist()}
    assert {tuple(row) for row in plan.borrowed.tolist()} == borrowed
    assert not plan.keep


def test_a_source_far_from_home_keeps_what_it_may() -> None:
    """Four sources of one expert, ranks 0 and 1 on a node; ranks 1 and 3 help."""
    counts_RE = torch.tensor([[0, 0, 0, 0], [4, 0, 0, 0], [6, 0, 0, 0], [2, 0, 0, 0]])
    home_E = torch.arange(4)
    away_N3 = np.array([[0, 3, 5], [0, 1, 3]])
    plan = assemble(counts_RE, home_E, away_N3, node_of_R=(0, 0, 1, 1))
    # rank 1 keeps 3 of its 4 rows and sends one next door; rank 3 keeps 2 and takes 3 of rank 2
    expected = [[0, 1, 0, 1], [0, 1, 1, 3], [0, 2, 0, 3], [0, 2, 3, 3], [0, 3, 3, 2]]
    assert plan.rows.tolist() == expected
    assert plan.borrowed.tolist() == [[0, 0, 1], [0, 0, 3]]
    assert plan.load_R().tolist() == [4, 3, 0, 5]


def test_all_that_is_borrowed_may_be_more_than_what_is_used() -> None:
    counts_RE = torch.tensor([[2, 3], [2, 0]])
    borrowed = np.array([[1, 1, 0], [0, 0, 1]])
    plan = assemble(counts_RE, torch.arange(2), np.array([[0, 1, 1]]), borrowed=borrowed, keep=True)
    plan.check(counts_RE, torch.arange(2))
    assert plan.borrowed.tolist() == [[0, 0, 1], [1, 1, 0]]
    assert plan.rows.tolist() == [[0, 0, 0, 2], [0, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 3]]
    assert plan.keep
    nothing_used = assemble(
        counts_RE, torch.arange(2), np.empty((0, 3), np.int64), borrowed=borrowed
    )
    assert nothing_used.borrowed.tolist() == [[0, 0, 1], [1, 1, 0]]


def test_overlaps() -> None:
    supply, demand, items = overlaps(np.array([0, 3, 0, 4, 1]), np.array([1, 0, 5, 2]))
    assert supply.tolist() == [1, 1, 3, 3, 4]
    assert demand.tolist() == [0, 2, 2, 3, 3]
    assert items.tolist() == [1, 2, 3, 1, 1]


@pytest.mark.parametrize(
    ("away", "message"),
    [
        ([[0, 1, 5]], "more rows away"),
        ([[0, 1, 1], [0, 1, 1]], "there twice"),
        ([[0, 0, 1]], "at home"),
        ([[0, 1, 0]], "without rows"),
    ],
)
def test_our_own_mistakes_are_assertions(away: list, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assemble(torch.tensor([[2, 0], [2, 0]]), torch.arange(2), np.array(away))


@pytest.mark.parametrize(
    ("counts_RE", "home_E", "message"),
    [
        ([[1, 2], [3, -4]], [0, 1], r"rank 1 and expert 1 \(-4\) must be >= 0"),
        ([[1, 2], [3, 4]], [0, 2], r"expert 1 \(2\) must be one of the ranks 0 to 1"),
        ([[1, 2], [3, 4]], [-1, 0], r"expert 0 \(-1\) must be one of the ranks"),
        ([[1, 2], [3, 4]], [1, 1], r"rank 0 0 experts; every rank must have as many, 2 / 2"),
        ([[1, 2], [3, 4]], [0, 1, 1], r"home_E .* must be int64 \[2\]"),
        ([[1.0, 2.0]], [0, 0], r"counts_RE .* must be int64 \[ranks, experts\]"),
        ([1, 2], [0, 0], r"counts_RE .* must be int64 \[ranks, experts\]"),
    ],
)
def test_inputs_that_do_not_fit(counts_RE: list, home_E: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(torch.tensor(counts_RE), torch.tensor(home_E), np.empty((0, 3), np.int64))


def test_nodes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="nodes of 3 ranks, counts_RE has 2"):
        assemble(
            torch.ones(2, 2, dtype=torch.int64),
            torch.arange(2),
            np.empty((0, 3), np.int64),
            node_of_R=(0, 0, 1),
        )
