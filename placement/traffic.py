"""Who sends how many tokens to whom, layer by layer, under a placement.

T tokens, L MoE layers, K choices, E experts, R ranks, N nodes.

A token travels once to every rank that has some of its experts, however many; with two-level
dispatch once to every node, to the rank at the sender's own place there, which hands it on. This
is what the dispatchers of `parallel` do, counted the same way.

Modes: in `home` and `batched` a token sets out from its source rank in every layer and what it
adds up to returns there (not counted: the same again). In `coherent` it stays on the rank of its
first choice and sets out from there in the next layer (arXiv:2401.08383); what its other experts
put out is gathered at its new rank, and counted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import linprog

from placement.stats import RoutingStats
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace

MODES = ("home", "batched", "coherent")
BLOCK_TOKENS = 65536
MOST_TIED = 1 - 1e-9  # correlation of a token's choices of a place
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def check_mode(mode: str, topology: Topology, two_level: bool) -> None:
    """Refuse unknown modes, and two-level dispatch over uneven nodes.

    Raises:
        ValueError: naming what is allowed.
    """
    if mode not in MODES:
        raise ValueError(f"mode ({mode!r}) must be one of {', '.join(MODES)}")
    if two_level and not topology.is_even():
        raise ValueError(
            f"two_level dispatch needs equally many ranks on every node, in order, but they lie on "
            f"{topology.node_of_R}; use two_level=False"
        )


def sources_of(trace: Trace, num_ranks: int) -> Ints:
    """Source rank of every token; a trace that does not know is dealt out in order, evenly.

    Raises:
        ValueError: if the trace comes from more ranks.
    """
    if trace.source_T is None:
        return np.arange(trace.num_tokens) * num_ranks // max(1, trace.num_tokens)
    if trace.num_tokens and int(trace.source_T.max()) >= num_ranks:
        raise ValueError(
            f"the trace comes from {int(trace.source_T.max()) + 1} ranks, the topology has "
            f"{num_ranks}"
        )
    return trace.source_T.astype(np.int64)


def sends_of_trace(
    placement: ExpertPlacement,
    trace: Trace,
    topology: Topology,
    *,
    mode: str = "home",
    two_level: bool = False,
) -> Ints:
    """Exact copies per layer, sender and receiver, int64 [L, R, R].

    On the diagonal: copies that stay on the rank that the token sets out from.
    """
    check_mode(mode, topology, two_level)
    home_LE = placement.home_LE.numpy()
    num_ranks = placement.num_ranks
    home_LX = np.pad(home_LE, ((0, 0), (0, 1)), constant_values=num_ranks)  # E: no expert
    sends_LRR = np.zeros((trace.num_layers, num_ranks, num_ranks), dtype=np.int64)
    source_T = sources_of(trace, num_ranks)
    for start in range(0, trace.num_tokens, BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        at_T = source_T[block]
        for layer in range(trace.num_layers):
            rank_TK = home_LX[layer][trace.ids_TLK[block, layer]]
            present_TR = np.zeros((len(at_T), num_ranks + 1), dtype=bool)
            np.put_along_axis(present_TR, rank_TK, True, axis=1)
            present_TR = present_TR[:, :num_ranks]
            sends_LRR[layer] += sends_of_tokens(at_T, present_TR, topology, two_level)
            if mode == "coherent":
                first_T = rank_TK[:, 0]
                at_T = np.where(first_T < num_ranks, first_T, at_T)
                present_TR[np.arange(len(at_T)), at_T] = False  # it is there already
                sends_LRR[layer] += sends_of_tokens(at_T, present_TR, topology, two_level).T
    return sends_LRR


def sends_of_tokens(
    at_T: Ints, present_TR: npt.NDArray[np.bool_], topology: Topology, two_level: bool
) -> Ints:
    """Copies per sender and receiver that bring tokens from where they are to where they go.

    Args:
        at_T: rank of every token. present_TR: the ranks that want a copy of it.

    Returns:
        int64 [R, R]. With two levels, those between nodes travel first and those within nodes,
        which relays hand on among them, after that.
    """
    tokens, num_ranks, num_nodes = len(at_T), topology.num_ranks, topology.num_nodes
    at_TR = sparse.csr_array((np.ones(tokens), at_T, np.arange(tokens + 1)), (tokens, num_ranks))
    sends_RR = at_TR.T @ present_TR.astype(np.float64)
    if two_level and num_nodes > 1:
        present_TN = present_TR.reshape(tokens, num_nodes, -1).any(2)
        sends_RR = _relayed(sends_RR, at_TR.T @ present_TN.astype(np.float64), topology)
    return np.rint(sends_RR).astype(np.int64)


def _relayed(to_RR: Floats, to_RN: Floats, topology: Topology) -> Floats:
    """Sends by way of relays: from copies per sender and final rank, and per sender and node."""
    num_ranks, per_node = topology.num_ranks, topology.num_ranks // topology.num_nodes
    node_R, place_R = np.divmod(np.arange(num_ranks), per_node)
    same_RR = node_R[:, None] == node_R
    sends_RR = np.where(same_RR, to_RR, 0)
    for sender in range(num_ranks):
        relay_N = np.arange(topology.num_nodes) * per_node + place_R[sender]
        others = relay_N != sender
        sends_RR[sender, relay_N[others]] += to_RN[sender, others]
    # what relays hand on; their own copies have arrived
    for relay in range(num_ranks):
        senders = (place_R == place_R[relay]) & (node_R != node_R[relay])
        hand_on_R = np.where(same_RR[relay], to_RR[senders].sum(0), 0)
        hand_on_R[relay] = 0
        sends_RR[relay] += hand_on_R
    return sends_RR


def sends_of_stats(
    placement: ExpertPlacement,
    stats: RoutingStats,
    topology: Topology,
    *,
    mode: str = "home",
    two_level: bool = False,
) -> Floats:
    """Expected copies per layer, sender and receiver, float64 [L, R, R].

    Exact for one choice per token. For more, deduplication is estimated (`copies`); the total is
    exact for two. In `coherent`, any of a token's choices may be its first, and nothing is saved
    on the way out.

    Raises:
        ValueError: for `batched` without statistics by domain.
    """
    check_mode(mode, topology, two_level)
    home_LE, num_ranks = placement.home_LE.numpy(), placement.num_ranks
    at_home_LER = home_LE[:, :, None] == np.arange(num_ranks)
    source_LRE = stats.sources(num_ranks).numpy()
    if mode == "batched":
        source_LRE = batched_sources(stats, home_LE, num_ranks)
    coactive_LEE, choices = stats.coactive_LEE.numpy(), max(1, stats.top_k)
    tokens_LR = source_LRE.sum(2) / stats.rows_per_token_L[:, None]
    in_node_RN = _in_node(topology)
    sends_LRR = np.zeros((stats.num_layers, num_ranks, num_ranks))
    for layer in range(stats.num_layers):
        at_home_ER = at_home_LER[layer].astype(np.float64)
        coherent = mode == "coherent"
        if coherent and layer:
            pair_EE = stats.pair_LEE[layer - 1].numpy() / choices
            rows_RR = at_home_LER[layer - 1].T @ pair_EE @ at_home_ER
            sends_LRR[layer] = _sent(rows_RR, rows_RR @ in_node_RN, topology, two_level)
        else:
            rows_RR = source_LRE[layer] @ at_home_ER
            sends_LRR[layer] = expected_sends(
                rows_RR,
                coactive_LEE[layer],
                at_home_ER,
                tokens_LR[layer],
                choices,
                topology,
                two_level,
            )
        if coherent:
            gather_RR = at_home_ER.T @ (coactive_LEE[layer] / choices) @ at_home_ER
            np.fill_diagonal(gather_RR, 0)
            sends_LRR[layer] += _sent(gather_RR, gather_RR @ in_node_RN, topology, two_level).T
    return sends_LRR


def expected_sends(
    rows_RR: Floats,
    coactive_EE: Floats,
    share_ER: Floats,
    tokens_R: Floats,
    top_k: int,
    topology: Topology,
    two_level: bool,
) -> Floats:
    """Expected copies per sender and receiver, float64 [R, R], of rows by source and final rank.

    Args:
        coactive_EE: tokens that chose both experts; those on one rank travel as one copy.
        share_ER: part of an expert's rows that every rank computes.
        tokens_R: of every source. top_k: choices of a token, at most.
    """
    in_node_RN = _in_node(topology)
    to_RR, to_RN = (
        copies(rows_RX, ((coactive_EE @ share_EX) * share_EX).sum(0) / 2, tokens_R, top_k)
        for rows_RX, share_EX in (
            (rows_RR, share_ER),
            (rows_RR @ in_node_RN, share_ER @ in_node_RN),
        )
    )
    return _sent(to_RR, to_RN, topology, two_level)


def _sent(to_RR: Floats, to_RN: Floats, topology: Topology, two_level: bool) -> Floats:
    return _relayed(to_RR, to_RN, topology) if two_level and topology.num_nodes > 1 else to_RR


def _in_node(topology: Topology) -> Floats:
    return np.eye(topology.num_nodes)[list(topology.node_of_R)]


def copies(rows_RX: Floats, pairs_X: Floats, tokens_R: Floats, top_k: int) -> Floats:
    """Expected tokens of every source with a row in each of X places, float64 [R, X].

    How often a token comes to a place is taken to follow Polya's distribution (binomial,
    hypergeometric and beta-binomial are cases of it) with the mean that the rows give. Its variance
    follows from the pairs: of the room between what independent choices give and all that can be,
    every source has the same part. The total is exact for one and two choices.

    Args:
        rows_RX: from every source to every place. pairs_X: pairs of rows of one token in a place,
            of all sources. tokens_R: of every source. top_k: rows of a token, at most.
    """
    if top_k == 1:
        return rows_RX
    tokens_R1 = tokens_R[:, None]
    pairs_R1 = tokens_R1 * top_k * (top_k - 1) / 2
    mean_RX = _over(rows_RX, tokens_R1).clip(None, top_k)
    # probabilities that a choice is there, and that two are: independent, at least, at most
    chosen_RX, whole_RX = mean_RX / top_k, np.floor(mean_RX)
    alone_RX = chosen_RX**2
    least_RX = whole_RX * (2 * mean_RX - whole_RX - 1) / (top_k * (top_k - 1))
    most_RX = chosen_RX
    beyond_X = pairs_X - (pairs_R1 * alone_RX).sum(0)
    room_RX = np.where(beyond_X > 0, most_RX - alone_RX, alone_RX - least_RX)
    both_RX = alone_RX + _over(beyond_X, (pairs_R1 * room_RX).sum(0)).clip(-1, 1) * room_RX
    tied_RX = _over(both_RX - alone_RX, most_RX - alone_RX).clip(None, MOST_TIED)
    urn_RX = tied_RX / (1 - tied_RX)  # what a draw adds to it
    missed_RX = 1 - chosen_RX
    for drawn in range(1, top_k):
        missed_RX *= (1 - chosen_RX + drawn * urn_RX).clip(0) / (1 + drawn * urn_RX)
    return tokens_R1 * (1 - missed_RX).clip(chosen_RX, mean_RX.clip(None, 1))


def _over(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient; 0 where there is nothing to divide by."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.zeros(shape), where=denominator > 1e-300)


def batched_sources(stats: RoutingStats, home_LE: Ints, num_ranks: int) -> Floats:
    """Rows per source rank and expert [L, R, E] if each domain's sequences go where its rows are.

    Every rank gets equally many tokens; a domain is split over ranks where it must be: a
    transportation problem.

    Raises:
        ValueError: without statistics by domain.
    """
    domains = stats.by_domain
    if not domains.tokens_G.sum():
        raise ValueError(
            "mode batched needs statistics by domain; observe with domain_T, or evaluate a trace "
            "with sequences (trace_cost)"
        )
    local_GR = domains.rows_per_rank(home_LE, num_ranks)
    tokens_G = domains.tokens_G
    kinds = len(tokens_G)
    to_rank = np.kron(np.ones((1, kinds)), np.eye(num_ranks))
    of_kind = np.kron(np.eye(kinds), np.ones((1, num_ranks)))
    amounts = np.concatenate([tokens_G, np.full(num_ranks, tokens_G.sum() / num_ranks)])
    solution = linprog(
        -local_GR.ravel(), A_eq=np.concatenate([of_kind, to_rank]), b_eq=amounts, method="highs"
    )
    assert solution.success, solution.message
    share_GR = solution.x.reshape(kinds, num_ranks) / np.maximum(tokens_G, 1e-300)[:, None]
    rows_RX = share_GR.T @ domains.table
    return rows_RX.reshape(num_ranks, *home_LE.shape).transpose(1, 0, 2)
