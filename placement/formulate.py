"""From statistics, a topology and an objective to the problem that the solvers minimise.

L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.objective import ExpertShape, Objective, check_fit, journeys, row_operations
from placement.problem import Problem
from placement.stats import RoutingStats
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.traffic import batched_sources, check_mode, copies

# What a pair of rows of one token counts in a first problem of `batched`, against one of one
# domain: most of what ties a token's rows together ends with the token, and a sequence has many.
# Which is best differs from model to model.
TOKEN_SHARES = (0.25, 0.0, 1.0)
STEP = 0.01  # of the pairs, for a slope
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def problem_of(
    stats: RoutingStats,
    topology: Topology,
    start: ExpertPlacement,
    objective: Objective,
    max_moves: int | None = None,
    around: ExpertPlacement | None = None,
    token_share: float = TOKEN_SHARES[0],
) -> tuple[Problem, float]:
    """What the solvers minimise: the objective's weighted seconds, in pairwise terms.

    Returns the problem, and a constant to add to its values.

    With one choice per token the terms of `home` are exact. For more choices, what deduplication
    saves enters by pairs of a token's experts on one rank, and with two-level dispatch on one
    node, by the slope of `traffic.copies`. In `coherent` the way to the first layer's experts is
    left out, and what two-level dispatch hands on is a mean. In `batched`
    sources are not known: the tendency of sequences to stay on few ranks enters by rows of
    consecutive layers that come together beyond chance, in one token or in one domain, which is
    no more than a way to a first placement.

    Args:
        around: a placement near which the terms are to hold: the rows that a token has where it
            comes, how far they travel, and in `batched` where sequences are, are taken from it.
            None: experts lie evenly.
        token_share: what a pair of rows of one token counts in `batched` without `around`, one of
            one domain being 1.

    Raises:
        ValueError: for shapes that do not fit, counts that do not add up, and limits that no
            placement can meet, saying by how much.
    """
    check_mode(objective.mode, topology, objective.two_level)
    check_fit(start, topology)
    stats.check_model(start.num_layers, start.num_experts)
    stats.check()
    if max_moves is not None and max_moves < 0:
        raise ValueError(f"max_moves ({max_moves}) must be >= 0")
    _check_limits(stats, topology, start, objective)
    shape, mode, ranks = objective.shape, objective.mode, topology.num_ranks
    seconds = objective.traffic_weight * journeys(mode) * shape.row_bytes / ranks
    slowness_R = row_operations(shape, mode) / topology.flops_per_s_R()
    pair_LEE, coactive_LEE = stats.pair_LEE.numpy(), stats.coactive_LEE.numpy()
    linear_LER, constant = np.zeros((*stats.load_LE.shape, ranks)), 0.0
    if mode == "coherent":
        distance_RR = seconds * _hops(topology, objective.two_level)
        pair_LEE = pair_LEE / max(1, stats.top_k)
        coactive_LEE = coactive_LEE * 2 / max(1, stats.top_k)  # each gathers at the other's rank
    else:
        sources_LRE = stats.sources(ranks).numpy()
        if mode == "batched" and around is not None:
            sources_LRE = batched_sources(stats, around.home_LE.numpy(), ranks)
        legs = _legs(topology, objective.two_level)
        terms = [_dispatched(stats, sources_LRE, leg, around) for leg in legs]
        saved_L = seconds * np.sum([term.saved_L for term in terms], axis=0)
        constant = seconds * sum(term.constant for term in terms)
        if mode == "batched" and around is None:
            shares = [float(term.copies_L.mean()) for term in terms]
            distance_RR = seconds * _hops(topology, objective.two_level, shares)
            saved_L /= max(float(distance_RR.max()), 1e-300)
            pair_LEE = _together(stats, token_share)
        else:
            pair_LEE = np.zeros_like(pair_LEE)
            linear_LER += seconds * sum(term.linear_LER for term in terms)
            distance_RR = _apart(legs, terms)
        coactive_LEE = coactive_LEE * saved_L[:, None, None]
    if objective.move_weight:
        linear_LER += objective.move_weight * move_seconds(start, topology, shape)
    if objective.load_weight and np.ptp(slowness_R):  # the mean that the problem takes off
        mean_LER = stats.load_LE.numpy()[:, :, None] * slowness_R / ranks
        linear_LER += objective.load_weight * mean_LER
    problem = Problem(
        node_of_R=topology.node_of_R,
        distance_RR=distance_RR,
        pair_LEE=pair_LEE,
        load_LE=stats.load_LE.numpy(),
        start_LE=start.home_LE.numpy(),
        coactive_LEE=coactive_LEE if stats.top_k > 1 else None,
        linear_LER=linear_LER if linear_LER.any() else None,
        slowness_R=slowness_R,
        load_weight=objective.load_weight,
        max_load_ratio=objective.max_load_ratio,
        max_moves=max_moves,
    )
    return problem, constant


@dataclass(frozen=True)
class _Leg:
    """A part of the way to an expert that one copy makes for all rows of a group of ranks.

    Attributes:
        group_R: of every rank. distance_RR: seconds per byte by source and final rank.
    """

    group_R: Ints
    distance_RR: Floats


@dataclass(frozen=True)
class _Terms:
    """What a leg costs, in seconds per byte times rows.

    Attributes:
        copies_L: copies per row. linear_LER: of every expert on every rank.
        saved_L: per token and pair of its experts in a group.
    """

    copies_L: Floats
    linear_LER: Floats
    saved_L: Floats
    constant: float


def _legs(topology: Topology, two_level: bool) -> list[_Leg]:
    """To every rank; or to the sender's own place on every node, and from there to its ranks."""
    hops_RR, rank_R = 1 / topology.bytes_per_s_RR(), np.arange(topology.num_ranks)
    if not two_level:
        return [_Leg(rank_R, hops_RR)]
    per_node = topology.num_ranks // topology.num_nodes
    node_R, place_R = np.divmod(rank_R, per_node)
    relay_RR = node_R * per_node + place_R[:, None]
    handed_on = _Leg(rank_R, hops_RR[relay_RR, rank_R])
    return [handed_on, _Leg(node_R, hops_RR[rank_R[:, None], relay_RR])]


def _dispatched(
    stats: RoutingStats, sources_LRE: Floats, leg: _Leg, around: ExpertPlacement | None
) -> _Terms:
    """The coefficients of `traffic.copies` near a placement, or where experts lie evenly."""
    num_experts, num_ranks = stats.num_experts, len(leg.group_R)
    in_group_RG = np.eye(int(leg.group_R.max()) + 1)[leg.group_R]
    # of all pairs, how many are in a group if experts lie evenly
    even = (1 / in_group_RG.shape[1] - 1 / num_experts) / max(1e-300, 1 - 1 / num_experts)
    tokens_LR = sources_LRE.sum(2) / stats.rows_per_token_L[:, None]
    travel_LER = np.einsum("lse,sr->ler", sources_LRE, leg.distance_RR)
    copies_L, saved_L, constant = np.ones(len(tokens_LR)), np.zeros(len(tokens_LR)), 0.0
    for layer, coactive_EE in enumerate(stats.coactive_LEE.numpy() if stats.top_k > 1 else ()):
        all_pairs = float(coactive_EE.sum()) / 2
        pairs_G = np.full(in_group_RG.shape[1], all_pairs * even / in_group_RG.shape[1])
        share_ER, step_G = np.full((num_experts, num_ranks), 1 / num_ranks), STEP * pairs_G
        if around is not None:
            share_ER = np.eye(num_ranks)[around.home_LE[layer]]
            share_EG = share_ER @ in_group_RG
            pairs_G = ((coactive_EE @ share_EG) * share_EG).sum(0) / 2
        rows_RR = sources_LRE[layer] @ share_ER
        rows_RG, travel_RG = rows_RR @ in_group_RG, (rows_RR * leg.distance_RR) @ in_group_RG
        far_RG = travel_RG / np.maximum(rows_RG, 1e-300)
        here, fewer = (
            float((far_RG * copies(rows_RG, pairs, tokens_LR[layer], stats.top_k)).sum())
            for pairs in (pairs_G, pairs_G + step_G)
        )
        copies_L[layer] = here / max(float(travel_RG.sum()), 1e-300)
        saved_L[layer] = (here - fewer) / max(float(step_G.sum()), 1e-300)
        constant += saved_L[layer] * (float(pairs_G.sum()) - all_pairs)
    return _Terms(copies_L, copies_L[:, None, None] * travel_LER, saved_L, constant)


def _apart(legs: list[_Leg], terms: list[_Terms]) -> Floats:
    """What of a pair's saving is lost if its experts are on these two ranks, [R, R]."""
    lost = [float(term.saved_L.sum()) for term in terms]
    parted = [leg.group_R[:, None] != leg.group_R for leg in legs]
    return np.average(parted, axis=0, weights=lost) if any(lost) else np.zeros(parted[0].shape)


def _hops(topology: Topology, two_level: bool, copies: Sequence[float] = (1.0, 1.0)) -> Floats:
    """Seconds per byte from rank to rank, [R, R]; to other nodes with what is handed on there,
    which is a mean.

    Args:
        copies: of a row, to ranks and to nodes.
    """
    hops_RR = 1 / topology.bytes_per_s_RR()
    if not two_level:
        return copies[0] * hops_RR
    per_node = topology.num_ranks // topology.num_nodes
    node_R = np.array(topology.node_of_R)
    across_RR = node_R[:, None] != node_R
    handed_on_s = float(hops_RR[~across_RR].max()) * (per_node - 1) / per_node
    return np.where(across_RR, copies[1] * hops_RR + copies[0] * handed_on_s, copies[0] * hops_RR)


def _together(stats: RoutingStats, token_share: float) -> Floats:
    """Pairs of rows of consecutive layers in one token or domain, beyond chance, [L-1, E, E].

    Rows that are merely frequent gain nothing by being together, as every rank has equally many
    tokens; so chance is taken off. What is added so that nothing is below 0 is the same for all
    placements.
    """
    pair_LEE = stats.pair_LEE.numpy() * token_share
    before_LE, after_LE = pair_LEE.sum(2), pair_LEE.sum(1)
    total_L = np.maximum(before_LE.sum(1), 1e-300)
    together_LEE = pair_LEE - before_LE[:, :, None] * after_LE[:, None, :] / total_L[:, None, None]
    domains = stats.by_domain
    seen_G = domains.tokens_G > 0
    if seen_G.any():
        tokens_G = domains.tokens_G[seen_G]
        rows_GLE = domains.table.toarray()[seen_G].reshape(-1, *stats.load_LE.shape)
        excess_GLE = rows_GLE - tokens_G[:, None, None] * rows_GLE.sum(0) / tokens_G.sum()
        mean_GLE = excess_GLE / tokens_G[:, None, None]
        for layer in range(stats.num_layers - 1):
            together_LEE[layer] += mean_GLE[:, layer].T @ excess_GLE[:, layer + 1]
    return together_LEE - together_LEE.min((1, 2), keepdims=True)


def move_seconds(start: ExpertPlacement, topology: Topology, shape: ExpertShape) -> Floats:
    """Seconds of the mean rank that moving every expert to every rank takes, [L, E, R]."""
    seconds_RR = shape.move_bytes / topology.bytes_per_s_RR() / topology.num_ranks
    return seconds_RR[start.home_LE.numpy()]


def _check_limits(
    stats: RoutingStats, topology: Topology, start: ExpertPlacement, objective: Objective
) -> None:
    """Refuse limits that no placement can meet."""
    per_rank = start.num_experts // start.num_ranks
    need = start.num_layers * per_rank * objective.shape.move_bytes
    if objective.max_bytes_per_rank is not None and need > objective.max_bytes_per_rank:
        raise ValueError(
            f"objective.max_bytes_per_rank ({objective.max_bytes_per_rank:,.0f}) is "
            f"{need - objective.max_bytes_per_rank:,.0f} bytes short: {start.num_layers} layers x "
            f"{per_rank} experts need {need:,.0f}; use more ranks"
        )
    if objective.max_load_ratio is None:
        return
    load_LE = np.sort(stats.load_LE.numpy(), 1)
    mean_L = np.maximum(load_LE.sum(1) / topology.num_ranks, 1e-300)
    # the busiest expert never comes alone: its rank has the per_rank - 1 least busy ones at least
    least_L = (load_LE[:, -1] + load_LE[:, : per_rank - 1].sum(1)) / mean_L
    layer = int(least_L.argmax())
    if least_L[layer] > objective.max_load_ratio:
        raise ValueError(
            f"objective.max_load_ratio ({objective.max_load_ratio}) cannot be met: the busiest "
            f"expert of layer {layer} alone makes it {least_L[layer]:.3f}; raise it to that, or "
            f"use a planner"
        )
