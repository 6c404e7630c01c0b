"""Distances between ranks as levels of groups: leaving a group of a level costs its gain."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Level:
    """One way to group the ranks, and what two ranks of different groups are apart by it.

    Attributes:
        group_R: int64 [R], the group of every rank, numbered from 0.
        gain: what is saved where both ends are in one group.
    """

    group_R: np.ndarray
    gain: float

    @property
    def num_groups(self) -> int:
        return int(self.group_R.max()) + 1

    @property
    def is_even(self) -> bool:
        """Whether all groups have as many ranks."""
        return len(set(np.bincount(self.group_R).tolist())) == 1


def ultrametric(distance_RR: np.ndarray) -> np.ndarray:
    """The greatest ultrametric that exceeds the distances nowhere: the lowest pass between ranks.

    Flat and two-level distances are ultrametrics, and are their own.
    """
    pass_RR = distance_RR.copy()
    for rank in range(len(pass_RR)):
        pass_RR = np.minimum(pass_RR, np.maximum(pass_RR[:, rank, None], pass_RR[None, rank, :]))
    return pass_RR


def levels(ultrametric_RR: np.ndarray) -> list[Level]:
    """Levels whose gains, summed over those that part two ranks, are their distance."""
    values = np.unique(ultrametric_RR)
    found = []
    for value, above in pairwise(values):
        leader_R = (ultrametric_RR <= value).argmax(1)
        group_R = np.unique(leader_R, return_inverse=True)[1].astype(np.int64)
        found.append(Level(group_R, float(above - value)))
    return found
