"""What planners are given: the check of it, and what follows from the homes alone.

E experts, R ranks, S experts per rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Homes:
    """Where experts live, as numpy tables that planners read and never write.

    Attributes:
        home_E: int64 [E] home rank per expert.
        experts_RS: int64 [R, S] experts of every rank, ascending.
        grid: int64 [E * R, 4], (expert, source rank, 0, 0) of every pair in canonical order; one
            for all homes.
    """

    home_E: np.ndarray
    experts_RS: np.ndarray
    grid: np.ndarray


def check_inputs(counts_RE: Tensor, home_E: Tensor) -> tuple[np.ndarray, Homes]:
    """Check what a planner is given; counts as numpy and what follows from the homes.

    Args:
        counts_RE: int64 [R, E] rows per source rank and expert, on the CPU.
        home_E: int64 [E] home rank per expert, equally many experts on every rank.

    Raises:
        ValueError: naming the table that does not fit, or the rank, expert and number of rows.
    """
    if counts_RE.dtype != torch.int64 or counts_RE.ndim != 2 or not counts_RE.numel():
        raise ValueError(
            f"counts_RE ({counts_RE.dtype} {tuple(counts_RE.shape)}) must be int64 [ranks, experts]"
        )
    counts, homes = counts_RE.numpy(), home_E.numpy()
    num_ranks, num_experts = counts.shape
    if homes.dtype != np.int64 or homes.shape != (num_experts,):
        raise ValueError(
            f"home_E ({homes.dtype} {homes.shape}) must be int64 [{num_experts}], "
            f"the home of each expert of counts_RE"
        )
    if np.minimum.reduce(counts, axis=None) < 0:
        rank, expert = np.argwhere(counts < 0)[0]
        raise ValueError(
            f"counts_RE of rank {rank} and expert {expert} ({counts[rank, expert]}) must be >= 0"
        )
    return counts, _homes(homes.tobytes(), num_ranks)


def check_nodes(node_of_R: Sequence[int], num_ranks: int) -> None:
    """Raise a ValueError unless the nodes are of so many ranks."""
    if len(node_of_R) != num_ranks:
        raise ValueError(
            f"node_of_R names the nodes of {len(node_of_R)} ranks, counts_RE has {num_ranks}; "
            f"name the node of every rank"
        )


def row_limit(factor: float, total_rows: int, num_ranks: int) -> int:
    """So many times the mean rows per rank, rounded up; 1.1 times 10 is 11, as on paper."""
    return math.ceil(factor * total_rows / num_ranks * (1 - 1e-14))


@lru_cache(maxsize=1024)
def _homes(home_bytes: bytes, num_ranks: int) -> Homes:
    home_E = np.frombuffer(home_bytes, dtype=np.int64)
    num_experts = len(home_E)
    if home_E.min() < 0 or home_E.max() >= num_ranks:
        expert = int(np.argmax((home_E < 0) | (home_E >= num_ranks)))
        raise ValueError(
            f"home_E of expert {expert} ({home_E[expert]}) must be one of the ranks 0 to "
            f"{num_ranks - 1} of counts_RE"
        )
    num_R = np.bincount(home_E, minlength=num_ranks)
    if num_R.min() != num_R.max():
        rank = int(np.argmax(num_R * num_ranks != num_experts))
        raise ValueError(
            f"home_E gives rank {rank} {num_R[rank]} experts; every rank must have as many, "
            f"{num_experts} / {num_ranks}"
        )
    experts_RS = np.argsort(home_E, kind="stable").reshape(num_ranks, -1)
    experts_RS.flags.writeable = False
    return Homes(home_E, experts_RS, _grid(num_experts, num_ranks))


@lru_cache(maxsize=8)
def _grid(num_experts: int, num_ranks: int) -> np.ndarray:
    grid = np.zeros((num_experts, num_ranks, 4), dtype=np.int64)
    grid[..., 0] = np.arange(num_experts)[:, None]
    grid[..., 1] = np.arange(num_ranks)
    grid.flags.writeable = False
    return grid.reshape(-1, 4)
