"""Hard limits of a placement search: loads packed evenly, and a price on moves.

L MoE layers, N experts of a layer, B bins of N/B places each.
"""

from __future__ import annotations

import time

import numpy as np

from placement.solvers.moves import TOLERANCE, descend, settle, swap_changes
from placement.solvers.part import Floats, Homes, Part

TRIES = 200  # of packing a layer
JITTER = 0.5  # of loads that are packed
PRICES = 12  # of a move that are tried
LEAST_PRICE = -30  # of a move, a power of 2 of a part's scale


def even_out(part: Part, home_LN: Homes, rng: np.random.Generator) -> Homes:
    """The placement with loads within their limits, layer by layer, by swaps or a new packing."""
    home_LN = home_LN.copy()
    for layer in range(part.num_layers):
        if not part.layer_excess(layer, home_LN[layer]):
            continue
        cost_NB = part.back(home_LN, layer) + part.ahead(home_LN, layer) + part.linear_LNB[layer]
        best_N = settle(part, layer, cost_NB, home_LN[layer])
        for number in range(TRIES):
            if not part.layer_excess(layer, best_N):
                break
            jitter_N = rng.uniform(1 - JITTER, 1 + JITTER, part.num_experts) if number else 1.0
            home_N = pack(part.load_LN[layer] * jitter_N, part.num_bins)
            home_N = settle(part, layer, cost_NB, home_N)
            if part.layer_excess(layer, home_N) < part.layer_excess(layer, best_N):
                best_N = home_N
        home_LN[layer] = best_N
    return home_LN


def pack(load_N: Floats, num_bins: int) -> Homes:
    """Experts in descending order of load, each to the least loaded bin with a free place."""
    home_N = np.empty(len(load_N), dtype=np.int64)
    load_B, free_B = np.zeros(num_bins), np.full(num_bins, len(load_N) // num_bins)
    for expert in np.argsort(-load_N, kind="stable"):
        home = int(np.where(free_B > 0, load_B, np.inf).argmin())
        home_N[expert] = home
        load_B[home] += load_N[expert]
        free_B[home] -= 1
    return home_N


def prohibitive_price(part: Part) -> float:
    """About the least price of a move at which a descent from the start moves nothing."""
    low, high = float(LEAST_PRICE), 0.0  # exponents; at 0 a move costs as much as a layer
    for _ in range(PRICES):
        exponent = (low + high) / 2
        home_LN = part.start_LN.copy()
        descend(part.priced(part.scale * 2**exponent), home_LN)
        if part.moves(home_LN):
            low = exponent
        else:
            high = exponent
    return float(part.scale * 2**high)


def spend(part: Part, home_LN: Homes) -> Homes:
    """The placement after swaps of two experts of a layer, the best first, within `max_moves`."""
    home_LN = home_LN.copy()
    left = part.max_moves - part.moves(home_LN)
    swaps: list[tuple[float, int, int, int]] = []  # change, layer and experts of its best swap
    stale = range(part.num_layers)
    while time.monotonic() < part.deadline:
        swaps = [swap for swap in swaps if swap[1] not in stale]
        swaps += [best_swap(part, home_LN, layer, left) for layer in stale]
        change, layer, one, other = min(swaps)
        if change >= -TOLERANCE * part.scale:
            break
        home_LN[layer, [one, other]] = home_LN[layer, [other, one]]
        now_left = part.max_moves - part.moves(home_LN)
        stale = range(max(layer - 1, 0), min(layer + 2, part.num_layers))
        if now_left < 2 or left < 2:
            stale = range(part.num_layers)
        left = now_left
    return home_LN


def best_swap(part: Part, home_LN: Homes, layer: int, left: int) -> tuple[float, int, int, int]:
    """What the best swap of a layer changes that moves at most `left` more experts, and it."""
    home_N, start_N = home_LN[layer], part.start_LN[layer]
    cost_NB = part.back(home_LN, layer) + part.ahead(home_LN, layer) + part.linear_LNB[layer]
    change_NN = swap_changes(part, layer, cost_NB, home_N)
    if left < 2:
        leaves_NN = (home_N[None, :] != start_N[:, None]) * 1 - (home_N != start_N)[:, None]
        change_NN[leaves_NN + leaves_NN.T > left] = 0.0
    one, other = divmod(int(change_NN.argmin()), part.num_experts)
    return float(change_NN[one, other]), layer, one, other
