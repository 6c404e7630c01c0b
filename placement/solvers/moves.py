"""Moves of a placement search: layers put in place exactly or by swaps, and kicks.

L MoE layers, N experts of a layer, B bins of N/B places each.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from placement.solvers.part import Floats, Homes, Part

TOLERANCE = 1e-10  # of a part's scale: no gain
PATIENCE = 0.02  # of a part's scale: the loss that the first of many kicks may leave
SHUFFLED, REACH = 0.4, 20  # at most, of a kick: share of a layer's experts; layers on either side


def assign(cost_NB: Floats) -> Homes:
    """The cheapest way to fill all places of all bins, [N]."""
    num_experts, num_bins = cost_NB.shape
    places = num_experts // num_bins
    if num_bins == 2:
        home_N = np.ones(num_experts, dtype=np.int64)
        home_N[np.argpartition(cost_NB[:, 0] - cost_NB[:, 1], places - 1)[:places]] = 0
        return home_N
    return linear_sum_assignment(np.repeat(cost_NB, places, axis=1))[1] // places


def swap_changes(part: Part, layer: int, cost_NB: Floats, home_N: Homes) -> Floats:
    """What swapping any two experts of a layer adds to its value, [N, N]."""
    if part.coactive_LNN is not None:
        cost_NB = cost_NB + part.coactive_LNN[layer] @ part.distance_BB[home_N]
    extra_NN = (cost_NB - cost_NB[part.row_N, home_N][:, None])[:, home_N]
    change_NN = extra_NN + extra_NN.T
    if part.coactive_LNN is not None:
        change_NN += 2 * part.coactive_LNN[layer] * part.distance_BB[home_N][:, home_N]
    if part.load_weight or part.is_limited:
        change_NN += _load_changes(part, layer, home_N)
    return change_NN


def _load_changes(part: Part, layer: int, home_N: Homes) -> Floats:
    load_N, limit = part.load_LN[layer], part.limit_L[layer]
    load_B = np.bincount(home_N, load_N, part.num_bins)
    before_N = load_B[home_N]
    after_NN = (before_N - load_N)[:, None] + load_N
    change_NN = np.zeros_like(after_NN)
    if part.is_limited:
        more_NN = np.maximum(after_NN - limit, 0) - np.maximum(before_N - limit, 0)[:, None]
        change_NN += part.excess_price * (more_NN + more_NN.T)
    if part.load_weight:
        seconds_B = load_B * part.slowness_B
        after_NN *= part.slowness_B[home_N][:, None]
        busiest_NN = np.maximum(after_NN, after_NN.T)
        others_BB = np.maximum(_busiest_others(seconds_B), part.floor_L[layer])
        np.maximum(busiest_NN, others_BB[home_N][:, home_N], out=busiest_NN)
        busiest = max(float(seconds_B.max()), float(part.floor_L[layer]))
        change_NN += part.load_weight * (busiest_NN - busiest)
    change_NN[home_N[:, None] == home_N] = 0.0
    return change_NN


def _busiest_others(seconds_B: Floats) -> Floats:
    """Seconds of the busiest bin but for any two, [B, B]."""
    if len(seconds_B) <= 2:
        return np.zeros((len(seconds_B), len(seconds_B)))
    third, second, first = np.argsort(seconds_B)[-3:]
    others_BB = np.full((len(seconds_B), len(seconds_B)), seconds_B[first])
    others_BB[first], others_BB[:, first] = seconds_B[second], seconds_B[second]
    others_BB[first, second] = others_BB[second, first] = seconds_B[third]
    return others_BB


def settle(part: Part, layer: int, cost_NB: Floats, home_N: Homes) -> Homes:
    """Swap two experts of a layer, always the best two, until no swap gains."""
    home_N = home_N.copy()
    while True:
        change_NN = swap_changes(part, layer, cost_NB, home_N)
        best = int(change_NN.argmin())
        if change_NN.flat[best] >= -TOLERANCE * part.scale:
            return home_N
        one, other = divmod(best, part.num_experts)
        home_N[one], home_N[other] = home_N[other], home_N[one]


def improve(part: Part, layer: int, cost_NB: Floats, home_N: Homes) -> tuple[Homes, float]:
    """A layer after assignment or swaps, whichever is better, and the gain.

    Args:
        cost_NB: of every bin for every expert on its own, towards other layers included.
    """
    if part.coactive_LNN is None:
        assigned_N = assign(cost_NB)
        if part.is_linear or not (part.load_weight or part.layer_excess(layer, assigned_N)):
            return assigned_N, gain_of(part, layer, cost_NB, home_N, assigned_N)
    else:
        assigned_N = assign(cost_NB + part.coactive_LNN[layer] @ part.distance_BB[home_N])
    for start_N in (assigned_N, home_N):
        end_N = settle(part, layer, cost_NB, start_N)
        gain = gain_of(part, layer, cost_NB, home_N, end_N)
        if gain > TOLERANCE * part.scale:
            break
    return end_N, gain


def gain_of(part: Part, layer: int, cost_NB: Floats, old_N: Homes, new_N: Homes) -> float:
    """How much less a layer costs after a change."""
    if part.is_linear:
        return float((cost_NB[part.row_N, old_N] - cost_NB[part.row_N, new_N]).sum())
    return part.layer_value(layer, cost_NB, old_N) - part.layer_value(layer, cost_NB, new_N)


def descend(part: Part, home_LN: Homes, stale_L: npt.NDArray[np.bool_] | None = None) -> float:
    """Improve layer by layer in place, to and fro, until none gains; returns the gain.

    Args:
        stale_L: layers to look at, all without it. One that changes makes its neighbours stale.
    """
    stale_L = np.ones(part.num_layers, dtype=np.bool_) if stale_L is None else stale_L.copy()
    total, order = 0.0, range(part.num_layers)
    while stale_L.any() and time.monotonic() < part.deadline:
        for layer in order:
            if not stale_L[layer]:
                continue
            cost_NB = part.back(home_LN, layer) + part.ahead(home_LN, layer)
            cost_NB += part.linear_LNB[layer]
            home_N, gain = improve(part, layer, cost_NB, home_LN[layer])
            if gain > TOLERANCE * part.scale:
                total += gain
                home_LN[layer] = home_N
                stale_L[max(layer - 1, 0) : layer + 2] = True
            stale_L[layer] = False
        order = order[::-1]
    return total


def grow(part: Part, home_LN: Homes, middle: int, low: int, high: int) -> float:
    """Let layers low..high follow the middle one in place, each given only the one towards it.

    A group of experts that changed bins in the middle so takes those that follow it along.
    Returns the gain.
    """
    gain = 0.0
    for layer in [*range(middle - 1, low - 1, -1), *range(middle + 1, high + 1)]:
        back_NB, ahead_NB = part.back(home_LN, layer), part.ahead(home_LN, layer)
        linear_NB = part.linear_LNB[layer]
        towards_NB = linear_NB + (ahead_NB if layer < middle else back_NB)
        home_N, _ = improve(part, layer, towards_NB, home_LN[layer])
        cost_NB = linear_NB + back_NB + ahead_NB
        gain += gain_of(part, layer, cost_NB, home_LN[layer], home_N)
        home_LN[layer] = home_N
    return gain


def kick(part: Part, home_LN: Homes, rng: np.random.Generator) -> float:
    """Shuffle some experts of a layer in place, let near layers follow, descend; the gain."""
    middle = int(rng.integers(part.num_layers))
    count = max(2, int(part.num_experts * rng.uniform(0, SHUFFLED)))
    chosen_n = rng.choice(part.num_experts, count, replace=False)
    home_N = home_LN[middle].copy()
    home_N[chosen_n] = home_N[rng.permutation(chosen_n)]
    cost_NB = part.back(home_LN, middle) + part.ahead(home_LN, middle) + part.linear_LNB[middle]
    gain = gain_of(part, middle, cost_NB, home_LN[middle], home_N)
    home_LN[middle] = home_N
    low = max(0, middle - int(rng.integers(REACH)))
    high = min(part.num_layers - 1, middle + int(rng.integers(REACH)))
    gain += grow(part, home_LN, middle, low, high)
    stale_L = np.zeros(part.num_layers, dtype=np.bool_)
    stale_L[max(low - 1, 0) : high + 2] = True
    return gain + descend(part, home_LN, stale_L)


def shake(part: Part, home_LN: Homes, rng: np.random.Generator, kicks: int) -> float:
    """Kick a placement in place again and again; returns the gain, never a loss.

    What costs a little more is kept, less and less of it, and the best is returned to.
    """
    now = best = 0.0
    kept_LN, best_LN = home_LN.copy(), home_LN.copy()
    for number in range(kicks):
        if time.monotonic() > part.deadline:
            break
        gain = kick(part, home_LN, rng)
        patience = PATIENCE * part.scale * (1 - number / kicks)
        if gain < -patience or part.moves(home_LN) > part.max_moves:
            home_LN[:] = kept_LN
            continue
        now += gain
        kept_LN[:] = home_LN
        if now > best + TOLERANCE * part.scale:
            best = now
            best_LN[:] = home_LN
    home_LN[:] = best_LN
    return best
