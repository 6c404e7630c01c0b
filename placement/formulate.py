"""From statistics, a topology and an objective to the problem that the solvers minimise.

L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.objective import ExpertShape, Objective, check_fit, journeys, row_operations
from placement.problem import Problem
from placement.stats import RoutingStats
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.traffic import check_mode

# Of a pair of rows of one token, against one of one domain: most of what ties a token's rows
# together ends with the token, and a sequence has many.
TOKEN_SHARE = 0.25
Floats = npt.NDArray[np.float64]


def problem_of(
    stats: RoutingStats,
    topology: Topology,
    start: ExpertPlacement,
    objective: Objective,
    max_moves: int | None = None,
) -> tuple[Problem, float]:
    """What the solvers minimise: the objective's weighted seconds, in pairwise terms.

    Returns the problem, and a constant to add to its values.

    With one choice per token the terms are exact, but for the way to the first layer's experts in
    `coherent`, which is left out, and for what two-level dispatch hands on, which is a mean. For
    more choices, what deduplication saves enters by pairs of a token's experts on one rank, as in
    `traffic.distinct` at the mean number of choices. In `batched`, the tendency of sequences to
    stay on few ranks enters by rows of consecutive layers that come together beyond chance, in one
    token or in one domain; `batches.settled` goes on from there.

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
    shape, mode, choices = objective.shape, objective.mode, max(1, stats.top_k)
    seconds = objective.traffic_weight * journeys(mode) * shape.row_bytes / topology.num_ranks
    crossing = 1.0 if mode == "coherent" else _crossing_share(stats, topology)
    distance_RR = seconds * _hops(topology, objective.two_level, crossing)
    pair_LEE = stats.pair_LEE.numpy() / choices
    coactive_LEE = stats.coactive_LEE.numpy() * 2 / choices  # each gathers at the other's rank
    linear_LER, constant = None, 0.0
    if mode != "coherent":
        kept_L, saved_L = _deduplicated(stats, topology.num_ranks)
        coactive_LEE = stats.coactive_LEE.numpy() * saved_L[:, None, None]
        constant = -float(coactive_LEE.sum()) / 2 * float(distance_RR.max())
    if mode == "home":
        pair_LEE = np.zeros_like(pair_LEE)
        linear_LER = _from_sources(stats, distance_RR) * kept_L[:, None, None]
    if mode == "batched":
        pair_LEE = _together(stats)
    if objective.move_weight:
        move_LER = objective.move_weight * _move_seconds(start, topology, shape)
        linear_LER = move_LER if linear_LER is None else linear_LER + move_LER
    problem = Problem(
        node_of_R=topology.node_of_R,
        distance_RR=distance_RR,
        pair_LEE=pair_LEE,
        load_LE=stats.load_LE.numpy(),
        start_LE=start.home_LE.numpy(),
        coactive_LEE=coactive_LEE if choices > 1 else None,
        linear_LER=linear_LER,
        slowness_R=row_operations(shape, mode) / topology.flops_per_s_R(),
        load_weight=objective.load_weight,
        max_load_ratio=objective.max_load_ratio,
        max_moves=max_moves,
    )
    return problem, constant


def _hops(topology: Topology, two_level: bool, crossing: float) -> Floats:
    """Seconds per byte from rank to rank, [R, R]; on other nodes with what is handed on there.

    Args:
        crossing: with two levels, how much of the way between nodes a row counts for.
    """
    hops_RR = 1 / topology.bytes_per_s_RR()
    if two_level:
        per_node = topology.num_ranks // topology.num_nodes
        node_R = np.array(topology.node_of_R)
        handed_on_s = 1 / topology.bytes_per_s_RR()[node_R[:, None] == node_R].min()
        across_RR = node_R[:, None] != node_R
        hops_RR[across_RR] *= crossing
        hops_RR[across_RR] += handed_on_s * (per_node - 1) / per_node
    return hops_RR


def _deduplicated(stats: RoutingStats, num_ranks: int) -> tuple[Floats, Floats]:
    """Copies per row, and copies saved per token and pair of its experts on one rank, [L] each.

    The coefficients of `traffic.distinct` for experts that are spread evenly; for other spreads
    they give fewer copies than there are, never more.
    """
    most_L = _most(stats, num_ranks)
    crossing = (num_ranks - 1) / num_ranks
    return 2 / (most_L + 1), crossing * 2 / (most_L * (most_L + 1))


def _crossing_share(stats: RoutingStats, topology: Topology) -> float:
    """What one more row of a token on its node saves, against one more on its rank, in copies.

    1 for up to two choices. Where a token has many rows on every node, next to nothing: it comes
    there anyway.
    """
    node_L, rank_L = _most(stats, topology.num_nodes), _most(stats, topology.num_ranks)
    return float(np.mean(rank_L * (rank_L + 1) / (node_L * (node_L + 1))))


def _most(stats: RoutingStats, num_parts: int) -> Floats:
    """The number around which the rows of a token lie on a part that it visits, [L]."""
    rows_L = np.maximum(stats.load_LE.numpy().sum(1), 1e-300)
    pairs_L = stats.coactive_LEE.numpy().sum((1, 2)) / 2
    return 1 + np.floor(2 * pairs_L / num_parts / rows_L)


def _together(stats: RoutingStats) -> Floats:
    """Pairs of rows of consecutive layers in one token or domain, beyond chance, [L-1, E, E].

    Rows that are merely frequent gain nothing by being together, as every rank has equally many
    tokens; so chance is taken off. What is added so that nothing is below 0 is the same for all
    placements.
    """
    pair_LEE = stats.pair_LEE.numpy() * TOKEN_SHARE
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


def _from_sources(stats: RoutingStats, distance_RR: Floats) -> Floats:
    """Cost of every expert on every rank, for its rows from their source ranks, [L, E, R]."""
    source_LRE = stats.sources(len(distance_RR)).numpy()
    return np.einsum("lse,sr->ler", source_LRE, distance_RR)


def _move_seconds(start: ExpertPlacement, topology: Topology, shape: ExpertShape) -> Floats:
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
