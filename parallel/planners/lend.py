"""Which experts the ranks above a threshold lend to which ranks below it.

Fixed-charge transport: an (expert, helper) pair costs the same however many rows it takes, so a
move should use up the surplus of its lender or the room of its helper, best both. One step per
borrowed expert on sorted lists of numbers rows * base + id: for some ten moves, faster than arrays.

E experts, R ranks, S experts per rank.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

TRIES = 16  # rooms looked at for a pair that fits
WASTE = 4  # room that a pair may leave unused, in the mean of what all rooms may


class Market(NamedTuple):
    """Ranks above a threshold, ranks below it, and what is still to be moved between them.

    Attributes:
        lenders: ranks above the threshold.
        surplus: rows above it of every lender.
        experts: ascending rows * E + expert of every lender.
        rooms: ascending rows below the threshold * R + (R - 1 - rank), of the helpers.
        may_borrow_R: how many more experts each rank may borrow.
        num_experts, num_ranks: E and R, the bases of the packed numbers.
    """

    lenders: list[int]
    surplus: list[int]
    experts: list[list[int]]
    rooms: list[int]
    may_borrow_R: list[int]
    num_experts: int
    num_ranks: int

    def copy(self) -> Market:
        """One to try another order on."""
        lenders, surplus, experts, rooms, may_borrow_R, num_experts, num_ranks = self
        experts = [keys[:] for keys in experts]
        return Market(
            lenders, surplus[:], experts, rooms[:], may_borrow_R[:], num_experts, num_ranks
        )

    def fewest_moves(self) -> int:
        """A lower bound: one per lender, and enough of the largest rooms for all surplus."""
        needed = sum(self.surplus) * self.num_ranks
        covered = list(accumulate(reversed(self.rooms)))
        return max(len(self.surplus), bisect_left(covered, needed) + 1)


def open_market(
    load_RS: np.ndarray,
    experts_RS: np.ndarray,
    load_R: np.ndarray,
    threshold: int,
    lend_above: int,
    max_borrowed: int | None,
) -> Market:
    """The market at a threshold of rows per rank.

    Args:
        load_RS: int64 [R, S] rows of every rank's experts. experts_RS: the experts.
        load_R: int64 [R] rows of every rank.
        threshold: rows that no helper exceeds, and down to which others lend.
        lend_above: rows of a rank above which it lends, at least the threshold.
        max_borrowed: experts that a rank may borrow; None is no bound.
    """
    num_ranks, per_rank = load_RS.shape
    num_experts = num_ranks * per_rank
    above_R = load_R - threshold
    lenders = (load_R > lend_above).nonzero()[0]
    experts = load_RS.take(lenders, axis=0) * num_experts
    experts += experts_RS.take(lenders, axis=0)
    experts.sort(axis=1)
    rooms = above_R * -num_ranks
    rooms += np.arange(num_ranks - 1, -1, -1)
    rooms.sort()
    first = len(rooms) if max_borrowed == 0 else rooms.searchsorted(num_ranks)
    return Market(
        lenders.tolist(),
        above_R.take(lenders).tolist(),
        experts.tolist(),
        rooms[first:].tolist(),
        [num_experts if max_borrowed is None else max_borrowed] * num_ranks,
        num_experts,
        num_ranks,
    )


def within_nodes(market: Market, node_of_R: Sequence[int], smallest: int) -> list[int]:
    """Moves inside nodes, by tight_fits.

    Args:
        market: what is to be moved; it keeps what is not.
        node_of_R: node of every rank. smallest: fewest rows of a move.

    Returns:
        Expert, helper and rows of every move, one after the other.
    """
    num_ranks = market.num_ranks
    lenders_of: dict[int, list[int]] = {}
    for lender, rank in enumerate(market.lenders):
        lenders_of.setdefault(node_of_R[rank], []).append(lender)
    rooms_of: dict[int, list[int]] = {node: [] for node in node_of_R}
    for key in market.rooms:
        rooms_of[node_of_R[num_ranks - 1 - key % num_ranks]].append(key)
    moves = []
    for node, lenders in lenders_of.items():
        inside = market._replace(
            surplus=[market.surplus[lender] for lender in lenders],
            experts=[market.experts[lender] for lender in lenders],
            rooms=rooms_of[node],
        )
        moves += tight_fits(inside, smallest)
        for lender, left in zip(lenders, inside.surplus, strict=True):
            market.surplus[lender] = left
    market.rooms[:] = sorted(chain.from_iterable(rooms_of.values()))
    return moves


def tight_fits(market: Market, smallest: int) -> list[int]:
    """Largest surplus first: into the room that it fits best, or a pair of rooms, or the largest.

    Args:
        market: what is to be moved; it keeps what is not.
        smallest: fewest rows of a move.

    Returns:
        Expert, helper and rows of every move, one after the other.
    """
    _, surplus, experts_of, rooms, may_borrow_R, num_experts, num_ranks = market
    queue = sorted([rows * num_ranks + lender for lender, rows in enumerate(surplus)])
    waste = WASTE * max(0, sum(rooms) // num_ranks - sum(surplus)) // max(1, len(rooms))
    moves: list[int] = []
    while queue and rooms:
        key = queue.pop()
        left = key // num_ranks
        lender = key - left * num_ranks
        experts = experts_of[lender]
        of_expert = experts[-1]
        at_home = of_expert // num_experts
        wanted = left if left < at_home else at_home
        place = bisect_left(rooms, wanted * num_ranks)
        if place == len(rooms):
            place = _larger_of_pair(rooms, wanted, num_ranks, smallest, waste)
        of_room = rooms[place]
        rows = of_room // num_ranks
        helper = num_ranks - 1 - of_room + rows * num_ranks
        if wanted < rows:
            rows = wanted
        if rows < smallest:
            break  # no other lender has more to move
        del experts[-1], rooms[place]
        moves += (of_expert - at_home * num_experts, helper, rows)
        surplus[lender] = left - rows
        may_borrow_R[helper] -= 1
        if rows < at_home:
            insort(experts, of_expert - rows * num_experts)
        if rows < left:
            insort(queue, key - rows * num_ranks)
        if may_borrow_R[helper]:
            of_room -= rows * num_ranks
            if of_room >= num_ranks:
                insort(rooms, of_room)
    return moves


def _larger_of_pair(
    rooms: list[int], wanted: int, num_ranks: int, smallest: int, waste: int
) -> int:
    """Place of the larger of two rooms that rows fit with little waste; else of the largest."""
    chosen = last = len(rooms) - 1
    for place in range(last, max(-1, last - TRIES), -1):
        room = rooms[place] // num_ranks
        rest = wanted - room
        if rest > room:
            break
        other = bisect_left(rooms, rest * num_ranks, 0, place)
        if other < place and rest >= smallest:
            unused = rooms[other] // num_ranks - rest
            if unused <= waste:
                chosen, waste = place, unused - 1
    return chosen


def largest_first(market: Market, smallest: int) -> list[int]:
    """Largest expert first, into the largest room: the order of arXiv:2601.17111.

    Arguments and result as of tight_fits.
    """
    _, surplus, experts_of, rooms, may_borrow_R, num_experts, num_ranks = market
    chunks = []
    for lender, left in enumerate(surplus):
        for key in reversed(experts_of[lender]):
            at_home = key // num_experts
            rows = min(left, at_home)
            if rows < smallest:
                break
            chunks.append((-at_home, key - at_home * num_experts, rows, lender))
            left -= rows
    chunks.sort()
    moves: list[int] = []
    for _, expert, left, lender in chunks:
        while rooms and left >= smallest:
            of_room = rooms[-1]
            rows = of_room // num_ranks
            helper = num_ranks - 1 - of_room + rows * num_ranks
            if left < rows:
                rows = left
            if rows < smallest:
                break
            del rooms[-1]
            moves += (expert, helper, rows)
            surplus[lender] -= rows
            left -= rows
            may_borrow_R[helper] -= 1
            if may_borrow_R[helper]:
                of_room -= rows * num_ranks
                if of_room >= num_ranks:
                    insort(rooms, of_room)
    return moves
