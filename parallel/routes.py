"""Ways of copies of tokens to the ranks that compute their rows, and of what they add up to home.

T tokens on this rank, U copies, N rows that leave, J steps of the ring of ranks (comm.py), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel.bags import Bags, expand, reduce
from parallel.comm import Exchange, arrive, depart


class Route(Protocol):
    """The way of one chunk's copies to this rank, and of their sums home again; differentiable."""

    @property
    def within(self) -> int:
        """Copies that this rank sends to other ranks of its node."""
        ...

    @property
    def across(self) -> int:
        """Copies that this rank sends to other nodes."""
        ...

    def out(self, x_TD: Tensor) -> Tensor:
        """Set this rank's copies out; returns a ticket for `arrive`."""
        ...

    def arrive(self, ticket: Tensor) -> Tensor:
        """The copies [U, D] that came to this rank."""
        ...

    def back(self, y_UD: Tensor) -> Tensor:
        """Set the sums of the copies that came here out; returns a ticket for `home`."""
        ...

    def home(self, ticket: Tensor) -> Tensor:
        """Sums by token of this rank, [T, D]."""
        ...


class Own:
    """Rows that a rank computes for itself: its tokens are there already."""

    within = across = 0

    def out(self, x_TD: Tensor) -> Tensor:
        return x_TD

    arrive = back = home = out


@dataclass(frozen=True)
class Direct:
    """Every copy straight to its rank.

    Attributes:
        home_bags: the token of every copy that leaves.
    """

    home_bags: Bags
    exchange: Exchange

    @property
    def within(self) -> int:
        return self.exchange.sent_within

    @property
    def across(self) -> int:
        return self.exchange.sent_across

    def out(self, x_TD: Tensor) -> Tensor:
        return depart(expand(x_TD, self.home_bags), self.exchange)

    def arrive(self, ticket: Tensor) -> Tensor:
        return arrive(ticket, self.exchange)

    def back(self, y_UD: Tensor) -> Tensor:
        return depart(y_UD, self.exchange, back=True)

    def home(self, ticket: Tensor) -> Tensor:
        return reduce(arrive(ticket, self.exchange, back=True), self.home_bags)


@dataclass(frozen=True)
class Copies:
    """Copies that leave this rank: one of a token for every step in which some row of it leaves.

    Attributes:
        sent_JT: bool, tokens that travel in each step. number_J: how many.
        place_N: of every row, the place of its copy among those of the same step, by token.
    """

    sent_JT: Tensor
    number_J: Tensor
    place_N: Tensor

    @classmethod
    def of(cls, token_N: Tensor, step_N: Tensor, num_tokens: int, num_steps: int) -> Copies:
        """Args: token and step of every row."""
        sent_JT = torch.zeros(num_steps, num_tokens, dtype=torch.bool, device=token_N.device)
        sent_JT[step_N, token_N] = True
        rank_JT = sent_JT.cumsum(1)
        number_J = rank_JT[:, -1] if num_tokens else rank_JT.sum(1)
        return cls(sent_JT, number_J, rank_JT[step_N, token_N] - 1)

    @property
    def num_tokens(self) -> int:
        return self.sent_JT.shape[1]

    def tokens(self, steps: range, total: int) -> Tensor:
        """Token of every copy of some steps, `total` of them, by step, then token."""
        some = self.sent_JT[steps.start : steps.stop]
        return torch.nonzero_static(some, size=total)[:, 1]
