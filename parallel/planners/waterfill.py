"""Water-filling: rows of replicated experts shared out so that the fullest rank is lowest.

E experts, R ranks, N (expert, rank) pairs.
"""

from __future__ import annotations

import numpy as np

from parallel.planners.inputs import row_limit

TOLERANCE = 0.01  # as UltraEP (arXiv:2606.04101); the last per cent costs two thirds of the time


def waterfill(
    load_E: np.ndarray,
    home_E: np.ndarray,
    copies_N2: np.ndarray,
    num_ranks: int,
    *,
    tolerance: float = TOLERANCE,
) -> tuple[np.ndarray, np.ndarray]:
    """Share every expert's rows over its home and copies: the fullest rank is as low as can be.

    A sweep of exact water-filling, one expert after the other against the load of all others,
    brings most of it (block descent on the sum of squared loads, whose minimum is also the
    min-max optimum). Further sweeps would gain ever less, and stop where ranks along a chain
    are a row apart; so then rows are pushed from the fullest rank along paths of shared
    experts. Where no path leads on, all ranks reached are within one row of the fullest and
    their rows have no copy elsewhere: no share of whole rows has a lower maximum.

    Args:
        load_E: int64 rows per expert. home_E: int64 home rank per expert.
        copies_N2: int64 [N, 2] pairs (expert, rank) of copies besides home.
        num_ranks: R.
        tolerance: (1 + tolerance) times the mean, rounded up, is low enough. With 0 the maximum
            is the lowest possible to the row.

    Returns:
        int64 [n, 3] (expert, rank, rows > 0) of the rows computed away from home, sorted;
        int64 [R] rows computed by every rank.

    Raises:
        ValueError: for a pair that is repeated, at home, or outside the experts or ranks.
    """
    _check_copies(home_E, copies_N2, num_ranks)
    ranks_of: dict[int, list[int]] = {}
    expert_N, rank_N = copies_N2[:, 0], copies_N2[:, 1]
    for expert, rank in copies_N2[np.lexsort((rank_N, expert_N, -load_E[expert_N]))].tolist():
        if load_E[expert]:
            ranks_of.setdefault(expert, [int(home_E[expert])]).append(rank)
    load_R = np.bincount(home_E, weights=load_E, minlength=num_ranks).astype(np.int64).tolist()
    rows_of = {
        expert: [int(load_E[expert])] + [0] * (len(ranks) - 1) for expert, ranks in ranks_of.items()
    }
    enough = row_limit(1 + tolerance, sum(load_R), num_ranks)
    if max(load_R) > enough:
        _sweep(ranks_of, rows_of, load_R)
        _push(ranks_of, rows_of, load_R, enough)
    away = [
        (expert, rank, rows)
        for expert in sorted(ranks_of)
        for rank, rows in zip(ranks_of[expert][1:], rows_of[expert][1:], strict=True)
        if rows
    ]
    return np.array(away, dtype=np.int64).reshape(-1, 3), np.array(load_R, dtype=np.int64)


def _check_copies(home_E: np.ndarray, copies_N2: np.ndarray, num_ranks: int) -> None:
    expert_N, rank_N = copies_N2[:, 0], copies_N2[:, 1]
    outside = (copies_N2 < 0).any(axis=1) | (expert_N >= len(home_E)) | (rank_N >= num_ranks)
    if outside.any():
        raise ValueError(
            f"copies: (expert, rank) {copies_N2[outside][0].tolist()} is outside the "
            f"{len(home_E)} experts or {num_ranks} ranks"
        )
    at_home = home_E[expert_N] == rank_N
    if at_home.any():
        raise ValueError(
            f"copies: expert {expert_N[at_home][0]} is at home on {rank_N[at_home][0]}; "
            "name its other ranks only"
        )
    keys = np.sort(expert_N * num_ranks + rank_N)
    repeated = keys[1:][keys[1:] == keys[:-1]]
    if len(repeated):
        expert, rank = divmod(int(repeated[0]), num_ranks)
        raise ValueError(f"copies: expert {expert} on rank {rank} is repeated; name it once")


def _sweep(
    ranks_of: dict[int, list[int]], rows_of: dict[int, list[int]], load_R: list[int]
) -> None:
    """Water-fill every expert in turn, in place."""
    for expert, ranks in ranks_of.items():
        rows = rows_of[expert]
        for rank, taken in zip(ranks, rows, strict=True):
            load_R[rank] -= taken
        rows_of[expert] = rows = _fill(sum(rows), [load_R[rank] for rank in ranks])
        for rank, taken in zip(ranks, rows, strict=True):
            load_R[rank] += taken


def _fill(num_rows: int, loads: list[int]) -> list[int]:
    """So many rows (> 0) poured onto ranks with these loads; they level from the lowest up."""
    order = sorted(range(len(loads)), key=loads.__getitem__)
    total, wet = num_rows, 0
    while wet < len(order) and total > wet * loads[order[wet]]:
        total += loads[order[wet]]
        wet += 1
    level, higher = divmod(total, wet)  # the first `higher` ranks take one row more
    poured = [0] * len(loads)
    for place, index in enumerate(order[:wet]):
        poured[index] = level - loads[index] + (place < higher)
    return poured


def _push(
    ranks_of: dict[int, list[int]], rows_of: dict[int, list[int]], load_R: list[int], enough: int
) -> None:
    """Push rows from the fullest rank along paths of experts, in place, until that is enough."""
    held_R: list[list[int]] = [[] for _ in load_R]
    for expert, ranks in ranks_of.items():
        for rank in ranks:
            held_R[rank].append(expert)
    while (most := max(load_R)) > enough:
        fullest = load_R.index(most)
        came_by = _reach(fullest, ranks_of, rows_of, held_R, load_R)
        taker = min(came_by, key=load_R.__getitem__, default=fullest)
        moved = (most - load_R[taker]) // 2
        if not moved:
            return
        path, rank = [], taker
        while rank != fullest:
            expert, giver = came_by[rank]
            index = ranks_of[expert].index
            path.append((rows_of[expert], index(giver), index(rank)))
            rank = giver
        moved = min(moved, *(rows[giver] for rows, giver, _ in path))
        for rows, giver, receiver in path:
            rows[giver] -= moved
            rows[receiver] += moved
        load_R[fullest] -= moved
        load_R[taker] += moved


def _reach(
    source: int,
    ranks_of: dict[int, list[int]],
    rows_of: dict[int, list[int]],
    held_R: list[list[int]],
    load_R: list[int],
) -> dict[int, tuple[int, int]]:
    """Ranks that rows of the source can reach, and the expert and rank that each is reached by.

    A rank reaches another through an expert of which it has rows and the other a copy. The
    search is breadth first and ends at a rank below the mean.
    """
    mean = sum(load_R) / len(load_R)
    came_by: dict[int, tuple[int, int]] = {}
    queue, used = [source], set()
    for rank in queue:
        for expert in held_R[rank]:
            ranks = ranks_of[expert]
            if expert in used or not rows_of[expert][ranks.index(rank)]:
                continue
            used.add(expert)
            for other in ranks:
                if other != source and other not in came_by:
                    came_by[other] = expert, rank
                    queue.append(other)
                    if load_R[other] < mean:
                        return came_by
    return came_by
