"""Borrowed experts: their weights come from home, their gradients go back, summed in fp32.

An expert travels as one contiguous message, all of its parameters one after the other. To another
node it travels once: the first borrower there hands it on, and adds up the gradients on the way
back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.comm import Ring, Tag, post
from parallel.phases import event

ALIGNMENT = 16  # elements: where a parameter starts in a message, for grouped products on GPUs


class Hop(NamedTuple):
    """One message: an expert from rank to rank."""

    expert: int
    source: int
    destination: int


def hops(
    borrowed: Iterable[Sequence[int]], node_of_R: Sequence[int]
) -> tuple[list[Hop], list[Hop]]:
    """Ways of borrowed experts: from home, then from a node's first borrower to the others there.

    Args:
        borrowed: (expert, home, borrower), sorted. node_of_R: node of every rank.
    """
    first: list[Hop] = []
    second: list[Hop] = []
    relays: dict[tuple[int, int], int] = {}
    for expert, home, borrower in borrowed:
        node = node_of_R[borrower]
        if node == node_of_R[home] or (expert, node) not in relays:
            relays.setdefault((expert, node), borrower)
            first.append(Hop(expert, home, borrower))
        else:
            second.append(Hop(expert, relays[expert, node], borrower))
    return first, second


def rounds_home(first: list[Hop], second: list[Hop]) -> list[list[Hop]]:
    """The way of the gradients, in rounds in which every rank receives at most one message."""
    rounds: list[list[Hop]] = []
    for there in (second, first):
        start, received = len(rounds), Counter[int]()
        for expert, source, destination in there:
            number = start + received[source]
            received[source] += 1
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(Hop(expert, destination, source))
    return rounds


@dataclass(frozen=True)
class Layout:
    """Where the parameters of one expert lie in its message.

    Attributes:
        shapes: of each parameter of one expert, by name. starts: in elements. size: of a message.
    """

    shapes: dict[str, tuple[int, ...]]
    starts: dict[str, int]
    size: int

    @classmethod
    def of(cls, stacks: Mapping[str, Tensor]) -> Layout:
        """The layout of the experts in stacks [S, ...]."""
        shapes = {name: tuple(stack.shape[1:]) for name, stack in stacks.items()}
        starts, size = {}, 0
        for name, shape in shapes.items():
            starts[name] = size
            size += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
        return cls(shapes, starts, size)

    def stack(self, messages: Tensor, name: str) -> Tensor:
        """One parameter of all experts in messages [n, size], as a view [n, ...]."""
        shape, start = self.shapes[name], self.starts[name]
        return messages[:, start : start + prod(shape)].view(len(messages), *shape)

    def pack(self, stacks: Mapping[str, Tensor], slot: int) -> Tensor:
        """The message [size] of one expert of stacks [S, ...]."""
        message = next(iter(stacks.values())).new_empty(1, self.size)
        for name, stack in stacks.items():
            self.stack(message, name)[0].copy_(stack[slot])
        return message[0]


class Loan:
    """Experts of one layer that the ranks of a group lend each other, and their gradients.

    Every rank of the group holds the loan and makes the same calls in the same order.

    Args:
        borrowed: (expert, home, borrower) over the whole group, sorted.
        slots: native slot of every expert at home here. stacks: the native stacks by name.
        ring: of the group. node_of_R: node of every rank.
        keep: whether gradients wait for `return_gradients` at the end of the optimizer step.
        on_return: told when the gradients have set out, if somebody else collects them.
    """

    def __init__(
        self,
        borrowed: list[tuple[int, int, int]],
        slots: Mapping[int, int],
        stacks: Mapping[str, Tensor],
        ring: Ring,
        node_of_R: Sequence[int],
        *,
        keep: bool = False,
        on_return: Callable[[Loan], None] = lambda loan: None,
    ) -> None:
        self.borrowed, self.slots, self.ring = borrowed, slots, ring
        self.keep, self.on_return, self.node_of_R = keep, on_return, node_of_R
        self.experts = [expert for expert, _, borrower in borrowed if borrower == ring.rank]
        self.first, self.second = hops(borrowed, node_of_R)
        self.layout = Layout.of(stacks)
        self.trainable = Layout.of({n: stack for n, stack in stacks.items() if stack.requires_grad})
        any_stack = next(iter(stacks.values()))
        self.dtype, self.device = any_stack.dtype, any_stack.device
        self.uses = 0  # products whose gradients are still to come
        self.returned = False
        self._fetching = False
        self._place = {expert: place for place, expert in enumerate(self.experts)}
        self._weights: Tensor | None = None
        self._gradients: Tensor | None = None
        self._inbox: Tensor | None = None
        self._rounds: list[list[Hop]] = []
        self._works: list[Any] = []
        self._sent: list[Tensor] = []

    def bytes_sent(self, fetches: int = 1) -> tuple[int, int]:
        """Bytes of weights and gradients that this rank sends, within its node and across."""
        me, node_of_R = self.ring.rank, self.node_of_R
        wide = torch.promote_types(self.dtype, torch.float32).itemsize
        sent = [0, 0]
        for _, source, destination in [*self.first, *self.second]:
            across = int(node_of_R[source] != node_of_R[destination])
            if source == me:
                sent[across] += fetches * self.layout.size * self.dtype.itemsize
            if destination == me:
                sent[across] += self.trainable.size * wide
        return sent[0], sent[1]

    def start_fetch(self, stacks: Mapping[str, Tensor]) -> bool:
        """Set the weights out; False if they are here already."""
        if self._weights is not None:
            return False
        self._weights = self._new(len(self.experts), self.layout.size, self.dtype)
        self._fetching = True
        with torch.no_grad(), event("lend"):
            me = self.ring.rank
            lent = {hop.expert for hop in self.first if hop.source == me}
            packed = {e: self.layout.pack(stacks, self.slots[e]) for e in sorted(lent)}
            self._post(self.first, packed, self._weights, Tag.WEIGHTS)
        self._sent = list(packed.values())  # alive until they are sent
        return True

    def stack(self, name: str) -> Tensor:
        """One parameter of the experts borrowed by this rank, [n, ...]; waits until it is here."""
        self._finish_fetch()
        assert self._weights is not None, "the weights were dropped"
        return self.layout.stack(self._weights, name)

    def drop_weights(self) -> None:
        """Free the memory of the weights; `start_fetch` brings them again."""
        self._finish_fetch()
        self._weights = None

    def gradient(self, name: str) -> Tensor | None:
        """Where gradients of one parameter are added up, [n, ...]; None if it is frozen."""
        if name not in self.trainable.shapes:
            return None
        if self._gradients is None:
            dtype = torch.promote_types(self.dtype, torch.float32)
            self._gradients = self._new(len(self.experts), self.trainable.size, dtype).zero_()
        return self.trainable.stack(self._gradients, name)

    def used(self) -> None:
        """Called when a product has added its gradients; after the last one they set out."""
        self.uses -= 1
        if self.uses == 0 and not self.keep:
            self.return_gradients()

    def return_gradients(self) -> None:
        """Set the gradients out, for `collect` to add up at home; the weights are done with."""
        self.drop_weights()
        self.returned = True
        if not self.trainable.size:
            return
        self.on_return(self)
        self.gradient(next(iter(self.trainable.shapes)))  # ranks without rows send zeros
        self._rounds = rounds_home(self.first, self.second)
        self._start_round()

    def collect(self) -> dict[int, dict[str, Tensor]]:
        """Sums of the returned gradients of experts at home here, by native slot and parameter."""
        totals: dict[int, Tensor] = {}
        while self._rounds:
            with event("collect gradients"):
                self._wait()
                for expert, _, destination in self._rounds.pop(0):
                    if destination == self.ring.rank:
                        self._add(expert, totals)
                self._start_round()
        self._gradients = self._inbox = None
        return {
            self.slots[expert]: {
                name: self.trainable.stack(total, name)[0] for name in self.trainable.shapes
            }
            for expert, total in totals.items()
        }

    def _add(self, expert: int, totals: dict[int, Tensor]) -> None:
        """Add what came in to the total at home, or to what this rank sends there for its node."""
        assert self._inbox is not None and self._gradients is not None
        if expert not in self.slots:
            self._gradients[self._place[expert]] += self._inbox[0]
        elif expert in totals:
            totals[expert] += self._inbox
        else:
            totals[expert] = self._inbox.clone()

    def _start_round(self) -> None:
        if not self._rounds:
            return
        assert self._gradients is not None
        with event("return gradients"):
            if self._inbox is None:
                self._inbox = self._new(1, self.trainable.size, self._gradients.dtype)
            mine = {expert: self._gradients[place] for expert, place in self._place.items()}
            self._post(self._rounds[0], mine, self._inbox, Tag.GRADIENTS)

    def _finish_fetch(self) -> None:
        if not self._fetching:
            return
        assert self._weights is not None
        self._fetching = False
        with event("wait for borrowed weights"):
            self._wait()
            here = {expert: self._weights[place] for expert, place in self._place.items()}
            self._post(self.second, here, self._weights, Tag.WEIGHTS)
            self._wait()

    def _post(
        self, there: list[Hop], outbox: Mapping[int, Tensor], inbox: Tensor, tag: Tag
    ) -> None:
        """Start this rank's part of some hops; arrivals go to their places, or to the only one."""
        me = self.ring.rank
        sends = [(hop.destination, outbox[hop.expert]) for hop in there if hop.source == me]
        receives = [
            (hop.source, inbox[self._place[hop.expert] if tag is Tag.WEIGHTS else 0])
            for hop in there
            if hop.destination == me
        ]
        self._works = post(sends, receives, self.ring.group, tag)

    def _wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []

    def _new(self, number: int, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(number, size, dtype=dtype, device=self.device)
