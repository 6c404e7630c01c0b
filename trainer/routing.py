"""What the routing of one optimizer step looked like: loads, balance, plans, traffic."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.decisions import Collected
from parallel.mesh import ParallelMesh
from trainer.metrics import Metric, load_ratio, max_violation


def routing_metrics(
    collected: Collected, home_LE: Tensor, mesh: ParallelMesh, row_activation_bytes: int
) -> dict[str, Metric]:
    """Metrics of the decisions of one step on this rank, to be reduced over all ranks.

    `load_ratio` is max/mean rows per rank of an EP group as planned, `load_ratio_home` the same
    if every row were computed at its expert's home, `max_violation` max/mean - 1 rows per expert,
    `borrowed_experts` how many the ranks of an EP group borrow: means over micro-batches and
    layers. Rows and bytes are those that this rank sends to other ranks.

    Args:
        home_LE: home rank per layer and expert.
        row_activation_bytes: that a layer keeps for the backward pass of every row it computes.
    """
    me = mesh.ep_rank
    total = crossing = most = 0
    ratios, before, violations, borrowed, planner_s = [], [], [], [], 0.0
    for decision in collected.decisions:
        rows = decision.plan.rows
        load_R, load_E = decision.plan.load_R(), decision.counts_RE.sum(0)
        home_R = torch.zeros_like(load_R).index_add_(0, home_LE[decision.layer], load_E)
        ratios.append(load_ratio(load_R))
        before.append(load_ratio(home_R))
        violations.append(max_violation(load_E))
        borrowed.append(len(decision.plan.borrowed))
        planner_s += decision.planner_s
        most = max(most, int(load_R[me]))
        mine = rows[rows[:, 1] == me]
        total += int(mine[:, 3].sum())
        crossing += int(mine[mine[:, 2] != me, 3].sum())
    traffic = collected.traffic
    return {
        "moe/load_ratio": Metric.mean(sum(ratios), len(ratios)),
        "moe/load_ratio_home": Metric.mean(sum(before), len(before)),
        "moe/max_violation": Metric.mean(sum(violations), len(violations)),
        "moe/borrowed_experts": Metric.mean(sum(borrowed), len(borrowed)),
        "moe/planner_ms": Metric.mean(1e3 * planner_s, len(ratios)),
        "moe/activation_bytes": Metric.max(most * row_activation_bytes),
        "moe/rows": Metric.sum(total),
        "moe/rows_crossing": Metric.sum(crossing),
        "moe/bytes_within_nodes": Metric.sum(sum(t.rows_within for t in traffic)),
        "moe/bytes_across_nodes": Metric.sum(sum(t.rows_across for t in traffic)),
        "moe/expert_bytes_within_nodes": Metric.sum(sum(t.experts_within for t in traffic)),
        "moe/expert_bytes_across_nodes": Metric.sum(sum(t.experts_across for t in traffic)),
    }


class ValidationRouting:
    """Of the validation tokens: balance of experts, how much choices of a layer tell of the next
    one's, and how many changed since last time."""

    def __init__(self) -> None:
        self._before: Tensor | None = None

    def measure(
        self, routing: list[tuple[int, Tensor]], num_experts: int, mesh: ParallelMesh
    ) -> dict[str, float]:
        """Over all ranks.

        Args:
            routing: layer and expert ids [T, K] of every forward on this rank, in order.
        """
        layers = 1 + max(layer for layer, _ in routing)
        counts_LE = torch.zeros(layers, num_experts + 1, dtype=torch.int64)
        for layer, ids_TK in routing:
            counts_LE[layer] += torch.bincount(ids_TK.flatten(), minlength=num_experts + 1)
        pairs_LEE = torch.zeros(layers - 1, num_experts, num_experts, dtype=torch.int64)
        for (layer, ids_TK), (after, next_TK) in pairwise(routing):
            if after == layer + 1:
                pairs_LEE[layer] += pairs(ids_TK, next_TK, num_experts)
        now_TK = torch.cat([ids_TK for _, ids_TK in routing])
        is_expert_TK = now_TK < num_experts
        kept = []  # of the experts chosen now, how many were chosen before, too
        if self._before is not None:
            same_TK = (now_TK[:, :, None] == self._before[:, None]).any(2)
            kept = [(same_TK & is_expert_TK).sum()]
        parts = [
            counts_LE.flatten(),
            pairs_LEE.flatten(),
            torch.tensor([is_expert_TK.sum(), *kept]),
        ]
        total = torch.cat(parts).to(mesh.device)
        dist.all_reduce(total, group=mesh.dp_group)
        counts, found, _ = total.split([counts_LE.numel(), pairs_LEE.numel(), 1 + len(kept)])
        counts_LE = counts.view_as(counts_LE)[:, :num_experts].cpu()
        pairs_LEE = found.view_as(pairs_LEE)
        violations = [max_violation(counts_E) for counts_E in counts_LE]
        metrics = {
            "validation/max_violation": sum(violations) / layers,
            "validation/dead_experts": float((counts_LE == 0).sum()),
            "validation/rows": float(counts_LE.sum()),
        }
        if pairs_LEE.any():
            affinity = pairs_LEE.amax(2).sum() / pairs_LEE.sum()
            metrics["validation/affinity"] = float(affinity)
        if kept:
            metrics["validation/routing_change"] = 1 - float(total[-1]) / max(1.0, float(total[-2]))
        self._before = now_TK
        return metrics


def pairs(ids_TK: Tensor, next_TK: Tensor, num_experts: int) -> Tensor:
    """How often an expert and one of the next layer have the same token, int64 [E, E]."""
    here_TE, next_TE = (
        torch.zeros(len(ids), num_experts + 1, dtype=torch.float64).scatter_(1, ids.long(), 1.0)
        for ids in (ids_TK, next_TK)
    )
    return (here_TE.T @ next_TE)[:num_experts, :num_experts].long()
