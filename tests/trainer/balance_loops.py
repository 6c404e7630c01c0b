"""Balancing losses by loops over tokens and experts, in the order of their definitions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def probabilities(logits_TE: Tensor, sigmoid: bool = False) -> list[list[Tensor]]:
    rows = []
    for logits_E in logits_TE:
        values = [1 / (1 + (-x).exp()) if sigmoid else x.exp() for x in logits_E]
        rows.append([value / sum(values) for value in values])
    return rows


def row_counts(ids_TK: Tensor, num_experts: int) -> list[int]:
    chosen = ids_TK.flatten().tolist()
    return [sum(1 for one in chosen if one == expert) for expert in range(num_experts)]


def auxiliary(
    logits_TE: Tensor,
    ids_TK: Tensor,
    *,
    counts: list[int] | None = None,
    target: list[float] | None = None,
    sigmoid: bool = False,
) -> Any:
    """sum_i f_i P_i / t_i; counts: of more than these tokens."""
    num_experts = logits_TE.shape[1]
    counts = counts or row_counts(ids_TK, num_experts)
    target = target or [1.0] * num_experts
    rows = probabilities(logits_TE, sigmoid)
    total: Any = 0.0
    for expert in range(num_experts):
        share = counts[expert] / max(1, sum(counts))
        mean = sum(row[expert] for row in rows) / len(rows)
        total = total + share * mean / (target[expert] / sum(target))
    return total


def by_sequence(logits_TE: Tensor, ids_TK: Tensor, sequences: int, **options: Any) -> Any:
    length = len(logits_TE) // sequences
    values = []
    for number in range(sequences):
        part = slice(number * length, (number + 1) * length)
        values.append(auxiliary(logits_TE[part], ids_TK[part], **options))
    return sum(values) / sequences


def z(logits_TE: Tensor) -> Any:
    values = [sum(x.exp() for x in logits_E).log() ** 2 for logits_E in logits_TE]
    return sum(values) / len(values)


def moved_bias(
    bias_E: Tensor, counts_E: Tensor, rate: float, update: str = "sign", recentre: bool = False
) -> Tensor:
    """A selection bias after a step."""
    counts = counts_E.tolist()
    mean = sum(counts) / len(counts)
    moved = []
    for bias, count in zip(bias_E.flatten().tolist(), counts, strict=True):
        lack = mean - count
        sign = (lack > 0) - (lack < 0)
        moved.append(bias + rate * (sign if update == "sign" else lack / mean))
    middle = sum(moved) / len(moved) if recentre else 0.0
    return torch.tensor([bias - middle for bias in moved], dtype=torch.float64)
