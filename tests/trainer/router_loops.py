"""Choices of routers by loops over tokens and experts, in the order of their definitions."""

from __future__ import annotations

import math
from itertools import permutations

from torch import Tensor

Rows = list[list[int]]


def best(scores: list[float], number: int, allowed: list[int] | None = None) -> list[int]:
    """Ids of the largest scores, largest first."""
    among = range(len(scores)) if allowed is None else allowed
    return sorted(among, key=lambda expert: (-scores[expert], expert))[:number]


def switch(scores_TE: Tensor, top_k: int, capacity: float, drop: str) -> Rows:
    """Rows in order of tokens, or of their scores; those beyond an expert's room become E."""
    scores, num_experts = scores_TE.tolist(), scores_TE.shape[1]
    chosen = [best(row, top_k) for row in scores]
    room = math.ceil(capacity * len(scores) * top_k / num_experts)
    order = [(token, place) for token in range(len(scores)) for place in range(top_k)]
    if drop == "score":
        order.sort(key=lambda at: -scores[at[0]][chosen[at[0]][at[1]]])
    taken = [0] * num_experts
    kept = [list(row) for row in chosen]
    for token, place in order:
        expert = chosen[token][place]
        if taken[expert] >= room:
            kept[token][place] = num_experts
        taken[expert] += 1
    return kept


def expert_choice(scores_TE: Tensor, top_k: int, capacity: float) -> Rows:
    """For every token, in the place of every expert, that expert or E."""
    scores, (num_tokens, num_experts) = scores_TE.tolist(), scores_TE.shape
    share = min(num_tokens, max(1, round(capacity * num_tokens * top_k / num_experts)))
    rows = [[num_experts] * num_experts for _ in range(num_tokens)]
    for expert in range(num_experts):
        for token in best([row[expert] for row in scores], share):
            rows[token][expert] = expert
    return rows


def by_groups(scores_TE: Tensor, groups: int, each: int) -> Rows:
    size = scores_TE.shape[1] // groups
    spans = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    return [
        [e for span in spans for e in best(scores, each, span)] for scores in scores_TE.tolist()
    ]


def group_limited(scores_TE: Tensor, top_k: int, groups: int, kept: int) -> Rows:
    size, rows = scores_TE.shape[1] // groups, []
    for scores in scores_TE.tolist():
        spans = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
        value = [sum(scores[e] for e in best(scores, 2, span)) for span in spans]
        allowed = [e for g in best(value, kept) for e in spans[g]]
        rows.append(best(scores, top_k, allowed))
    return rows


def top_p(scores_TE: Tensor, p: float, most: int) -> Rows:
    rows, num_experts = [], scores_TE.shape[1]
    for scores in scores_TE.tolist():
        row, total = [], 0.0
        for expert in best(scores, most):
            row.append(expert if total < p else num_experts)
            total += scores[expert]
        rows.append(row)
    return rows


def sinkhorn(scores_TE: Tensor, top_k: int, rounds: int, temperature: float) -> Rows:
    """Columns, then rows, are divided by their sums, round by round."""
    plan = [[score ** (1 / temperature) for score in row] for row in scores_TE.tolist()]
    for _ in range(rounds):
        sums = [sum(row[e] for row in plan) for e in range(len(plan[0]))]
        plan = [[value / total for value, total in zip(row, sums, strict=True)] for row in plan]
        plan = [[value / sum(row) for value in row] for row in plan]
    return [best(row, top_k) for row in plan]


def assigned_score(scores_TE: Tensor) -> float:
    """The largest sum of scores of an even assignment; by trying all."""
    scores, (num_tokens, num_experts) = scores_TE.tolist(), scores_TE.shape
    slots = [expert for expert in range(num_experts) for _ in range(num_tokens // num_experts)]
    return max(
        sum(scores[token][expert] for token, expert in enumerate(order))
        for order in set(permutations(slots))
    )
