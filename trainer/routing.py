"""What the routing of one optimizer step looked like: loads, balance, traffic."""

from __future__ import annotations

import torch

from parallel.decisions import Decision
from parallel.mesh import ParallelMesh
from trainer.metrics import Metric, load_ratio, max_violation

DIRECTIONS = 2  # a row travels to the rank that computes it, and its output back


def routing_metrics(
    decisions: list[Decision], mesh: ParallelMesh, row_bytes: int
) -> dict[str, Metric]:
    """Metrics of the decisions of one step on this rank, to be reduced over all ranks.

    `load_ratio` is max/mean rows per rank of an EP group, `max_violation` is max/mean - 1 rows
    per expert, both means over micro-batches and layers. Rows and bytes are those that this rank
    sends to other ranks, forward dispatch and combine.

    Args:
        row_bytes: of one row on its way, in the dtype of the computation.
    """
    nodes = torch.tensor(mesh.node_of_ep_ranks())
    me = mesh.ep_rank
    total = within = across = 0
    ratios, violations = [], []
    for decision in decisions:
        rows = decision.plan.rows
        ratios.append(load_ratio(decision.plan.load_R()))
        violations.append(max_violation(decision.counts_RE.sum(0)))
        mine = rows[rows[:, 1] == me]
        away = mine[mine[:, 2] != me]
        near = nodes[away[:, 2]] == nodes[me]
        total += int(mine[:, 3].sum())
        within += int(away[near, 3].sum())
        across += int(away[~near, 3].sum())
    return {
        "moe/load_ratio": Metric.mean(sum(ratios), len(ratios)),
        "moe/max_violation": Metric.mean(sum(violations), len(violations)),
        "moe/rows": Metric.sum(total),
        "moe/rows_crossing": Metric.sum(within + across),
        "moe/bytes_within_nodes": Metric.sum(within * row_bytes * DIRECTIONS),
        "moe/bytes_across_nodes": Metric.sum(across * row_bytes * DIRECTIONS),
    }
