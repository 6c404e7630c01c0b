"""Starts of a placement search: chains, strands, and names that agree with costs.

L MoE layers, N experts of a layer, B bins of N/B places each, S strands.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from placement.solvers.moves import descend, grow, settle
from placement.solvers.part import Homes, Part

TRIES = 30  # of gathering strands


def chain(part: Part, rng: np.random.Generator) -> Homes:
    """A random layer, and all others grown from it, [L, N]."""
    middle = int(rng.integers(part.num_layers))
    home_LN = np.tile(rng.permutation(part.num_experts) // part.places, (part.num_layers, 1))
    if not part.is_linear:
        alone_NB = np.zeros((part.num_experts, part.num_bins))
        home_LN[middle] = settle(part, middle, alone_NB, home_LN[middle])
    grow(part, home_LN, middle, 0, part.num_layers - 1)
    return home_LN


def strands(part: Part, rng: np.random.Generator, width: int) -> Homes:
    """Narrow strands of experts through all layers, gathered into bins, [L, N].

    Args:
        width: experts of a strand and layer.
    """
    num_strands = part.num_experts // width
    narrow = replace(
        part,
        distance_BB=1.0 - np.eye(num_strands),
        linear_LNB=np.zeros((part.num_layers, part.num_experts, num_strands)),
        slowness_B=np.ones(num_strands),
        load_weight=0.0,
        limit_L=np.full(part.num_layers, np.inf),
    )
    strand_LN = chain(narrow, rng)
    descend(narrow, strand_LN)
    one_hot_LNS = np.eye(num_strands)[strand_LN]
    between_SS = np.zeros((num_strands, num_strands))
    for layer, one_hot_NS in enumerate(one_hot_LNS):
        if layer > 0:
            between_SS += one_hot_LNS[layer - 1].T @ part.pair_LNN[layer - 1] @ one_hot_NS
        if part.coactive_LNN is not None:
            between_SS += one_hot_NS.T @ part.coactive_LNN[layer] @ one_hot_NS / 2
    np.fill_diagonal(between_SS, 0)
    bundles = replace(
        narrow,
        distance_BB=part.distance_BB,
        pair_LNN=np.zeros((0, num_strands, num_strands)),
        coactive_LNN=(between_SS + between_SS.T)[None],
        linear_LNB=np.einsum("lns,lnb->sb", one_hot_LNS, part.linear_LNB, optimize=True)[None],
        load_LN=np.zeros((1, num_strands)),
        slowness_B=part.slowness_B,
        floor_L=np.zeros(1),
        limit_L=np.full(1, np.inf),
    )
    gathered = [chain(bundles, rng) for _ in range(TRIES)]
    return min(gathered, key=bundles.value)[0][strand_LN]


def mix(part: Part, homes_HLN: Homes) -> Homes:
    """The best placement that takes every layer from one of H others: a path through layers."""
    best_H, come_from_LH = np.zeros(len(homes_HLN)), []
    for layer in range(part.num_layers):
        step_HH = np.zeros((len(homes_HLN), len(homes_HLN)))  # from H of the layer before
        for here, home_LN in enumerate(homes_HLN):
            step_HH[:, here] = part.layer_value(layer, part.linear_LNB[layer], home_LN[layer])
        if layer > 0:
            for before, home_LN in enumerate(homes_HLN):
                back_NB = part.back(home_LN, layer)
                step_HH[before] += back_NB[part.row_N, homes_HLN[:, layer]].sum(1)
        step_HH += best_H[:, None]
        come_from_LH.append(step_HH.argmin(0))
        best_H = step_HH.min(0)
    choice = int(best_H.argmin())
    mixed_LN = np.empty_like(homes_HLN[0])
    for layer in range(part.num_layers - 1, -1, -1):
        mixed_LN[layer] = homes_HLN[choice, layer]
        choice = int(come_from_LH[layer][choice])
    return mixed_LN


def relabel(part: Part, home_LN: Homes, node_B: Homes) -> Homes:
    """Bins renamed so that linear costs are least; only bins of a node, and whole nodes."""
    one_hot_XB = np.eye(part.num_bins)[home_LN].reshape(-1, part.num_bins)
    cost_BB = one_hot_XB.T @ part.linear_LNB.reshape(-1, part.num_bins)
    bins_nb = np.argsort(node_B, kind="stable").reshape(node_B.max() + 1, -1)
    node_cost_nn = np.zeros((len(bins_nb), len(bins_nb)))
    name_nnb = np.empty((*node_cost_nn.shape, bins_nb.shape[1]), dtype=np.int64)
    for old, old_b in enumerate(bins_nb):
        for new, new_b in enumerate(bins_nb):
            row_b, column_b = linear_sum_assignment(cost_BB[np.ix_(old_b, new_b)])
            name_nnb[old, new] = new_b[column_b]
            node_cost_nn[old, new] = cost_BB[old_b[row_b], name_nnb[old, new]].sum()
    name_B = np.empty(part.num_bins, dtype=np.int64)
    for old, new in zip(*linear_sum_assignment(node_cost_nn), strict=True):
        name_B[bins_nb[old]] = name_nnb[old, new]
    return name_B[home_LN]
