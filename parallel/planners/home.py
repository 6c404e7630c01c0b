"""Standard expert parallelism: the home computes all rows of its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.plan import DispatchPlan


def home_plan(counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
    """Standard expert parallelism: every row is computed at its expert's home.

    Args:
        counts_RE: int64 [R, E] rows per source rank and expert.
        home_E: int64 [E] home rank per expert.
    """
    num_ranks, num_experts = counts_RE.shape
    expert, source = counts_RE.T.nonzero(as_tuple=True)
    rows = torch.stack([expert, source, home_E[expert], counts_RE[source, expert]], dim=1)
    return DispatchPlan(rows, torch.empty(0, 3, dtype=torch.int64), num_ranks, num_experts)
