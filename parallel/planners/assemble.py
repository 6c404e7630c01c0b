"""From rows per (expert, rank) to a plan: which source's rows are computed where.

E experts, R ranks, X split experts, G nodes, P (expert, source rank) pairs that have rows,
N entries of a table of three columns, M segments of split experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel.plan import DispatchPlan
from parallel.planners.inputs import Homes, check_inputs, check_nodes

NOTHING_N3 = np.empty((0, 3), dtype=np.int64)
_EXPERT_HOME_RANK = np.array([0, 0, 1])


def assemble(
    counts_RE: Tensor,
    home_E: Tensor,
    away_N3: np.ndarray,
    *,
    node_of_R: Sequence[int] | None = None,
    borrowed: np.ndarray | None = None,
    keep: bool = False,
) -> DispatchPlan:
    """The plan in which ranks compute so many rows of experts, with the fewest rows sent far.

    Rows are computed at their own source as far as that rank computes rows of their expert, then
    on the source's node, then anywhere.

    Args:
        counts_RE: int64 [R, E] rows per source rank and expert.
        home_E: int64 [E] home rank per expert.
        away_N3: int64 [N, 3], (expert, rank other than its home, rows > 0), each pair once; the
            home computes the rest of the expert.
        node_of_R: node of every rank; None means one node.
        borrowed: int64 [N, 3], (expert, home, borrower) of all that is borrowed, with or without
            rows, each once; None means the pairs of away_N3.
        keep: whether what is borrowed stays until the end of the optimizer step.

    Raises:
        ValueError: for counts or homes that do not fit, or nodes of another number of ranks.
    """
    counts, homes = check_inputs(counts_RE, home_E)
    if node_of_R is not None:
        check_nodes(node_of_R, len(counts))
    if len(away_N3):
        _check_away(counts, homes, away_N3)
    return assemble_checked(counts, homes, away_N3, node_of_R, borrowed, keep)


def assemble_checked(
    counts: np.ndarray,
    homes: Homes,
    away_N3: np.ndarray,
    node_of_R: Sequence[int] | None = None,
    borrowed: np.ndarray | None = None,
    keep: bool = False,
) -> DispatchPlan:
    """The plan of `assemble` for counts and homes as check_inputs gives them, the rest right."""
    counts_ER = _transposed(counts)
    if borrowed is None:
        borrowed = _pairs(homes, away_N3)
    if not len(away_N3):
        return _finish(_whole_rows(counts_ER, homes), borrowed, counts, keep)
    num_ranks = len(counts)
    split_X = _occurring(away_N3[:, 0], len(counts_ER))
    supply_demand = np.zeros((2, len(split_X), num_ranks), dtype=np.int64)
    counts_ER.take(split_X, axis=0, out=supply_demand[0], mode="clip")
    line_N = split_X.searchsorted(away_N3[:, 0])
    supply_demand[1, line_N, away_N3[:, 1]] = away_N3[:, 2]
    total = np.add.reduce(supply_demand, axis=2)
    home_X = homes.home_E.take(split_X)
    supply_demand[1, np.arange(len(split_X)), home_X] = total[0] - total[1]
    segments = _nearest_first(supply_demand, node_of_R)
    return _finish(_split_rows(counts_ER, homes, split_X, segments), borrowed, counts, keep)


def assemble_slices(counts: np.ndarray, homes: Homes, slices_N3: np.ndarray) -> DispatchPlan:
    """The plan that cuts the rows of some experts, by source rank and token, into slices.

    Args:
        counts, homes: as check_inputs gives them.
        slices_N3: int64 [N, 3], (expert, computing rank, rows > 0), the slices of an expert one
            after the other; they hold all its rows. Experts without slices stay at home.
    """
    num_ranks = len(counts)
    counts_ER = _transposed(counts)
    slices_N3 = slices_N3[slices_N3[:, 0].argsort(kind="stable")]
    split_X = _occurring(slices_N3[:, 0], len(counts_ER))
    supply = counts_ER.take(split_X, axis=0).ravel()
    cell_M, slice_M, rows_M = overlaps(supply, slices_N3[:, 2])
    to_M = cell_M - cell_M % num_ranks + slices_N3[slice_M, 1]
    key, first_M, of_M = np.unique(
        cell_M * len(supply) + to_M, return_index=True, return_inverse=True
    )
    rows_M = np.bincount(of_M, weights=rows_M, minlength=len(key)).astype(np.int64)
    segments = _Segments(cell_M[first_M], to_M[first_M], rows_M)
    away_N3 = slices_N3[slices_N3[:, 1] != homes.home_E[slices_N3[:, 0]]]
    borrowed = np.unique(_pairs(homes, away_N3), axis=0)
    return _finish(_split_rows(counts_ER, homes, split_X, segments), borrowed, counts, False)


def overlaps(supply: np.ndarray, demand: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the same row of items in two ways: which piece meets which, and in how many items.

    Args:
        supply, demand: int64, sizes of consecutive pieces, zero allowed; their sums are equal.

    Returns:
        int64 index into supply, index into demand, items > 0, ascending in both.
    """
    ends = np.concatenate((supply.cumsum(), demand.cumsum()))
    return _meetings(ends, len(supply))


def _meetings(ends: np.ndarray, num_supply: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`overlaps` from the ends of the supply's pieces and of the demand's, one after the other."""
    order = ends.argsort(kind="stable")
    ends = ends.take(order)
    items = ends.copy()
    items[1:] -= ends[:-1]
    met = items.nonzero()[0]
    of_supply = order < num_supply
    piece = of_supply.cumsum().take(met)  # pieces of supply that end here or before
    piece -= of_supply.take(met)
    return piece, met - piece, items.take(met)


class _Segments(NamedTuple):
    """Segments of split experts, sorted by the first two, each pair of them once.

    cell_M and to_M are places in a table [X, R], on the same line: of the source rank and of the
    computing rank; rows_M are the numbers of rows.
    """

    cell_M: np.ndarray
    to_M: np.ndarray
    rows_M: np.ndarray


def _nearest_first(supply_demand: np.ndarray, node_of_R: Sequence[int] | None) -> _Segments:
    """Which rank computes which source's rows of each split expert.

    Args:
        supply_demand: int64 [2, X, R], rows at every source and rows computed by every rank.
    """
    stay_XR = np.minimum(supply_demand[0], supply_demand[1])
    left = supply_demand - stay_XR
    cell = stay_XR.ravel().nonzero()[0]
    found = [_Segments(cell, cell, stay_XR.take(cell))]
    if node_of_R is not None and len(set(node_of_R)) > 1:
        segments, left = _within_nodes(left, node_of_R)
        found.append(segments)
    ends = left.reshape(2, -1).cumsum(axis=1).ravel()
    found.append(_Segments(*_meetings(ends, stay_XR.size)))
    cell_M = np.concatenate([segments.cell_M for segments in found])
    to_M = np.concatenate([segments.to_M for segments in found])
    rows_M = np.concatenate([segments.rows_M for segments in found])
    key_M = cell_M * stay_XR.size
    key_M += to_M
    order = key_M.argsort(kind="stable")
    return _Segments(cell_M.take(order), to_M.take(order), rows_M.take(order))


def _within_nodes(
    supply_demand: np.ndarray, node_of_R: Sequence[int]
) -> tuple[_Segments, np.ndarray]:
    """Segments between ranks of a node, and the supply and demand that they leave."""
    num_ranks = len(node_of_R)
    rank_of_column = np.argsort(node_of_R, kind="stable")
    node_of_column = np.take(node_of_R, rank_of_column)
    starts = np.diff(node_of_column, prepend=node_of_column[0] - 1).nonzero()[0]
    columns = supply_demand[..., rank_of_column]
    near_XG = np.minimum.reduce(np.add.reduceat(columns, starts, axis=2))
    # of every node's columns, so many rows from the left
    before = columns.cumsum(axis=2) - columns
    sizes = np.diff(starts, append=num_ranks)
    until = np.repeat(near_XG + before[..., starts], sizes, axis=2) - before
    near = np.minimum(np.maximum(until, 0), columns)
    cell, to, rows = overlaps(near[0].ravel(), near[1].ravel())
    shift = rank_of_column - np.arange(num_ranks)
    segments = _Segments(cell + shift[cell % num_ranks], to + shift[to % num_ranks], rows)
    left = np.empty_like(supply_demand)
    left[..., rank_of_column] = columns - near
    return segments, left


def _check_away(counts: np.ndarray, homes: Homes, away_N3: np.ndarray) -> None:
    num_ranks, num_experts = counts.shape
    expert_N, rank_N, rows_N = away_N3.T
    pair_N = np.sort(expert_N * num_ranks + rank_N)
    assert (pair_N[1:] > pair_N[:-1]).all(), "a pair is there twice"
    assert (rank_N != homes.home_E[expert_N]).all(), "a pair is at home"
    assert (rows_N > 0).all(), "a pair without rows"
    away_E = np.bincount(expert_N, weights=rows_N, minlength=num_experts)
    assert (away_E <= np.add.reduce(counts, axis=0)).all(), "more rows away than there are"


def _occurring(expert_N: np.ndarray, num_experts: int) -> np.ndarray:
    """The experts that occur, ascending."""
    occurs_E = np.zeros(num_experts, dtype=bool)
    occurs_E[expert_N] = True
    return occurs_E.nonzero()[0]


def _pairs(homes: Homes, away_N3: np.ndarray) -> np.ndarray:
    """(expert, home, borrower) of rows computed away from home."""
    borrowed = away_N3.take(_EXPERT_HOME_RANK, axis=1)
    borrowed[:, 1] = homes.home_E.take(away_N3[:, 0])
    return borrowed


def _transposed(counts: np.ndarray) -> np.ndarray:
    """int64 [E, R]: by way of rows of an odd length, which columns of a cache like better."""
    num_ranks, num_experts = counts.shape
    padded = np.empty((num_ranks, num_experts + 9), dtype=np.int64)
    padded[:, :num_experts] = counts
    return padded.T[:num_experts].copy()


def _whole_rows(counts_ER: np.ndarray, homes: Homes) -> np.ndarray:
    """The segments of a plan in which the homes compute everything."""
    return _at_home(counts_ER, homes, (counts_ER != 0).ravel().nonzero()[0])


def _at_home(counts_ER: np.ndarray, homes: Homes, pair_P: np.ndarray) -> np.ndarray:
    """(expert, source, home, all rows) of pairs expert * R + source."""
    rows = homes.grid.take(pair_P, axis=0)
    rows[:, 2] = homes.home_E.take(rows[:, 0])
    rows[:, 3] = counts_ER.take(pair_P)
    return rows


def _split_rows(
    counts_ER: np.ndarray, homes: Homes, split_X: np.ndarray, segments: _Segments
) -> np.ndarray:
    """The segments of a plan in which the homes compute all but the split experts."""
    num_ranks = counts_ER.shape[1]
    cell_M, to_M, rows_M = segments
    line_M = cell_M // num_ranks
    whole = counts_ER != 0
    whole[split_X] = False
    whole_P = whole.ravel().nonzero()[0]
    start_X = split_X * num_ranks
    place_M = whole_P.searchsorted(start_X).take(line_M)
    place_M += np.arange(len(line_M))
    start_X -= np.arange(0, start_X.size * num_ranks, num_ranks)
    pair_P = np.empty(len(whole_P) + len(line_M), dtype=np.int64)
    is_split = np.zeros(len(pair_P), dtype=bool)
    is_split[place_M] = True
    pair_P[~is_split] = whole_P
    pair_P[place_M] = start_X.take(line_M) + cell_M

    rows = _at_home(counts_ER, homes, pair_P)
    rows[place_M, 2] = to_M - line_M * num_ranks
    rows[place_M, 3] = rows_M
    return rows


def _finish(rows: np.ndarray, borrowed: np.ndarray, counts: np.ndarray, keep: bool) -> DispatchPlan:
    num_ranks, num_experts = counts.shape
    if len(borrowed):
        order = (borrowed[:, 0] * num_ranks + borrowed[:, 2]).argsort(kind="stable")
        borrowed = borrowed.take(order, axis=0)
    tables = torch.from_numpy(rows), torch.from_numpy(borrowed)
    return DispatchPlan(*tables, num_ranks, num_experts, keep)
