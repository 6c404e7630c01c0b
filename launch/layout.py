"""How the ranks of a job are arranged: nodes, expert-parallel groups, links."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import ClusterConfig

SHOWN = 4


@dataclass(frozen=True)
class Layout:
    """Ranks on nodes, and the EP groups that parallel/mesh.py makes of them: consecutive ranks.

    Attributes:
        ep: ranks of an EP group; None if it is not known before the model is.
    """

    nodes: int
    ranks_per_node: int
    ep: int | None

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def groups(self) -> list[range]:
        """The ranks of every EP group; empty if its size is not known."""
        if self.ep is None:
            return []
        return [range(first, first + self.ep) for first in range(0, self.num_ranks, self.ep)]

    def nodes_of(self, group: range) -> list[int]:
        """The nodes that a group's ranks are on."""
        return sorted({rank // self.ranks_per_node for rank in group})

    def most_nodes(self) -> int:
        """Nodes of the group that is on the most."""
        return max((len(self.nodes_of(group)) for group in self.groups()), default=1)

    def pairs_within(self) -> tuple[int, int]:
        """Pairs of ranks of one EP group, over all groups: those that share a node, and all."""
        node = self.ranks_per_node
        within = total = 0
        for group in self.groups():
            on = [sum(rank // node == at for rank in group) for at in self.nodes_of(group)]
            within += sum(math.comb(count, 2) for count in on)
            total += math.comb(len(group), 2)
        return within, total

    def lines(self, device: str, cluster: ClusterConfig) -> dict[str, str]:
        """Name and value of what a user should know of it."""
        size = f"{self.nodes} x {self.ranks_per_node} = {self.num_ranks}, on {device}"
        lines = {"nodes x ranks": size}
        if self.ep is None:
            return lines | {"EP": "known once the model is read"}
        groups = self.groups()
        lines["EP x EDP"] = f"{self.ep} x {len(groups)}"
        shown = [f"{group[0]}-{group[-1]}" for group in groups]
        if len(shown) > SHOWN:
            shown = [*shown[: SHOWN - 1], "...", shown[-1]]
        lines["EP groups"] = f"ranks {', '.join(shown)}"
        within, total = self.pairs_within()
        if total:
            classes = (
                (within, "within nodes", cluster.intra_gbps),
                (total - within, "between nodes", cluster.inter_gbps),
            )
            lines["pairs in groups"] = ", ".join(
                f"{pairs} of {total} {where}{_speed(gbps)}"
                for pairs, where, gbps in classes
                if pairs
            )
        return lines


def _speed(gbps: float | None) -> str:
    return "" if gbps is None else f" ({gbps:g} Gbit/s)"
