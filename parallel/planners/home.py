"""Standard expert parallelism: the home computes all rows of its experts."""

from __future__ import annotations

from torch import Tensor

from parallel.plan import DispatchPlan
from parallel.planners.assemble import NOTHING_N3, assemble


def home_plan(counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
    """Standard expert parallelism: every row is computed at its expert's home.

    Args:
        counts_RE: int64 [R, E] rows per source rank and expert.
        home_E: int64 [E] home rank per expert.

    Raises:
        ValueError: for counts or homes that do not fit.
    """
    return assemble(counts_RE, home_E, NOTHING_N3)
