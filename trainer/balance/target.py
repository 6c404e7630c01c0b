"""What part of a layer's rows every expert is to have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def check_target(stem: str, target: Sequence[float] | None) -> None:
    """Refuse targets that are no proportions.

    Raises:
        ValueError: naming key and value.
    """
    if target is not None and not all(0 < share < math.inf for share in target):
        raise ValueError(f"{stem}.target ({list(target)}) must be numbers > 0, one per expert")


def target_load(stem: str, target: Sequence[float] | None, block: nn.Module) -> Tensor:
    """Shares that sum to 1, float64 [E].

    Raises:
        ValueError: if they are not one per expert.
    """
    experts: Any = block.experts
    if target is None:
        target = [1.0] * experts.num_experts
    if len(target) != experts.num_experts:
        raise ValueError(
            f"{stem}.target has {len(target)} numbers, the model {experts.num_experts} experts "
            f"per layer; give one per expert"
        )
    target_E = torch.tensor(list(target), dtype=torch.float64)
    return target_E / target_E.sum()
