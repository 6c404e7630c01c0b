"""Sparse materialisation moves no more bytes than the home plan, over either class of links."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.plan import DispatchPlan
from parallel.planners.home import home_plan
from parallel.planners.materialize import Materialize
from placement.topology import Topology

HIDDEN, PARAMETERS = 8, 80  # a row moves 4 * 8 * 2 = 64 bytes, an expert 80 * 6 = 480: 7.5 rows
ROW_BYTES, EXPERT_BYTES = 64, 480
HOME_4 = torch.tensor([0, 1, 2, 3])
NODES_4 = (0, 0, 1, 1)


def bytes_moved(plan: DispatchPlan, node_of_R: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of rows and experts inside nodes and between them; an expert enters a node once."""
    inside = between = 0
    for _, source, computing, rows in plan.rows.tolist():
        if node_of_R[source] != node_of_R[computing]:
            between += rows * ROW_BYTES
        elif source != computing:
            inside += rows * ROW_BYTES
    entered = set()
    for expert, home, borrower in plan.borrowed.tolist():
        node = node_of_R[borrower]
        if node != node_of_R[home] and (expert, node) not in entered:
            entered.add((expert, node))
            between += EXPERT_BYTES
        else:
            inside += EXPERT_BYTES
    return inside, between


def computed(plan: DispatchPlan, expert: int) -> list[tuple[int, int, int]]:
    """(source, computing rank, rows) of one expert."""
    return [tuple(segment[1:]) for segment in plan.rows.tolist() if segment[0] == expert]


def counts_4(rows_of_expert_0: list[int]) -> Tensor:
    counts_RE = torch.zeros(4, 4, dtype=torch.int64)
    counts_RE[:, 0] = torch.tensor(rows_of_expert_0)
    return counts_RE


@settings(deadline=None, max_examples=200)
@given(
    ranks_per_node=st.integers(1, 4),
    num_nodes=st.integers(1, 3),
    experts_per_rank=st.integers(1, 3),
    largest=st.sampled_from([0, 5, 12, 100]),
    max_borrowed=st.sampled_from([None, 0, 1, 2]),
    seed=st.integers(0, 10_000),
)
def test_never_more_bytes(
    ranks_per_node: int,
    num_nodes: int,
    experts_per_rank: int,
    largest: int,
    max_borrowed: int | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_ranks = ranks_per_node * num_nodes
    num_experts = num_ranks * experts_per_rank
    node_of_R = tuple(rank % num_nodes for rank in range(num_ranks))
    counts_RE = torch.randint(0, largest + 1, (num_ranks, num_experts), generator=generator)
    home_E = torch.randperm(num_experts, generator=generator) % num_ranks
    planner = Materialize(max_borrowed=max_borrowed).for_widths(HIDDEN, PARAMETERS)
    planner = planner.for_topology(Topology(node_of_R, 400.0, 50.0, 1e12))

    plan, home = planner(counts_RE, home_E), home_plan(counts_RE, home_E)

    plan.check(counts_RE, home_E)
    assert not plan.keep
    inside, between = bytes_moved(plan, node_of_R)
    home_inside, home_between = bytes_moved(home, node_of_R)
    assert between <= home_between
    if num_nodes == 1:
        assert inside <= home_inside
    rows_between, home_rows_between = (
        sum(rows for _, s, c, rows in p.rows.tolist() if node_of_R[s] != node_of_R[c])
        for p in (plan, home)
    )
    # Rows that no longer cross nodes move inside one at most, or pay for an expert moved there.
    assert inside <= home_inside + (home_rows_between - rows_between) * ROW_BYTES
    if max_borrowed is not None:
        assert plan.borrowed[:, 2].bincount(minlength=num_ranks).max() <= max_borrowed


@pytest.mark.parametrize(("rows", "is_borrowed"), [(6, False), (7, True), (8, True)])
def test_bound_inside_a_node(rows: int, is_borrowed: bool) -> None:
    planner = Materialize(rows_intra=7, rows_inter=1000)
    plan = planner(counts_4([100, rows, 0, 0]), HOME_4)
    assert plan.borrowed.tolist() == ([[0, 0, 1]] if is_borrowed else [])
    assert computed(plan, 0) == [(0, 0, 100), (1, 1 if is_borrowed else 0, rows)]


@pytest.mark.parametrize(("rows", "is_borrowed"), [(4, False), (5, True)])
def test_bound_between_nodes_counts_the_rows_of_the_node(rows: int, is_borrowed: bool) -> None:
    planner = Materialize(rows_intra=1000, rows_inter=10, node_of_R=NODES_4)
    plan = planner(counts_4([2, 3, rows, 5]), HOME_4)
    plan.check(counts_4([2, 3, rows, 5]), HOME_4)
    if is_borrowed:  # by the first of the ranks with most rows, for both
        assert plan.borrowed.tolist() == [[0, 0, 2]]
        assert computed(plan, 0) == [(0, 0, 2), (1, 0, 3), (2, 2, 5), (3, 2, 5)]
    else:
        assert not len(plan.borrowed)


def test_further_ranks_of_a_node_borrow_for_themselves() -> None:
    planner = Materialize(rows_intra=10, rows_inter=30, node_of_R=(0, 1, 1, 1))
    plan = planner(counts_4([0, 9, 10, 15]), HOME_4)
    assert plan.borrowed.tolist() == [[0, 0, 2], [0, 0, 3]]
    assert computed(plan, 0) == [(1, 3, 9), (2, 2, 10), (3, 3, 15)]


@pytest.mark.parametrize(
    ("parameters", "rows"),
    [(79, 8), (80, 8), (85, 8), (86, 9), (10, 1), (11, 2)],  # 64 / 6 = 10 2/3 parameters per row
)
def test_bounds_from_widths(parameters: int, rows: int) -> None:
    planner = Materialize().for_widths(HIDDEN, parameters)
    assert planner.rows_intra == planner.rows_inter == rows
    assert rows * 64 > parameters * 6 >= (rows - 1) * 64


def test_no_move_at_equal_bytes() -> None:
    """4 * 8 * 3 = 96 bytes a row; 16 * 6 = 96 bytes an expert."""
    assert Materialize().for_widths(8, 16, bytes_per_value=3).rows_intra == 2
    assert Materialize().for_widths(2048, 3 * 2048 * 768).rows_intra == 2.25 * 768 + 1


def test_budget_goes_to_what_saves_most() -> None:
    counts_RE = torch.zeros(4, 4, dtype=torch.int64)
    counts_RE[3] = torch.tensor([20, 30, 25, 0])
    free = Materialize(10, 10)(counts_RE, HOME_4)
    assert free.borrowed.tolist() == [[0, 0, 3], [1, 1, 3], [2, 2, 3]]
    bound = Materialize(10, 10, max_borrowed=2)(counts_RE, HOME_4)
    assert bound.borrowed.tolist() == [[1, 1, 3], [2, 2, 3]]
    # Expert 1 keeps 28 rows of the node inside, 18 over its bound; expert 2 only 29 - 20.
    counts_RE[2, 1] = 12
    counts_RE[3] = torch.tensor([0, 16, 29, 0])
    planner = Materialize(20, 10, NODES_4, max_borrowed=1)
    plan = planner(counts_RE, torch.tensor([0, 1, 2, 3]))
    assert plan.borrowed.tolist() == [[1, 1, 3]]
    assert computed(plan, 1) == [(2, 3, 12), (3, 3, 16)]


def test_a_dropped_relay_leaves_its_node_to_the_next_copy() -> None:
    """Rank 3 has most rows of both experts and room for one; rank 2 borrows expert 0 too."""
    counts_RE = torch.zeros(4, 4, dtype=torch.int64)
    counts_RE[2], counts_RE[3] = torch.tensor([11, 0, 0, 0]), torch.tensor([12, 50, 0, 0])
    plan = Materialize(10, 10, NODES_4, max_borrowed=1)(counts_RE, HOME_4)
    assert plan.borrowed.tolist() == [[0, 0, 2], [1, 1, 3]]
    assert computed(plan, 0) == [(2, 2, 11), (3, 2, 12)]


@pytest.mark.parametrize(
    ("rows_intra", "rows_inter", "max_borrowed", "message"),
    [
        (0, 1, None, r"planner.rows_intra \(0\) must be >= 1"),
        (1, -1, None, r"planner.rows_inter \(-1\) must be >= 1"),
        (1, 1, -1, r"planner.max_borrowed \(-1\) must be >= 0"),
    ],
)
def test_impossible_settings(
    rows_intra: int, rows_inter: int, max_borrowed: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Materialize(rows_intra, rows_inter, max_borrowed=max_borrowed)


def test_impossible_widths_and_nodes() -> None:
    with pytest.raises(ValueError, match=r"expert_parameters \(0\) must be > 0"):
        Materialize().for_widths(8, 0)
    with pytest.raises(ValueError, match="nodes of 3 ranks, counts_RE has 4"):
        Materialize(1, 1, (0, 0, 1))(counts_4([1, 1, 1, 1]), HOME_4)
