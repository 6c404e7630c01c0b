"""Water-filling reaches the optimum of a slow exact method: bisection over maximum flows."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planners.inputs import row_limit
from parallel.planners.waterfill import waterfill

HOME_4 = np.array([0, 1, 2, 3])


def loads(
    load_E: np.ndarray, home_E: np.ndarray, away_N3: np.ndarray, num_ranks: int
) -> np.ndarray:
    """Rows of every rank, after checking that no home gives away more than it has."""
    left_E = load_E.copy()
    np.subtract.at(left_E, away_N3[:, 0], away_N3[:, 2])
    assert (left_E >= 0).all()
    load_R = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(load_R, home_E, left_E)
    np.add.at(load_R, away_N3[:, 1], away_N3[:, 2])
    return load_R


def max_flow(capacity: dict[str, dict[str, int]]) -> int:
    """Maximum flow from "source" to "sink", by shortest augmenting paths."""
    total = 0
    while True:
        came_from, queue = {"source": ""}, deque(["source"])
        while queue and "sink" not in came_from:
            node = queue.popleft()
            for other, free in capacity[node].items():
                if free and other not in came_from:
                    came_from[other] = node
                    queue.append(other)
        if "sink" not in came_from:
            return total
        path = ["sink"]
        while path[-1] != "source":
            path.append(came_from[path[-1]])
        path.reverse()
        pushed = min(capacity[node][other] for node, other in pairwise(path))
        for node, other in pairwise(path):
            capacity[node][other] -= pushed
            capacity[other][node] = capacity[other].get(node, 0) + pushed
        total += pushed


def lowest_maximum(
    load_E: np.ndarray, home_E: np.ndarray, copies_N2: np.ndarray, num_ranks: int
) -> int:
    """The smallest limit per rank under which all rows can flow from experts to ranks."""
    low, high = 0, int(load_E.sum())
    while low < high:
        limit = (low + high) // 2
        capacity: dict[str, dict[str, int]] = {"source": {}, "sink": {}}
        for rank in range(num_ranks):
            capacity[f"rank {rank}"] = {"sink": limit}
        for expert, rows in enumerate(load_E.tolist()):
            capacity["source"][f"expert {expert}"] = rows
            capacity[f"expert {expert}"] = {f"rank {home_E[expert]}": rows}
        for expert, rank in copies_N2.tolist():
            capacity[f"expert {expert}"][f"rank {rank}"] = int(load_E[expert])
        if max_flow(capacity) == load_E.sum():
            high = limit
        else:
            low = limit + 1
    return low


@settings(deadline=None, max_examples=200)
@given(
    num_ranks=st.integers(1, 6),
    experts_per_rank=st.integers(1, 4),
    largest=st.sampled_from([0, 1, 3, 50, 10_000]),
    density=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_lowest_maximum(
    num_ranks: int, experts_per_rank: int, largest: int, density: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    num_experts = num_ranks * experts_per_rank
    load_E = (largest * generator.random(num_experts) ** 3 + 0.5).astype(np.int64)
    home_E = generator.permutation(num_experts) % num_ranks
    has_copy = generator.random((num_experts, num_ranks)) < density
    has_copy[np.arange(num_experts), home_E] = False
    copies_N2 = generator.permutation(np.argwhere(has_copy))

    away_N3, load_R = waterfill(load_E, home_E, copies_N2, num_ranks, tolerance=0)

    assert away_N3.dtype == np.int64 and (away_N3[:, 2] > 0).all()
    pairs = list(map(tuple, away_N3[:, :2].tolist()))
    assert pairs == sorted(set(pairs))
    assert set(pairs) <= set(map(tuple, copies_N2.tolist()))
    assert load_R.tolist() == loads(load_E, home_E, away_N3, num_ranks).tolist()
    assert load_R.sum() == load_E.sum()
    lowest = lowest_maximum(load_E, home_E, copies_N2, num_ranks)
    assert load_R.max() == lowest
    again_N3, _ = waterfill(load_E, home_E, copies_N2[::-1], num_ranks, tolerance=0)
    assert np.array_equal(away_N3, again_N3)
    _, load_R = waterfill(load_E, home_E, copies_N2, num_ranks, tolerance=0.1)
    assert load_R.max() <= max(lowest, row_limit(1.1, int(load_E.sum()), num_ranks))


def test_rows_reach_the_emptiest_rank_over_a_chain_of_copies() -> None:
    """Expert r has a copy on rank r + 1 only: every neighbour differs by one row."""
    load_E = np.array([10, 9, 8, 7])
    copies_N2 = np.array([[0, 1], [1, 2], [2, 3]])
    away_N3, load_R = waterfill(load_E, HOME_4, copies_N2, 4)
    assert load_R.max() == 9
    assert away_N3.tolist() == [[0, 1, 1], [1, 2, 1]]


def test_one_hot_expert_is_spread_evenly() -> None:
    load_E = np.array([403, 1, 0, 0])
    copies_N2 = np.array([[0, 1], [0, 2], [0, 3]])
    away_N3, load_R = waterfill(load_E, HOME_4, copies_N2, 4)
    assert away_N3.tolist() == [[0, 1, 100], [0, 2, 101], [0, 3, 101]]
    assert load_R.tolist() == [101, 101, 101, 101]


def test_level_enough_at_home_stays_at_home() -> None:
    load_E, copies_N2 = np.array([1010, 990, 1000, 1000]), np.array([[0, 1]])
    assert not len(waterfill(load_E, HOME_4, copies_N2, 4)[0])
    assert waterfill(load_E, HOME_4, copies_N2, 4, tolerance=0)[0].tolist() == [[0, 1, 10]]


def test_no_copies_no_rows_away() -> None:
    away_N3, load_R = waterfill(np.array([5, 1, 1, 1]), HOME_4, np.empty((0, 2), np.int64), 4)
    assert away_N3.shape == (0, 3)
    assert load_R.tolist() == [5, 1, 1, 1]


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([[4, 0]], r"\[4, 0\] is outside the 4 experts or 4 ranks"),
        ([[0, 4]], r"\[0, 4\] is outside"),
        ([[-1, 0]], r"\[-1, 0\] is outside"),
        ([[0, 1], [2, 2]], "expert 2 is at home on 2"),
        ([[0, 1], [1, 0], [0, 1]], "expert 0 on rank 1 is repeated"),
    ],
)
def test_impossible_copies(copies: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        waterfill(np.array([5, 1, 1, 1]), HOME_4, np.array(copies), 4)
