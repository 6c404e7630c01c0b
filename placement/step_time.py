"""How long the parts of a layer take on described links and ranks, and their sum over a step.

L MoE layers, R ranks. Every part takes as long as its busiest rank or link. `objective.Cost`
differs on purpose: its traffic_s is the mean rank's time, which solvers can minimise; here the
slowest counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.objective import ExpertShape, journeys, row_operations
from placement.topology import GIGABIT, Topology

PLACE_BYTES, MARK_BYTES, GRADIENT_BYTES = 4, 8, 4  # of a row, of a copy to a node, per parameter
MESSAGES = 7  # that wait for each other: counts; labels, tokens and sums, and their gradients
MESSAGES_TWO_LEVEL = 2  # more: how many copies come to a node, and for which ranks
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Simulation:
    """A mean optimizer step of those simulated; seconds and bytes are of all MoE layers.

    Attributes:
        seconds: exchange_s + compute_s + borrow_s + latency_s.
        exchange_s: tokens and labels on their way, both ways, forward and backward.
        compute_s: products of the busiest ranks. borrow_s: weights there, fp32 gradients back.
        latency_s: of messages that wait for each other.
        steps: simulated. tokens: of all ranks in a step.
        rows_local, rows_intra, rows_inter: copies of tokens that, on their way out, stay on their
            rank, stay on their node, and cross nodes.
        bytes_intra, bytes_inter: that links carry within and across nodes: tokens, labels, experts.
        borrowed: experts fetched, over all layers.
        load_ratio, load_ratio_home: max/mean rows per rank as planned, and if every row were
            computed at home: means over layers and micro-batches.
        load_LR, load_home_LR: rows per layer and rank, as planned and at home.
        sends_RR: copies on their way out by sender and receiver, over all layers.
    """

    seconds: float
    exchange_s: float
    compute_s: float
    borrow_s: float
    latency_s: float
    steps: int
    tokens: float
    rows_local: float
    rows_intra: float
    rows_inter: float
    bytes_intra: float
    bytes_inter: float
    borrowed: float
    load_ratio: float
    load_ratio_home: float
    load_LR: Floats
    load_home_LR: Floats
    sends_RR: Floats


def link_seconds(bytes_RR: Floats, topology: Topology) -> tuple[Floats, Floats]:
    """Time of the busiest rank or link within nodes and across them, for bytes sent at once.

    Links work both ways at once, so what counts is the most that one rank sends or receives,
    within its node and to all others; across nodes also what a node's shared link carries.

    Args:
        bytes_RR: float64 [..., R, R] by sender and receiver.

    Returns:
        Two of float64 [...].
    """
    node_R = np.array(topology.node_of_R)
    same_RR = node_R[:, None] == node_R
    seconds_RR = bytes_RR / topology.bytes_per_s_RR()
    within = _busiest(np.where(same_RR, seconds_RR, 0))
    across = _busiest(np.where(same_RR, 0, seconds_RR))
    if topology.node_gbps is not None:
        in_node_RN = np.eye(topology.num_nodes)[node_R]
        between_NN = in_node_RN.T @ np.where(same_RR, 0, bytes_RR) @ in_node_RN
        across = np.maximum(across, _busiest(between_NN) / (topology.node_gbps * GIGABIT))
    return within, across


def exchange_seconds(bytes_RR: Floats, topology: Topology, two_level: bool = False) -> Floats:
    """Time of one exchange, float64 [...]: all links at once; with two levels across, then within.

    Two levels take rather less where different ranks hold up the two: each goes on by itself.

    Args:
        bytes_RR: float64 [..., R, R] by sender and receiver.
    """
    within, across = link_seconds(bytes_RR, topology)
    return within + across if two_level else np.maximum(within, across)


def _busiest(amount_XX: Floats) -> Floats:
    """The most that one of them sends or receives."""
    return np.maximum(amount_XX.sum(-1).max(-1), amount_XX.sum(-2).max(-1))


class Tally:
    """Adds up layers, micro-batches and steps."""

    def __init__(
        self, num_layers: int, topology: Topology, shape: ExpertShape, two_level: bool
    ) -> None:
        self.topology, self.shape = topology, shape
        self.two_level = two_level and topology.num_nodes > 1
        self.seconds_per_row_R = row_operations(shape, "home") / topology.flops_per_s_R()
        num_ranks = topology.num_ranks
        self.total: dict[str, Any] = dict.fromkeys(
            ("exchange_s", "compute_s", "borrow_s", "latency_s", "tokens", "borrowed"), 0.0
        )
        self.total |= {n: np.zeros((num_layers, num_ranks)) for n in ("load_LR", "load_home_LR")}
        self.total |= {name: np.zeros((num_ranks, num_ranks)) for name in ("sends_RR", "bytes_RR")}
        self.ratios: list[tuple[float, float]] = []
        self.steps = 0
        self.held: set[tuple[int, int, int]] = set()  # layer, expert, borrower

    def add(
        self, layer: int, plan: Any, rows_RR: Floats, sends_RR: Floats, load_home_R: Floats
    ) -> None:
        """One layer of one micro-batch: rows by source and computing rank, copies under way."""
        load_R, total = rows_RR.sum(0), self.total
        self.ratios.append((_ratio(load_R), _ratio(load_home_R)))
        total["load_LR"][layer] += load_R
        total["load_home_LR"][layer] += load_home_R
        total["sends_RR"] += sends_RR
        total["compute_s"] += float((load_R * self.seconds_per_row_R).max())
        self._exchange(rows_RR, sends_RR)
        messages = MESSAGES + MESSAGES_TWO_LEVEL * self.two_level + self._borrow(layer, plan)
        across = self.topology.num_nodes > 1
        total["latency_s"] += messages * across * self.topology.latency_us * 1e-6

    def end_step(self, tokens: int) -> None:
        self.steps += 1
        self.total["tokens"] += tokens
        self.held.clear()

    def mean(self) -> Simulation:
        mean = {name: value / self.steps for name, value in self.total.items()}
        node_R, bytes_RR = np.array(self.topology.node_of_R), mean.pop("bytes_RR")
        same_RR, sends_RR = node_R[:, None] == node_R, mean["sends_RR"]
        local = float(np.trace(sends_RR))
        load_ratio, load_ratio_home = np.mean(self.ratios, axis=0).tolist()
        return Simulation(
            seconds=sum(mean[f"{part}_s"] for part in ("exchange", "compute", "borrow", "latency")),
            steps=self.steps,
            rows_local=local,
            rows_intra=float(sends_RR[same_RR].sum()) - local,
            rows_inter=float(sends_RR[~same_RR].sum()),
            bytes_intra=float(bytes_RR[same_RR].sum()),
            bytes_inter=float(bytes_RR[~same_RR].sum()),
            load_ratio=load_ratio,
            load_ratio_home=load_ratio_home,
            **mean,
        )

    def _exchange(self, rows_RR: Floats, sends_RR: Floats) -> None:
        """Copies four times; of labels there places and weights, back gradients of weights."""
        topology, value = self.topology, self.shape.bytes_per_value
        copies_RR = _off_diagonal(sends_RR) * self.shape.row_bytes
        labels_RR = _off_diagonal(rows_RR) * (PLACE_BYTES + 2 * value)
        if self.two_level:
            node_R = np.array(topology.node_of_R)
            labels_RR += np.where(node_R[:, None] != node_R, sends_RR, 0) * MARK_BYTES
        times = journeys("home")
        seconds = times * exchange_seconds(copies_RR, topology, self.two_level)
        self.total["exchange_s"] += float(seconds + exchange_seconds(labels_RR, topology))
        self.total["bytes_RR"] += times * copies_RR + labels_RR

    def _borrow(self, layer: int, plan: Any) -> int:
        """What is borrowed and not here yet; returns the messages that wait for each other."""
        new = [
            (expert, home, borrower)
            for expert, home, borrower in plan.borrowed.tolist()
            if (layer, expert, borrower) not in self.held
        ]
        if not new:
            return 0
        if plan.keep:
            self.held |= {(layer, expert, borrower) for expert, _, borrower in new}
        num_bytes = self.shape.parameters * (self.shape.bytes_per_value + GRADIENT_BYTES)
        for hops_RR in expert_hops(new, self.topology.node_of_R):
            self.total["borrow_s"] += float(exchange_seconds(hops_RR * num_bytes, self.topology))
            self.total["bytes_RR"] += hops_RR * num_bytes
        self.total["borrowed"] += len(new)
        return 2


def expert_hops(borrowed: Sequence[tuple[int, int, int]], node_of_R: Sequence[int]) -> list[Floats]:
    """Experts sent from rank to rank, [R, R]: from home, then from a node's first borrower there.

    An expert travels to another node once, and is handed on within it.
    """
    first_RR, second_RR = np.zeros((2, len(node_of_R), len(node_of_R)))
    relays: dict[tuple[int, int], int] = {}
    for expert, home, borrower in borrowed:
        node = node_of_R[borrower]
        relay = relays.setdefault((expert, node), borrower)
        if node == node_of_R[home] or relay == borrower:
            first_RR[home, borrower] += 1
        else:
            second_RR[relay, borrower] += 1
    return [first_RR, second_RR]


def _off_diagonal(amount_RR: Floats) -> Floats:
    return amount_RR * (1 - np.eye(len(amount_RR)))


def _ratio(load_R: Floats) -> float:
    return float(load_R.max() / load_R.mean()) if load_R.any() else 1.0
