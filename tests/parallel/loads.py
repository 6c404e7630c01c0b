"""Loads for planners: int64 counts_RE [R, E] in the shapes that routers produce, all seeded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def from_shares(share_E: np.ndarray, rows_R: np.ndarray, seed: int) -> Tensor:
    """Rows of every source drawn from the experts' shares."""
    generator = np.random.default_rng(seed)
    share_E = share_E / share_E.sum()
    return torch.from_numpy(np.stack([generator.multinomial(rows, share_E) for rows in rows_R]))


def dirichlet(
    num_experts: int, num_ranks: int, concentration: float, seed: int, rows: int = 4096
) -> Tensor:
    """Shares from a symmetric Dirichlet distribution: 0.1 is skewed, 10 nearly even."""
    generator = np.random.default_rng([seed, 1])
    share_E = generator.dirichlet(np.full(num_experts, concentration))
    return from_shares(share_E, np.full(num_ranks, rows), seed)


def zipf(num_experts: int, num_ranks: int, exponent: float, seed: int, rows: int = 4096) -> Tensor:
    """Shares that fall as a power of the popularity, experts in random order."""
    share_E = np.arange(1, num_experts + 1) ** -float(exponent)
    share_E = np.random.default_rng([seed, 1]).permutation(share_E)
    return from_shares(share_E, np.full(num_ranks, rows), seed)


def hot(
    num_experts: int,
    num_ranks: int,
    num_hot: int,
    percent: float,
    seed: int,
    rows: int = 4096,
    spread: bool = False,
) -> Tensor:
    """`percent` of the rows in `num_hot` experts: neighbours, or spread over all ids."""
    share_E = np.full(num_experts, (1 - percent / 100) / num_experts)
    generator = np.random.default_rng([seed, 1])
    if spread:
        chosen = generator.permutation(num_experts)[:num_hot]
    else:
        chosen = (generator.integers(num_experts) + np.arange(num_hot)) % num_experts
    share_E[chosen] += percent / 100 / num_hot
    return from_shares(share_E, np.full(num_ranks, rows), seed)


def uneven_sources(num_experts: int, num_ranks: int, seed: int, rows: int = 4096) -> Tensor:
    """Dirichlet shares that differ from source to source, and sources of unequal size."""
    generator = np.random.default_rng([seed, 2])
    share_RE = generator.dirichlet(np.full(num_experts, 0.3), size=num_ranks)
    rows_R = generator.integers(0, 2 * rows + 1, size=num_ranks)
    return torch.from_numpy(
        np.stack(
            [generator.multinomial(n, share) for n, share in zip(rows_R, share_RE, strict=True)]
        )
    )


def random_home(num_experts: int, num_ranks: int, seed: int) -> Tensor:
    """A home for every expert, equally many on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_experts, generator=generator) % num_ranks
