"""EPLB: replicas for the busiest experts, packed so that ranks are level (deepseek-ai/EPLB).

E experts, S slots of all ranks together, I items, one layer.
"""

from __future__ import annotations

import numpy as np


def pack(load_I: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Items to packs of equal size, the largest first, each to the lightest pack with room.

    Args:
        load_I: [I] load of every item. num_packs: divides I; with I packs items stay in order.

    Returns:
        int64 [I] pack of every item, int64 [I] its place in the pack.

    Raises:
        ValueError: if I is not a multiple of num_packs.
    """
    num_items = len(load_I)
    if num_packs < 1 or num_items % num_packs:
        raise ValueError(
            f"num_packs ({num_packs}) must divide the {num_items} items; packs are of equal size"
        )
    if num_items == num_packs:
        return np.arange(num_items), np.zeros(num_items, dtype=np.int64)
    room = num_items // num_packs
    pack_I, place_I = np.zeros((2, num_items), dtype=np.int64)
    load_of, items_in = [0.0] * num_packs, [0] * num_packs
    for item in np.argsort(-load_I, kind="stable").tolist():
        open_packs = (pack for pack in range(num_packs) if items_in[pack] < room)
        lightest = min(open_packs, key=load_of.__getitem__)
        pack_I[item], place_I[item] = lightest, items_in[lightest]
        load_of[lightest] += float(load_I[item])
        items_in[lightest] += 1
    return pack_I, place_I


def replicate(load_E: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill slots with experts: one each, then one more of whichever has most load per copy.

    Args:
        load_E: [E] load of every expert. num_slots: S >= E.

    Returns:
        int64 [S] expert of every slot in the order given, int64 [E] copies of every expert.

    Raises:
        ValueError: for fewer slots than experts.
    """
    num_experts = len(load_E)
    if num_slots < num_experts:
        raise ValueError(
            f"num_slots ({num_slots}) must be >= {num_experts}, a slot for every expert"
        )
    copies_E = np.ones(num_experts, dtype=np.int64)
    expert_S = np.arange(num_slots)
    for slot in range(num_experts, num_slots):
        expert_S[slot] = (load_E / copies_E).argmax()
        copies_E[expert_S[slot]] += 1
    return expert_S, copies_E


def rebalance(
    load_E: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """EPLB's whole placement of experts and replicas, homes included.

    If nodes divide the groups of experts, groups are packed to nodes, experts replicated inside
    their node and the copies packed to its ranks (hierarchical policy); else all ranks are
    treated as one node and all experts as one group (global policy).

    Args:
        load_E: [E] load of every expert; consecutive ids form groups of equal size.
        num_slots: S, a multiple of num_ranks. num_ranks: a multiple of num_nodes.

    Returns:
        int64 [S] expert of every slot, rank after rank; int64 [E] copies of every expert.

    Raises:
        ValueError: for numbers that do not divide.
    """
    num_experts = len(load_E)
    for name, value, divisor_name, divisor in (
        ("num_experts", num_experts, "num_groups", num_groups),
        ("num_ranks", num_ranks, "num_nodes", num_nodes),
        ("num_slots", num_slots, "num_ranks", num_ranks),
    ):
        if divisor < 1 or value % divisor:
            raise ValueError(f"{divisor_name} ({divisor}) must divide {name} ({value})")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    experts_of_group = np.arange(num_experts).reshape(num_groups, -1)
    node_of_group, place_of_group = pack(load_E[experts_of_group].sum(axis=1), num_nodes)
    expert_S, copies_E = [], np.zeros(num_experts, dtype=np.int64)
    for node in range(num_nodes):
        groups = np.flatnonzero(node_of_group == node)
        groups = groups[np.argsort(place_of_group[groups])]
        experts = experts_of_group[groups].ravel()
        slots, copies = replicate(load_E[experts], num_slots // num_nodes)
        per_copy = load_E[experts] / copies
        rank, place = pack(per_copy[slots], num_ranks // num_nodes)
        expert_S.append(experts[slots[np.lexsort((place, rank))]])
        copies_E[experts] = copies
    return np.concatenate(expert_S), copies_E
