"""Sequences to ranks: a global batch is a set, so a sequence may go where its rows are computed.

S sequences, T tokens of a sequence, V token ids, R ranks, N nodes. Losses and gradients stay those
of the batch, whichever rank computes which sequence; only the order of summation differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import sparse

from placement.objective import Cost, trace_cost
from placement.preferences import Preferences
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace

INTER = 4.0  # a crossing between nodes against one within a node
WORTHWHILE = 0.02  # of the copies
NEVER = np.iinfo(np.int64).max // 4
Numbers = npt.NDArray[np.number]
Ints = npt.NDArray[np.int64]


def predicted_rows(token_ST: npt.NDArray[np.integer], rows_VR: Numbers) -> Numbers:
    """Rows that every sequence will have on every rank, [S, R], summed over its tokens.

    Args:
        rows_VR: rows of a token of each id on every rank (`Preferences.rows_per_rank`). Ids beyond
            the table have the mean of its rows. Whole numbers give whole numbers, the same on
            every machine.

    Raises:
        ValueError: for a negative token id, or an empty table.
    """
    num_sequences, num_ids = len(token_ST), len(rows_VR)
    if not num_ids:
        raise ValueError("rows_VR has no token ids; observe some routing first")
    if token_ST.size and token_ST.min() < 0:
        raise ValueError(f"token id ({token_ST.min()}) must be >= 0")
    known_ST = token_ST < num_ids
    starts = np.arange(num_sequences + 1) * token_ST.shape[1]
    column_ST = np.where(known_ST, token_ST, 0)
    entries = known_ST.astype(rows_VR.dtype).ravel(), column_ST.ravel(), starts
    rows_SR = sparse.csr_array(entries, (num_sequences, num_ids)) @ rows_VR
    if not known_ST.all():
        whole = np.issubdtype(rows_VR.dtype, np.integer)
        mean_R = rows_VR.sum(0) // num_ids if whole else rows_VR.mean(0)
        rows_SR += (~known_ST).sum(1)[:, None] * mean_R
    return rows_SR


def assign(
    rows_SR: Numbers, node_of_R: Sequence[int], *, intra: float = 1.0, inter: float = INTER
) -> Ints:
    """Rank of every sequence, int64 [S]: S/R each, at the least total cost of moving rows.

    A row costs 0 on the rank where it is computed, `intra` from another rank of its node, and
    `inter` from another node.

    Args:
        rows_SR: rows of every sequence on every rank. node_of_R: node of every rank.

    Raises:
        ValueError: if S is no multiple of R, or a cost is negative or smaller across nodes.
    """
    if not 0 <= intra <= inter < np.inf:
        raise ValueError(f"intra ({intra}) must be >= 0 and <= inter ({inter}), which is finite")
    node_R = np.array(node_of_R)
    in_node_RN = (node_R[:, None] == np.unique(node_R)).astype(rows_SR.dtype)
    of_node_SR = rows_SR @ in_node_RN @ in_node_RN.T
    # elementwise, so that whole rows give the same costs on every machine
    saved_SR = (inter - intra) * of_node_SR + intra * rows_SR
    return assign_by_cost(-saved_SR)


def assign_by_cost(cost_SR: Numbers) -> Ints:
    """Rank of every sequence, int64 [S]: S/R each, at the least total cost.

    Of several such assignments one that leaves most sequences on the rank which an undisturbed
    batch gives them, in order. Exact up to rounding the costs to about 40 bits: every sequence
    starts on its cheapest rank, and full ranks give up the excess along shortest chains of
    replacements (successive shortest paths; the residual graph has the ranks as its only nodes).

    Raises:
        ValueError: if S is no multiple of R, or for costs that are not finite.
    """
    num_sequences, num_ranks = cost_SR.shape
    if num_sequences % num_ranks:
        raise ValueError(
            f"the batch's sequences ({num_sequences}) must be a multiple of the ranks ({num_ranks})"
        )
    if not np.isfinite(cost_SR).all():
        raise ValueError("the costs of sequences on ranks must be finite")
    capacity = num_sequences // num_ranks
    whole_SR = _whole(cost_SR, capacity)
    exchange = _Exchange(whole_SR)
    while (exchange.members_R > capacity).any():
        exchange.shorten(capacity)
    return exchange.rank_S


def _whole(cost_SR: Numbers, capacity: int) -> Ints:
    """Costs as whole numbers [S, R], so large that preferring the undisturbed rank breaks ties.

    A rank's mean cost is taken off, which is the same for all assignments and evens out how many
    sequences find a rank the cheapest.
    """
    num_sequences, num_ranks = cost_SR.shape
    above_SR = cost_SR - cost_SR.min(1, keepdims=True)
    _, exponent = np.frexp(above_SR.max(initial=0))
    bits = 59 - (num_sequences + 1).bit_length() - (num_ranks + 1).bit_length()
    undisturbed_S = np.arange(num_sequences) // max(1, capacity)
    disturbed_SR = undisturbed_S[:, None] != np.arange(num_ranks)
    # by a power of 2, so that equal sums of whole numbers stay equal
    whole_SR = np.rint(np.ldexp(above_SR.astype(np.float64), bits - exponent)).astype(np.int64)
    whole_SR -= whole_SR.sum(0) // max(1, num_sequences)
    return whole_SR * (num_sequences + 1) + disturbed_SR


class _Exchange:
    """Sequences on ranks, and what the cheapest replacement from rank to rank costs."""

    def __init__(self, cost_SR: Ints) -> None:
        self.cost_SR, num_ranks = cost_SR, cost_SR.shape[1]
        self.rank_S = cost_SR.argmin(1)
        self.members_R = np.bincount(self.rank_S, minlength=num_ranks)
        self.moving_RR = np.full((num_ranks, num_ranks), NEVER)
        self.who_RR = np.full((num_ranks, num_ranks), -1)
        self.potential_R = np.zeros(num_ranks, dtype=np.int64)
        for rank in range(num_ranks):
            self._look(rank)

    def shorten(self, capacity: int) -> None:
        """Take one sequence off the ranks that have too many, by the cheapest chain."""
        chain = self._cheapest_chain(capacity)
        for giver, taker in pairwise(chain):
            self.rank_S[self.who_RR[giver, taker]] = taker
        self.members_R[chain[0]] -= 1
        self.members_R[chain[-1]] += 1
        for rank in chain:
            self._look(rank)

    def _look(self, rank: int) -> None:
        """Find again who leaves a rank most cheaply for each other one."""
        members = np.flatnonzero(self.rank_S == rank)
        self.moving_RR[rank] = NEVER
        if len(members):
            more_MR = self.cost_SR[members] - self.cost_SR[members, rank][:, None]
            first_R = more_MR.argmin(0)
            self.moving_RR[rank] = more_MR[first_R, np.arange(len(first_R))]
            self.who_RR[rank] = members[first_R]
            self.moving_RR[rank, rank] = NEVER

    def _cheapest_chain(self, capacity: int) -> list[int]:
        """Ranks from one with too many to one with room (Dijkstra with potentials)."""
        reduced_RR = self.moving_RR + self.potential_R[:, None] - self.potential_R
        reduced_RR[self.moving_RR == NEVER] = NEVER
        far_R = np.where(self.members_R > capacity, 0, NEVER)
        open_R, before_R = np.ones(len(far_R), dtype=bool), np.full(len(far_R), -1)
        while True:
            rank = int(np.where(open_R, far_R, 2 * NEVER).argmin())
            if self.members_R[rank] < capacity:
                break
            open_R[rank] = False
            through_R = far_R[rank] + reduced_RR[rank]
            nearer = through_R < far_R
            far_R[nearer], before_R[nearer] = through_R[nearer], rank
        self.potential_R += np.minimum(far_R, far_R[rank])
        chain = [rank]
        while before_R[chain[0]] >= 0:
            chain.insert(0, int(before_R[chain[0]]))
        return chain


def assigned(
    trace: Trace,
    placement: ExpertPlacement,
    topology: Topology,
    *,
    preferences: Preferences | None = None,
    batch_size: int | None = None,
) -> Trace:
    """The trace with `source_T` as its sequences are assigned: what `batched` costs are taken of.

    Args:
        preferences: of token ids, to predict rows by; None: the rows of the trace itself.
        batch_size: sequences of a global batch, assigned together; None: all of the trace.

    Raises:
        ValueError: for a trace without sequences (or token ids to predict by), sequences of
            different lengths, or batches that the ranks cannot split evenly.
    """
    order_T, num_sequences = _sequences(trace)
    rows_SR = _rows_of(trace, order_T, num_sequences, placement, preferences)
    cost_SR = rows_SR @ (1 / topology.bytes_per_s_RR())
    size = batch_size or num_sequences
    if size < 1 or num_sequences % size:
        raise ValueError(
            f"batch_size ({size}) must be >= 1 and divide the sequences of the trace "
            f"({num_sequences})"
        )
    parts = [assign_by_cost(cost_SR[i : i + size]) for i in range(0, num_sequences, size)]
    source_T = np.empty(trace.num_tokens, dtype=np.int64)
    source_T[order_T] = np.repeat(np.concatenate(parts), trace.num_tokens // num_sequences)
    return replace(trace, source_T=source_T)


def _sequences(trace: Trace) -> tuple[Ints, int]:
    """Tokens in the order of their sequences, and how many sequences there are."""
    if trace.sequence_T is None or not trace.num_tokens:
        raise ValueError("the trace does not know its sequences; record it with sequence_T")
    _, tokens_S = np.unique(trace.sequence_T, return_counts=True)
    if tokens_S.min() != tokens_S.max():
        raise ValueError(
            f"the trace's sequences have {tokens_S.min()} to {tokens_S.max()} tokens; they must "
            f"be of one length"
        )
    return np.argsort(trace.sequence_T, kind="stable"), len(tokens_S)


def _rows_of(
    trace: Trace,
    order_T: Ints,
    num_sequences: int,
    placement: ExpertPlacement,
    preferences: Preferences | None,
) -> Numbers:
    """Rows of every sequence on every rank, predicted or counted, float64 [S, R]."""
    home_LE, num_ranks = placement.home_LE.numpy(), placement.num_ranks
    if preferences is not None:
        if trace.token_T is None:
            raise ValueError("the trace does not know its token ids; record it with token_T")
        token_ST = trace.token_T[order_T].reshape(num_sequences, -1)
        return predicted_rows(token_ST, preferences.rows_per_rank(home_LE, num_ranks))
    home_LX = np.pad(home_LE, ((0, 0), (0, 1)), constant_values=num_ranks)
    rows_SX = np.zeros((num_sequences, num_ranks + 1))
    sequence_T = np.arange(trace.num_tokens) // (trace.num_tokens // num_sequences)
    for layer, home_X in enumerate(home_LX):
        rank_TK = home_X[trace.ids_TLK[order_T, layer]]
        place_TK = sequence_T[:, None] * (num_ranks + 1) + rank_TK
        rows_SX += np.bincount(place_TK.ravel(), minlength=rows_SX.size).reshape(rows_SX.shape)
    return rows_SX[:, :num_ranks]


@dataclass(frozen=True)
class Saving:
    """What assigning the sequences of a trace to ranks saves.

    Attributes:
        before, after: exact costs; `rows_intra` and `rows_inter` are the copies within and across
            nodes.
    """

    before: Cost
    after: Cost

    @property
    def within(self) -> float:
        """Share of the copies within nodes that is saved; below 0 if there are more."""
        return _share(self.before.rows_intra, self.after.rows_intra)

    @property
    def across(self) -> float:
        """Share of the copies across nodes that is saved; below 0 if there are more."""
        return _share(self.before.rows_inter, self.after.rows_inter)

    @property
    def helps(self) -> bool:
        """Whether the traffic takes at least 2 % less time."""
        return _share(self.before.traffic_s, self.after.traffic_s) >= WORTHWHILE

    def verdict(self) -> str:
        """In words: what is saved, and whether that is worth while."""
        parts = [
            f"{100 * share:.1f} % of the copies {where}"
            for share, where, copies in (
                (self.across, "across nodes", self.before.rows_inter),
                (self.within, "within nodes", self.before.rows_intra),
            )
            if copies
        ]
        saved = " and ".join(parts) or "nothing: no copy leaves its rank"
        return f"assignment saves {saved}{'' if self.helps else ': leave it off'}"


def expected_saving(
    trace: Trace,
    placement: ExpertPlacement,
    topology: Topology,
    *,
    preferences: Preferences | None = None,
    batch_size: int | None = None,
    two_level: bool = True,
) -> Saving:
    """Copies before and after the assignment. Arguments and errors as `assigned`.

    Args:
        two_level: tokens cross to a node once and are handed on there.
    """
    after = assigned(trace, placement, topology, preferences=preferences, batch_size=batch_size)
    before_cost, after_cost = (
        trace_cost(placement, each, topology, mode="batched", two_level=two_level)
        for each in (trace, after)
    )
    return Saving(before_cost, after_cost)


def _share(before: float, after: float) -> float:
    return (before - after) / before if before else 0.0
