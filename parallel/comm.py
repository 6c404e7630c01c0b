"""Messages between the ranks of a group, and one differentiable exchange of rows.

R ranks of the group, M rows in all, D their width. The ranks stand in a ring: in step j every rank
sends to the rank j places after it and receives from the rank j places before it, so that each
step uses every link once; step 0 is the rank itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.phases import event


class Tag(IntEnum):
    """Kinds of messages that may be in flight at once between the same two ranks."""

    ROWS = 1
    LABELS = 2
    WEIGHTS = 3
    GRADIENTS = 4


@dataclass(frozen=True)
class Ring:
    """Peers of this rank by step: nodes in a ring, and the ranks of every node in a ring.

    Attributes:
        to_J, from_J: rank to which this one sends and from which it receives in step j. Ranks on
            nodes farther away come in later steps, per_node of them for each node.
        per_node: ranks on a node; all ranks if nodes are uneven.
    """

    group: dist.ProcessGroup
    to_J: tuple[int, ...]
    from_J: tuple[int, ...]
    per_node: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, node_of_R: Sequence[int] | None = None) -> Ring:
        """The ring of a group whose ranks lie on the given nodes; default: all on one."""
        me, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        per_node = num_ranks
        if node_of_R is not None:
            first = [r for r in range(num_ranks) if node_of_R[r] == node_of_R[0]]
            even = num_ranks % len(first) == 0 and all(
                (r // len(first) == s // len(first)) == (node_of_R[r] == node_of_R[s])
                for r in range(num_ranks)
                for s in range(num_ranks)
            )
            per_node = len(first) if even else num_ranks
        num_nodes = num_ranks // per_node
        node, place = divmod(me, per_node)
        steps = [divmod(step, per_node) for step in range(num_ranks)]
        return cls(
            group,
            tuple((node + n) % num_nodes * per_node + (place + p) % per_node for n, p in steps),
            tuple((node - n) % num_nodes * per_node + (place - p) % per_node for n, p in steps),
            per_node,
        )

    @property
    def num_ranks(self) -> int:
        return len(self.to_J)

    @property
    def rank(self) -> int:
        return self.to_J[0]


Message = tuple[int, Tensor]  # (peer, what is sent or where it is received)


def post(
    sends: Sequence[Message], receives: Sequence[Message], group: dist.ProcessGroup, tag: Tag
) -> list[Any]:
    """Start messages between pairs of ranks; wait for every result before touching the tensors.

    On gloo every receive is posted before the first send, which lets both directions of a link
    work at once (its collectives do not). On other backends they start as one group.
    """
    if dist.get_backend(group) == "gloo":
        works = [dist.irecv(t, group=group, group_src=peer, tag=tag) for peer, t in receives]
        return works + [dist.isend(t, group=group, group_dst=peer, tag=tag) for peer, t in sends]
    operations = [dist.P2POp(dist.irecv, t, group=group, group_peer=peer) for peer, t in receives]
    operations += [dist.P2POp(dist.isend, t, group=group, group_peer=peer) for peer, t in sends]
    return dist.batch_isend_irecv(operations) if operations else []


class Exchange:
    """Rows from every rank to every other one, in the given steps of the ring; reversible.

    Args:
        steps: of the ring. send_J, receive_J: rows for and from the peer of each of these steps.
    """

    def __init__(
        self,
        ring: Ring,
        steps: Sequence[int],
        send_J: Sequence[int],
        receive_J: Sequence[int],
        tag: Tag = Tag.ROWS,
    ) -> None:
        self.ring, self.steps, self.tag = ring, steps, tag
        self.send_J, self.receive_J = list(send_J), list(receive_J)
        self._works: list[Any] = []
        self._flying: tuple[Tensor, Tensor] | None = None  # what is sent, where it is received

    @property
    def sent_within(self) -> int:
        """Rows that leave this rank for others of its node."""
        near = range(1, self.ring.per_node)
        return sum(n for step, n in zip(self.steps, self.send_J, strict=True) if step in near)

    @property
    def sent_across(self) -> int:
        """Rows that leave this rank for other nodes."""
        pairs = zip(self.steps, self.send_J, strict=True)
        return sum(n for step, n in pairs if step >= self.ring.per_node)

    def start(self, x_MD: Tensor, *, back: bool = False) -> None:
        """Set rows out, ordered by step.

        Args:
            back: the other way, from the receivers to the senders.
        """
        assert self._flying is None, "this exchange is in flight already"
        sizes = (self.receive_J, self.send_J) if back else (self.send_J, self.receive_J)
        peers = (self.ring.from_J, self.ring.to_J) if back else (self.ring.to_J, self.ring.from_J)
        x_MD = x_MD.contiguous()
        out_MD = x_MD.new_empty(sum(sizes[1]), *x_MD.shape[1:])
        outbox, inbox = x_MD.split(sizes[0]), out_MD.split(sizes[1])
        sends, receives = [], []
        for place, step in enumerate(self.steps):
            if step == 0:
                inbox[place].copy_(outbox[place])
                continue
            if len(outbox[place]):
                sends.append((peers[0][step], outbox[place]))
            if len(inbox[place]):
                receives.append((peers[1][step], inbox[place]))
        with event(f"set out {self.tag.name.lower()}"):
            self._works = post(sends, receives, self.ring.group, self.tag)
        self._flying = x_MD, out_MD

    def land(self) -> Tensor:
        """The rows that came here, by step, once they are here."""
        assert self._flying is not None, "nothing was set out"
        with event(f"wait for {self.tag.name.lower()}"):
            for work in self._works:
                work.wait()
        _, out_MD = self._flying
        self._works, self._flying = [], None
        return out_MD

    def now(self, x_MD: Tensor, *, back: bool = False) -> Tensor:
        """`start` and `land`."""
        self.start(x_MD, back=back)
        return self.land()


def depart(x_MD: Tensor, exchange: Exchange, *, back: bool = False) -> Tensor:
    """Set rows out; differentiable. Returns a ticket for `arrive`, without the rows."""
    return _Depart.apply(x_MD, exchange, back)


def arrive(ticket: Tensor, exchange: Exchange, *, back: bool = False) -> Tensor:
    """The rows of `depart` once they are here; differentiable: gradients fly the other way."""
    return _Arrive.apply(ticket, exchange, back)


def travel(x_MD: Tensor, exchange: Exchange, *, back: bool = False) -> Tensor:
    """`depart` and `arrive` at once."""
    return arrive(depart(x_MD, exchange, back=back), exchange, back=back)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, exchange: Exchange, back: bool) -> Tensor:
        ctx.exchange = exchange
        exchange.start(x_MD, back=back)
        return x_MD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.land(), None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: Exchange, back: bool) -> Tensor:
        ctx.exchange, ctx.back = exchange, back
        return exchange.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.exchange.start(grads[0], back=not ctx.back)
        return grads[0].new_zeros(()), None, None
