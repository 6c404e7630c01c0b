"""Partitions of points into clusters of equal size, at least cost.

n points, N clusters, D dimensions.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def balanced_assignment(cost_nN: Floats) -> Labels:
    """The cluster of every point, n/N points each, so that the sum of their costs is least.

    Every point starts at its cheapest cluster. Then, as long as a cluster has too many, one point
    goes from each cluster to the next on the cheapest way to one that has too few: successive
    shortest paths of a transportation problem, in memory of the costs alone. The linear
    assignment with every cluster repeated n/N times has the same cost, but needs n*n numbers.

    Raises:
        ValueError: if N does not divide n.
    """
    num_points, num_clusters = cost_nN.shape
    size, rest = divmod(num_points, num_clusters)
    if rest:
        raise ValueError(f"{num_points} points cannot be {num_clusters} clusters of one size")
    label_n = cost_nN.argmin(1)
    count_N = np.bincount(label_n, minlength=num_clusters)
    move_NN, point_NN = np.empty((num_clusters,) * 2), np.empty((num_clusters,) * 2, int)
    stale = set(range(num_clusters))
    while count_N.max() > size:
        for cluster in stale:
            move_NN[cluster], point_NN[cluster] = _cheapest_moves(cost_nN, label_n, cluster)
        path = _cheapest_path(move_NN, count_N, size)
        moved = [point_NN[here, there] for here, there in pairwise(path)]
        label_n[moved] = path[1:]
        count_N[path[0]] -= 1
        count_N[path[-1]] += 1
        stale = set(path)
    return label_n


def _cheapest_moves(cost_nN: Floats, label_n: Labels, cluster: int) -> tuple[Floats, Labels]:
    """What the cheapest move of a point from a cluster to every other costs, and which it is."""
    members = np.flatnonzero(label_n == cluster)
    num_clusters = cost_nN.shape[1]
    if not len(members):
        return np.full(num_clusters, np.inf), np.zeros(num_clusters, int)
    extra = cost_nN[members] - cost_nN[members, cluster, None]
    best = extra.argmin(0)
    return extra[best, np.arange(num_clusters)], members[best]


def _cheapest_path(move_NN: Floats, count_N: Labels, size: int) -> list[int]:
    """Clusters from one with too many points to one with too few."""
    distance = np.where(count_N > size, 0.0, np.inf)
    before = np.full(len(count_N), -1)
    for _ in count_N:
        through = distance[:, None] + move_NN
        best = through.argmin(0)
        shorter = through[best, np.arange(len(best))] < distance - 1e-12
        shorter &= count_N <= size  # a way begins at the last of such clusters
        if not shorter.any():
            break
        distance = np.where(shorter, through[best, np.arange(len(best))], distance)
        before = np.where(shorter, best, before)
    path = [int(np.where(count_N < size, distance, np.inf).argmin())]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]


def balanced_kmeans(points_nD: Floats, seeds: Labels, rounds: int) -> Labels:
    """Clusters of equal size around their means, by squared distance.

    Args:
        seeds: [N] points around which the clusters form first. rounds: at most.
    """
    centre_ND = points_nD[seeds]
    label_n = np.full(len(points_nD), -1)
    for _ in range(rounds):
        # the points' own squares are the same for every cluster
        found_n = balanced_assignment((centre_ND**2).sum(1) - 2 * points_nD @ centre_ND.T)
        if (found_n == label_n).all():
            break
        label_n = found_n
        centre_ND = np.stack([points_nD[label_n == c].mean(0) for c in range(len(seeds))])
    return label_n
