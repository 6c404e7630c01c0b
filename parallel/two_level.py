"""Dispatch over several nodes: a token crosses to a node once, however many ranks there want it.

T tokens, J steps of the ring, P ranks per node, U copies for ranks, V copies for nodes: a token's
copy goes to the rank at the sender's own place on the other node, which hands it on within the
node; what it adds up to comes back the same way, summed on the node first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.bags import Bags, expand, reduce
from parallel.comm import Exchange, Tag, arrive, depart, travel
from parallel.dispatch import Dispatcher, split_steps
from parallel.routes import Copies, Route

MAX_RANKS_PER_NODE = 63  # their marks are the bits of an int64


class TwoLevelDispatcher(Dispatcher):
    """A dispatcher that sends a token once per node over the slow links.

    Raises:
        ValueError: if the ranks of the group do not lie evenly on nodes, in order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        node_of_R: Sequence[int] | None = None,
        weights_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(group, num_experts, node_of_R, weights_group)
        self.num_nodes = len(set(self.node_of_R))
        if self.num_nodes * self.ring.per_node != self.num_ranks:
            raise ValueError(
                f"dispatcher: two levels need the ranks of an expert-parallel group spread evenly "
                f"over nodes, in order, but they lie on nodes {self.node_of_R}; choose a mesh.ep "
                f"that is a multiple or a divisor of the ranks per node, or the plain dispatcher"
            )
        if self.ring.per_node > MAX_RANKS_PER_NODE:
            raise ValueError(
                f"dispatcher: two levels take at most {MAX_RANKS_PER_NODE} ranks per node, got "
                f"{self.ring.per_node}; use the plain dispatcher"
            )

    def groups(self, num_chunks: int) -> list[range]:
        """As in the plain dispatcher, but the ranks of another node are never torn apart."""
        per_node = self.ring.per_node
        if num_chunks == 1 or self.num_ranks == 1:
            return [range(self.num_ranks)]
        near = [range(1), *([range(1, per_node)] if per_node > 1 else [])]
        far = split_steps(range(1, self.num_nodes), max(1, num_chunks - len(near)))
        return near + [range(part.start * per_node, part.stop * per_node) for part in far]

    def route(
        self, copies: Copies, steps: range, copies_J: Tensor, coming_J: Tensor
    ) -> tuple[Route, Tensor]:
        per_node = self.ring.per_node
        if steps.stop <= per_node:
            return super().route(copies, steps, copies_J, coming_J)
        num_nodes = len(steps) // per_node
        across = range(steps.start, steps.stop, per_node)  # to the same place on each node
        within = range(per_node)

        sent_NPT = copies.sent_JT[steps.start : steps.stop].view(num_nodes, per_node, -1)
        sent_NT = sent_NPT.any(1)
        send_N = sent_NT.sum(1)
        numbers = Exchange(self.ring, across, [1] * num_nodes, [1] * num_nodes, Tag.LABELS)
        send, receive = torch.stack([send_N, numbers.now(send_N)]).tolist()
        node, token_V = torch.nonzero_static(sent_NT, size=sum(send)).unbind(1)

        bit_P = 2 ** torch.arange(per_node, device=token_V.device)
        marks = Exchange(self.ring, across, send, receive, Tag.LABELS)
        marks_V = marks.now((sent_NPT[node, :, token_V] * bit_P).sum(1))
        wanted_PV = (marks_V & bit_P[:, None]) != 0  # which copies each rank of this node wants
        hand_on_P = wanted_PV.sum(1)
        copy_U = wanted_PV.nonzero()[:, 1]
        coming_NP = coming_J[steps.start : steps.stop].view(num_nodes, per_node)
        spread = Exchange(self.ring, within, hand_on_P.tolist(), coming_NP.sum(0).tolist())
        # copies arrive by the relay they come from, then by node
        start_PN = coming_NP.T.flatten().cumsum(0) - coming_NP.T.flatten()
        route = TwoLevel(
            Bags.of(token_V, copies.num_tokens),
            Exchange(self.ring, across, send, receive),
            Bags.of(copy_U, sum(receive)),
            spread,
        )
        return route, start_PN.view(per_node, num_nodes).T.flatten()


@dataclass(frozen=True)
class TwoLevel:
    """Copies to nodes, then to ranks.

    Attributes:
        home_bags: the token of every copy that leaves for a node. across_nodes: between nodes.
        relay_bags: the copy that came to this relay, of every copy that it hands on.
        spread: within the node.
    """

    home_bags: Bags
    across_nodes: Exchange
    relay_bags: Bags
    spread: Exchange

    @property
    def within(self) -> int:
        return self.spread.sent_within

    @property
    def across(self) -> int:
        return self.across_nodes.sent_across

    def out(self, x_TD: Tensor) -> Tensor:
        return depart(expand(x_TD, self.home_bags), self.across_nodes)

    def arrive(self, ticket: Tensor) -> Tensor:
        x_VD = arrive(ticket, self.across_nodes)
        return travel(expand(x_VD, self.relay_bags), self.spread)

    def back(self, y_UD: Tensor) -> Tensor:
        y_VD = reduce(travel(y_UD, self.spread, back=True), self.relay_bags)
        return depart(y_VD, self.across_nodes, back=True)

    def home(self, ticket: Tensor) -> Tensor:
        return reduce(arrive(ticket, self.across_nodes, back=True), self.home_bags)
