"""A dispatch plan: which rank computes which rows of one layer of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """How the rows of one layer of one micro-batch are split over the ranks of an EP group.

    A source rank holds its rows of an expert in token order; consecutive segments of the same
    expert and source take consecutive rows.

    Attributes:
        rows: int64 [n, 4], segments (expert, source rank, computing rank, number of rows > 0),
            sorted by the first three, each triple once.
        borrowed: int64 [m, 3], (expert, home rank, borrowing rank), unique and sorted.
        num_ranks: R, ranks of the EP group. num_experts: E.
        keep: whether what is borrowed stays for the other micro-batches of the optimizer step.
    """

    rows: Tensor
    borrowed: Tensor
    num_ranks: int
    num_experts: int
    keep: bool = False

    def load_R(self) -> Tensor:
        """Rows computed by every rank, int64 [R]."""
        load_R = torch.zeros(self.num_ranks, dtype=torch.int64)
        return load_R.index_add_(0, self.rows[:, 2], self.rows[:, 3])

    def check(self, counts_RE: Tensor, home_E: Tensor) -> None:
        """Check that every row is computed exactly once, by a rank that has the expert.

        Args:
            counts_RE: int64 [R, E] rows per source rank and expert.
            home_E: int64 [E] home rank per expert.

        Raises:
            ValueError: naming the first expert, rank or segment that is off.
        """
        num_ranks, num_experts = self.num_ranks, self.num_experts
        if tuple(counts_RE.shape) != (num_ranks, num_experts):
            raise ValueError(
                f"plan is for {num_ranks} ranks x {num_experts} experts, "
                f"counts are {tuple(counts_RE.shape)}"
            )
        for name, table, bounds in (
            ("rows", self.rows, (num_experts, num_ranks, num_ranks)),
            ("borrowed", self.borrowed, (num_experts, num_ranks, num_ranks)),
        ):
            keys = table[:, :3]
            for column, bound in enumerate(bounds):
                outside = (keys[:, column] < 0) | (keys[:, column] >= bound)
                if bool(outside.any()):
                    raise ValueError(
                        f"plan.{name}: {table[outside][0].tolist()} is outside the "
                        f"{num_experts} experts or {num_ranks} ranks"
                    )
            flat = (keys[:, 0] * num_ranks + keys[:, 1]) * num_ranks + keys[:, 2]
            unsorted = (flat[1:] <= flat[:-1]).nonzero().flatten()
            if len(unsorted):
                raise ValueError(
                    f"plan.{name} is not sorted and unique at {table[unsorted[0] + 1].tolist()}"
                )
        if bool((self.rows[:, 3] <= 0).any()):
            segment = self.rows[self.rows[:, 3] <= 0][0]
            raise ValueError(f"plan.rows: {segment.tolist()} has no rows; leave it out")
        planned_RE = torch.zeros_like(counts_RE)
        planned_RE.index_put_((self.rows[:, 1], self.rows[:, 0]), self.rows[:, 3], accumulate=True)
        if bool((planned_RE != counts_RE).any()):
            rank, expert = (planned_RE != counts_RE).nonzero()[0].tolist()
            raise ValueError(
                f"plan computes {int(planned_RE[rank, expert])} of {int(counts_RE[rank, expert])} "
                f"rows of expert {expert} from rank {rank}"
            )
        wrong_home = self.borrowed[:, 1] != home_E[self.borrowed[:, 0]]
        if bool(wrong_home.any()):
            expert, rank, _ = self.borrowed[wrong_home][0].tolist()
            raise ValueError(
                f"plan.borrowed: expert {expert} lives on {int(home_E[expert])}, not {rank}"
            )
        if bool((self.borrowed[:, 1] == self.borrowed[:, 2]).any()):
            expert = int(self.borrowed[self.borrowed[:, 1] == self.borrowed[:, 2]][0, 0])
            raise ValueError(f"plan.borrowed: expert {expert} is borrowed by its own home")
        has_RE = torch.zeros(num_ranks, num_experts, dtype=torch.bool)
        has_RE[home_E, torch.arange(num_experts)] = True
        has_RE[self.borrowed[:, 2], self.borrowed[:, 0]] = True
        without = ~has_RE[self.rows[:, 2], self.rows[:, 0]]
        if bool(without.any()):
            expert, _, rank, _ = self.rows[without][0].tolist()
            raise ValueError(f"plan.rows: rank {rank} computes expert {expert} without having it")


class Planner(Protocol):
    """A pure function from gathered counts to a plan, the same on every rank."""

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan: ...
