"""The default planner: all ranks compute nearly the same, with few borrowed experts.

E experts, R ranks, S experts per rank, N moves.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from parallel.plan import DispatchPlan
from parallel.planners.assemble import NOTHING_N3, assemble_checked
from parallel.planners.inputs import check_inputs, check_nodes, row_limit
from parallel.planners.lend import largest_first, open_market, tight_fits, within_nodes
from placement.topology import Topology


class _Loads(NamedTuple):
    """Rows of every rank's experts, the experts, and rows of every rank: int64."""

    load_RS: np.ndarray
    experts_RS: np.ndarray
    load_R: np.ndarray


class _Lent(NamedTuple):
    """Expert, helper and rows of every move, one after the other; and two numbers of rows.

    The threshold is that to which helpers were filled and lenders emptied; the highest is what
    the fullest rank has, more than the threshold if it keeps what is not worth a move.
    """

    moves: list[int]
    threshold: int
    highest: int


@dataclass(frozen=True)
class Quota:
    """Ranks above a quota of rows lend experts to ranks below it, as few as will do.

    As in UltraEP (arXiv:2606.04101) the rows that each rank computes are decided first and the
    experts to borrow follow: all ranks come to one threshold, the lowest that can be kept, within
    nodes as far as possible, then between them. No rank both borrows and lends.

    Attributes:
        tolerance: the aim: no rank computes more than (1 + tolerance) times the mean, rounded up.
            Only min_rows and max_borrowed can be in its way. A home plan that keeps it stays.
        alpha: the guarantee: no rank ever computes more than alpha times the mean, rounded up;
            min_rows give way to it.
        max_borrowed: most experts that a rank borrows; None is no bound.
        min_rows_intra, min_rows_inter: rows from which borrowing an expert is worthwhile, from
            the same node and from another one. A rank keeps what it has too much if it is less.
        node_of_R: node of every rank; None means one node.

    Raises:
        ValueError: for a field out of its bounds.
    """

    tolerance: float = 0.01
    alpha: float = 1.25
    max_borrowed: int | None = None
    min_rows_intra: int = 1
    min_rows_inter: int = 1
    node_of_R: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"planner.tolerance ({self.tolerance}) must be >= 0")
        if not self.alpha >= 1 + self.tolerance:
            raise ValueError(
                f"planner.alpha ({self.alpha}) must be >= 1 + planner.tolerance "
                f"({1 + self.tolerance}); raise it or lower planner.tolerance"
            )
        if self.max_borrowed is not None and self.max_borrowed < 0:
            raise ValueError(
                f"planner.max_borrowed ({self.max_borrowed}) must be >= 0; None is no bound"
            )
        if self.min_rows_intra < 1:
            raise ValueError(f"planner.min_rows_intra ({self.min_rows_intra}) must be >= 1")
        if self.min_rows_inter < self.min_rows_intra:
            raise ValueError(
                f"planner.min_rows_inter ({self.min_rows_inter}) must be >= "
                f"planner.min_rows_intra ({self.min_rows_intra}); links between nodes are no faster"
            )

    def for_topology(self, topology: Topology, bytes_per_parameter: float = 6.0) -> Quota:
        """This planner with the nodes of a machine, and rows worth moving over its links.

        Args:
            topology: of the ranks of the EP group.
            bytes_per_parameter: as of Topology.rows_worth_moving.
        """
        intra, inter = topology.rows_worth_moving(bytes_per_parameter)
        return replace(
            self,
            min_rows_intra=intra,
            min_rows_inter=max(intra, inter),
            node_of_R=topology.node_of_R,
        )

    def max_rows_per_rank(self, total_rows: int, num_ranks: int) -> int:
        """Rows that no rank ever exceeds, given all rows of a layer and micro-batch."""
        return row_limit(self.alpha, total_rows, num_ranks)

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        """Plan one layer of one micro-batch.

        Args:
            counts_RE: int64 [R, E] rows per source rank and expert.
            home_E: int64 [E] home rank per expert.

        Raises:
            ValueError: for counts, homes or nodes that do not fit, and for a max_borrowed with
                which alpha cannot be kept.
        """
        counts, homes = check_inputs(counts_RE, home_E)
        if self.node_of_R is not None:
            check_nodes(self.node_of_R, len(counts))
        load_RS = np.add.reduce(counts, axis=0).take(homes.experts_RS)
        away_N3 = self._away(_Loads(load_RS, homes.experts_RS, np.add.reduce(load_RS, axis=1)))
        return assemble_checked(counts, homes, away_N3, self.node_of_R)

    def _away(self, loads: _Loads) -> np.ndarray:
        """Rows away from home, int64 [N, 3] (expert, rank, rows)."""
        load_R = loads.load_R.tolist()
        num_ranks, total, highest = len(load_R), sum(load_R), max(load_R)
        aim = row_limit(1 + self.tolerance, total, num_ranks)
        if highest <= aim:
            return NOTHING_N3
        limit = self.max_rows_per_rank(total, num_ranks)
        lent = self._lend(loads, aim, limit)
        if lent is None or lent.highest > aim:
            lent = self._lowest(loads, lent, aim, min(limit, highest), limit)
        return np.frombuffer(array("q", lent.moves), dtype=np.int64).reshape(-1, 3)

    def _lowest(
        self, loads: _Loads, at_aim: _Lent | None, aim: int, high: int, limit: int
    ) -> _Lent:
        """What is lent where the aim is out of reach: the lowest fullest rank, by bisection."""
        best = at_aim or self._lend(loads, high, limit)
        if best is None:
            return self._lend_regardless(loads, limit)
        low, high = aim, best.highest
        step = max(1, int(aim * self.tolerance / 2))
        while high - low > step:
            middle = (low + high) // 2
            found = self._lend(loads, middle, limit)
            if found is not None and found.highest < best.highest:
                best = found
            if found is None or found.highest > middle:  # a higher one has larger rooms
                low, high = middle, best.highest
            else:
                high = middle
        # ranks below the fullest need not lend
        fewer = self._lend(loads, best.threshold, limit, lend_above=best.highest)
        if fewer is not None and fewer.highest <= best.highest:
            best = min(best, fewer, key=lambda one: len(one.moves))
        return best

    def _lend(
        self, loads: _Loads, threshold: int, limit: int, lend_above: int | None = None
    ) -> _Lent | None:
        """The fewest moves found to a threshold; None if a rank keeps too much above it.

        A rank may keep what is not worth a move, up to the limit.
        """
        lend_above = lend_above or threshold
        market = open_market(*loads, threshold, lend_above, self.max_borrowed)
        if self.node_of_R is not None and len(set(self.node_of_R)) > 1:
            may_keep = min(self.min_rows_inter - 1, limit - threshold)
            moves = within_nodes(market, self.node_of_R, self.min_rows_intra)
            moves += tight_fits(market, self.min_rows_inter)
            kept = max(market.surplus, default=0)
        else:
            may_keep = min(self.min_rows_intra - 1, limit - threshold)
            other, fewest = market.copy(), market.fewest_moves()
            moves = tight_fits(market, self.min_rows_intra)
            kept = max(market.surplus, default=0)
            if kept > may_keep or len(moves) > 3 * fewest:
                other_moves = largest_first(other, self.min_rows_intra)
                other_kept = max(other.surplus, default=0)
                if (other_kept > may_keep, len(other_moves)) < (kept > may_keep, len(moves)):
                    moves, kept = other_moves, other_kept
        return _Lent(moves, threshold, threshold + kept) if kept <= may_keep else None

    def _lend_regardless(self, loads: _Loads, limit: int) -> _Lent:
        """What keeps the guarantee, whether worth it or not."""
        planner = replace(self, min_rows_intra=1, min_rows_inter=1)
        lent = planner._lend(loads, limit, limit)
        if lent is not None:
            return lent
        assert self.max_borrowed is not None
        needed = self.max_borrowed + 1
        while replace(planner, max_borrowed=needed)._lend(loads, limit, limit) is None:
            needed += 1
        raise ValueError(
            f"planner.max_borrowed ({self.max_borrowed}) must be >= {needed} to keep all ranks "
            f"within planner.alpha ({self.alpha}) times the mean for these counts; raise either"
        )
