"""Partitions of points into clusters of equal size.

n points, N clusters, D dimensions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.batches import assign_by_cost

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def balanced_kmeans(points_nD: Floats, seeds: Labels, rounds: int) -> Labels:
    """Clusters of equal size around their means, by squared distance.

    Args:
        seeds: [N] points around which the clusters form first. rounds: at most.
    """
    centre_ND = points_nD[seeds]
    label_n = np.full(len(points_nD), -1)
    for _ in range(rounds):
        # the points' own squares are the same for every cluster
        found_n = assign_by_cost((centre_ND**2).sum(1) - 2 * points_nD @ centre_ND.T)
        if (found_n == label_n).all():
            break
        label_n = found_n
        centre_ND = np.stack([points_nD[label_n == c].mean(0) for c in range(len(seeds))])
    return label_n
