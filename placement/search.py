"""Heuristic search for placements of any size: many starts, descents, and counted kicks.

Layers form a chain: given its neighbours, a layer is put in place exactly. Ranks are taken in
parts: nodes first, then the ranks of every node, then pairs of ranks.

L MoE layers, E experts, R ranks; N experts in B bins of a part (`placement.solvers.part`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations

import numpy as np

from placement.problem import Problem
from placement.solvers.limits import even_out, prohibitive_price, spend
from placement.solvers.moves import TOLERANCE, assign, descend, shake
from placement.solvers.part import Floats, Homes, Part, whole
from placement.solvers.starts import chain, mix, relabel, strands

KICKS = 12  # of a part, per root of its experts in all layers; of one with layers
CURVED_KICKS = 10  # that are no linear assignments
SMALL = 16  # experts; larger parts are kicked as a whole less often, as their kicks cost more
VISIT = 12  # kicks, at least, of a pair of bins that is visited
WIDTHS = (2, 4, 8, 16)  # experts per layer of strands
STRICT = 1000.0  # how much more a row beyond its limit costs in the end
FINAL = 0.4  # of the kicks, for the last refinement
WARM = 0.2  # of the kicks, where a placement is refined that was refined before
PRICES = 16  # of a move, at most, from the highest down
DISCOUNT = 0.6  # from one price to the next, at first


def search(
    problem: Problem, *, seed: int = 0, restarts: int = 10, time_limit_s: float = 60.0
) -> Homes:
    """A placement that costs no more than `problem.start_LE` and keeps the limits, int64 [L, E].

    The same seed finds the same placement unless time runs out.

    Args:
        restarts: starts of every part. time_limit_s: of wall time, after which the best so far is
            returned.

    Raises:
        ValueError: if no placement within the limits was found, saying by how much the best found
            misses them.
    """
    rng = np.random.default_rng(seed)
    part = whole(problem, time.monotonic() + time_limit_s)
    node_R = nodes(problem)
    strict = replace(part, excess_price=STRICT * part.excess_price)
    found = [part.start_LN]
    if 2 * part.max_moves >= part.start_LN.size:
        unlimited = replace(part, max_moves=part.start_LN.size)
        found.append(solve(unlimited, node_R, rng, restarts))
        if node_R is not None:
            found.append(relabel(part.priced(TOLERANCE * part.scale), found[-1], node_R))
    if problem.max_moves is None:
        found.append(descended(part, part.start_LN))
        best_LE = min(found, key=part.priced(TOLERANCE * part.scale).value)
        best_LE = even_out(strict, best_LE, rng)
    else:
        best_LE = even_out(strict, part.start_LN, rng)
        best_LE = with_few_moves(strict, node_R, rng, best_LE)
    refine(strict, best_LE, rng, FINAL)
    found.append(best_LE)
    kept = [home_LE for home_LE in found if not problem.violations(home_LE)]
    if not kept:
        raise ValueError(
            f"no placement within the limits was found: {'; '.join(problem.violations(best_LE))}; "
            f"raise the limit"
        )
    return min(kept, key=problem.value)


def with_few_moves(
    part: Part, node_R: Homes | None, rng: np.random.Generator, home_LE: Homes
) -> Homes:
    """The best placement within `max_moves` that is found at ever lower prices of a move.

    A price makes the moves that are worth most come first.
    """
    price, discount = prohibitive_price(part), DISCOUNT
    first_LE, best_LE, best = home_LE, home_LE, part.value(home_LE)
    for _ in range(PRICES):
        home_LE = solve(part.priced(price * discount), node_R, rng, 0, best_LE)
        value = part.value(home_LE)
        if part.moves(home_LE) <= part.max_moves and value <= best:
            best_LE, best = home_LE, value
            price *= discount
        else:
            discount = np.sqrt(discount)
    best_LE = min((spend(part, best_LE), spend(part, first_LE)), key=part.value)
    refine(part.priced(price), best_LE, rng)
    return best_LE


def nodes(problem: Problem) -> Homes | None:
    """Node of every rank, 0 to n - 1, where all ranks of a node, and all nodes, are alike.

    One node if all distances are equal; None if they are not two, one within nodes of one size
    and one between nodes.
    """
    node_R = np.unique(problem.node_of_R, return_inverse=True)[1].astype(np.int64)
    apart_RR = ~np.eye(problem.num_ranks, dtype=np.bool_)
    if alike(problem.distance_RR[apart_RR]):
        return np.zeros_like(node_R)
    same_RR = node_R[:, None] == node_R
    inside, between = problem.distance_RR[same_RR & apart_RR], problem.distance_RR[~same_RR]
    if alike(np.bincount(node_R)) and alike(inside) and alike(between):
        return node_R
    return None


def alike(values: Floats | Homes) -> bool:
    """All values are equal."""
    return values.size == 0 or bool(values.min() == values.max())


def solve(
    part: Part,
    node_B: Homes | None,
    rng: np.random.Generator,
    restarts: int,
    home_LN: Homes | None = None,
) -> Homes:
    """A placement refined from `home_LN`, or from many starts; nodes first, then their bins."""
    if node_B is None or node_B.max() == 0:
        warm = home_LN is not None
        home_LN = fresh(part, rng, restarts) if home_LN is None else descended(part, home_LN)
        refine(part, home_LN, rng, WARM if warm else 1.0)
        return home_LN
    old_LN = None if home_LN is None else node_B[home_LN]
    node_LN = solve(part.coarsen(node_B), None, rng, restarts, old_LN)
    new_LN = np.empty_like(node_LN)
    for layer, node_N in enumerate(node_LN):
        misfit_NB = 2.0 * (node_B != node_N[:, None])
        if home_LN is not None:
            misfit_NB += np.arange(part.num_bins) != home_LN[layer][:, None]
        new_LN[layer] = assign(misfit_NB)
    for bins_b in np.argsort(node_B, kind="stable").reshape(node_B.max() + 1, -1):
        inner, index_Ln = part.restrict(new_LN, bins_b)
        old_Ln = None
        if home_LN is not None:
            old_Ln = np.searchsorted(bins_b, np.take_along_axis(new_LN, index_Ln, 1))
        inner_Ln = solve(inner, None, rng, restarts, old_Ln)
        np.put_along_axis(new_LN, index_Ln, bins_b[inner_Ln], 1)
    return descended(part, new_LN)


def descended(part: Part, home_LN: Homes) -> Homes:
    """Where a descent ends, or the placement itself if that moves too many experts."""
    end_LN = home_LN.copy()
    descend(part, end_LN)
    return end_LN if part.moves(end_LN) <= part.max_moves else home_LN.copy()


def fresh(part: Part, rng: np.random.Generator, restarts: int) -> Homes:
    """The best mix of descents from chains and strands; every width once, then the best width."""
    widths = [width for width in WIDTHS if width < part.places and part.places % width == 0]
    one_node_B = np.zeros(part.num_bins, dtype=np.int64)
    flat = alike(part.distance_BB[~np.eye(part.num_bins, dtype=np.bool_)])
    found: list[tuple[float, int, Homes]] = []
    for width in [1, *widths, *[0] * restarts][:restarts]:
        if found and time.monotonic() > part.deadline:
            break
        width = width or min(found, key=lambda start: start[0])[1]
        home_LN = chain(part, rng) if width == 1 else strands(part, rng, width)
        if flat:
            home_LN = relabel(part, home_LN, one_node_B)
        descend(part, home_LN)
        found.append((part.value(home_LN), width, home_LN))
    mixed_LN = mix(part, np.stack([home_LN for _, _, home_LN in found]))
    descend(part, mixed_LN)
    return mixed_LN


def refine(part: Part, home_LN: Homes, rng: np.random.Generator, share: float = 1.0) -> None:
    """Kick pairs of bins in place, one pair after another in random order."""
    pairs_Pb = np.array(list(combinations(range(part.num_bins), 2)))
    kicks = int(
        share
        * (KICKS if part.is_linear else CURVED_KICKS)
        * np.sqrt(part.num_layers * part.num_experts)
    )
    if part.num_bins > 2:
        shake(part, home_LN, rng, int(kicks * min(1.0, (SMALL / part.num_experts) ** 2)))
    visits = min(len(pairs_Pb), max(1, kicks // VISIT))
    for pair_b in rng.permutation(pairs_Pb)[:visits]:
        inner, index_Ln = part.restrict(home_LN, pair_b)
        inner_Ln = (np.take_along_axis(home_LN, index_Ln, 1) == pair_b[1]).astype(np.int64)
        shake(inner, inner_Ln, rng, kicks // visits)
        np.put_along_axis(home_LN, index_Ln, pair_b[inner_Ln], 1)
