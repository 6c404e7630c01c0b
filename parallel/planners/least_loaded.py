"""Least-loaded expert parallelism (LLEP, arXiv:2601.17111): what does not fit at home is spilled.

E experts, R ranks, N slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from parallel.plan import DispatchPlan
from parallel.planners.assemble import NOTHING_N3, assemble_checked, assemble_slices
from parallel.planners.inputs import check_inputs, row_limit


@dataclass(frozen=True)
class LeastLoaded:
    """Ranks keep rows up to a capacity; the rest goes to the least loaded ranks, largest first.

    As published, the capacity is rounded down, leftovers are forced on ranks that are full, and
    helpers get slices of an expert's rows in order of source. Here the capacity is rounded up,
    so all fits; no rank borrows an expert twice or evicts its own; a rank whose excess is below
    `min_rows` keeps it, and less than that moves only where it lowers the fullest rank; rows
    stay at their source where they can.

    Attributes:
        alpha: capacity of a rank, in mean rows per rank.
        min_rows: fewest rows worth a borrowed expert.
        trigger: load ratio of ranks below which the plan is the home plan.
        reference: plans as published, for comparison.

    Raises:
        ValueError: for a field below 1.
    """

    alpha: float = 1.0
    min_rows: int = 1024
    trigger: float = 1.3
    reference: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "min_rows", "trigger"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"planner.{name} ({getattr(self, name)}) must be >= 1")

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        """Plan one layer of one micro-batch.

        Args:
            counts_RE: int64 [R, E] rows per source rank and expert.
            home_E: int64 [E] home rank per expert.

        Raises:
            ValueError: for counts or homes that do not fit.
        """
        counts, homes = check_inputs(counts_RE, home_E)
        load_E = counts.sum(axis=0)
        load_R = load_E[homes.experts_RS].sum(axis=1)
        total, num_ranks = int(load_R.sum()), len(load_R)
        if int(load_R.max()) * num_ranks <= self.trigger * total:
            return assemble_checked(counts, homes, NOTHING_N3)
        loads, home, load = load_E.tolist(), homes.home_E.tolist(), load_R.tolist()
        if self.reference:
            capacity = max(1, int(self.alpha * (total // num_ranks)))
            slices = _published(loads, home, load, capacity, self.min_rows)
            return assemble_slices(counts, homes, np.array(slices, dtype=np.int64))
        capacity = row_limit(self.alpha, total, num_ranks)
        away = _corrected(loads, home, load, capacity, self.min_rows)
        return assemble_checked(counts, homes, np.array(away, dtype=np.int64).reshape(-1, 3))


def _descending(values: list[int]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


def _published(
    rows_E: list[int], home_E: list[int], load_R: list[int], capacity: int, min_rows: int
) -> list[tuple[int, int, int]]:
    """Slices (expert, rank, rows) of all experts, in the order of an expert's rows."""
    load_R = list(load_R)  # rows assigned, and rows of experts at home that are still to come
    slices = []
    for expert in _descending(rows_E):
        home, left = home_E[expert], rows_E[expert]
        load_R[home] -= left
        at_home = min(left, max(0, capacity - load_R[home]))
        if at_home:
            slices.append((expert, home, at_home))
            load_R[home] += at_home
            left -= at_home
        while left:
            others = sorted((r for r in range(len(load_R)) if r != home), key=load_R.__getitem__)
            helper, rows = others[0], left  # forced, if no rank qualifies
            for rank in others:
                chunk = min(left, capacity - load_R[rank])
                if chunk > 0 and (chunk == left or chunk >= min_rows):
                    helper, rows = rank, chunk
                    break
            slices.append((expert, helper, rows))
            load_R[helper] += rows
            left -= rows
    return slices


def _corrected(
    rows_E: list[int], home_E: list[int], load_R: list[int], capacity: int, min_rows: int
) -> list[tuple[int, int, int]]:
    """Rows (expert, rank, rows) away from home; no rank both borrows and lends."""
    load_R = list(load_R)
    kept = max([0, *(load - capacity for load in load_R if load < capacity + min_rows)])
    room_R = [capacity - load for load in load_R]
    at_home_E = list(rows_E)
    away: dict[tuple[int, int], int] = {}
    # pieces worth an expert down to the capacity, then smaller ones down to what is kept anyway
    for smallest, level in ((min_rows, capacity), (1, capacity + kept)):
        for expert in _descending(rows_E):
            home = home_E[expert]
            while load_R[home] > level:
                helper = max(range(len(room_R)), key=room_R.__getitem__)
                chunk = min(at_home_E[expert], load_R[home] - level, room_R[helper])
                if chunk < smallest:
                    break
                away[expert, helper] = away.get((expert, helper), 0) + chunk
                at_home_E[expert] -= chunk
                load_R[home] -= chunk
                room_R[helper] -= chunk
    return [(expert, rank, rows) for (expert, rank), rows in away.items()]
