"""EPLB's published vectors, and replicas that stay for a window of steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.planners.home import home_plan
from parallel.planners.replicated import Replicated, choose_copies
from parallel.planners.stateful import StatefulPlanner
from placement.replicas import Replicas
from placement.table import ExpertPlacement
from placement.topology import Topology
from tests.parallel.eplb import pack, rebalance, replicate

# The example of EPLB's README: two layers, 12 experts, 16 slots on 8 ranks.
LOADS = (
    np.array([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]),
    np.array([20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]),
)


@pytest.mark.parametrize(
    ("layer", "num_groups", "slots", "copies", "load_R"),
    [
        (
            0,
            4,
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
            [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152],
        ),
        (
            1,
            4,
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
            [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
            [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5],
        ),
        (
            0,
            3,
            [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
            [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
            [130.5, 95.5, 130, 138, 138.5, 134.5, 134, 132],
        ),
        (
            1,
            3,
            [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
            [1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1],
            [123, 123, 125.5, 118.5, 172, 157.5, 172, 164.5],
        ),
    ],
    ids=["layer 0 hierarchical", "layer 1 hierarchical", "layer 0 global", "layer 1 global"],
)
def test_eplb_example(
    layer: int, num_groups: int, slots: list[int], copies: list[int], load_R: list[float]
) -> None:
    load_E = LOADS[layer]
    expert_S, copies_E = rebalance(load_E, 16, num_groups, num_nodes=2, num_ranks=8)
    assert expert_S.tolist() == slots
    assert copies_E.tolist() == copies
    assert (load_E / copies_E)[expert_S].reshape(8, 2).sum(axis=1).tolist() == load_R


def test_eplb_parts() -> None:
    pack_I, place_I = pack(np.array([1, 9, 2, 8, 3, 7]), 2)  # 9 | 8 7, then the first has room
    assert pack_I.tolist() == [1, 0, 0, 1, 0, 1]
    assert place_I.tolist() == [2, 0, 2, 0, 1, 1]
    assert pack(np.array([1, 9, 2]), 3)[0].tolist() == [0, 1, 2]
    expert_S, copies_E = replicate(np.array([10, 30, 5]), 6)  # 30, then 15 twice over 10
    assert expert_S.tolist() == [0, 1, 2, 1, 1, 0]
    assert copies_E.tolist() == [2, 3, 1]


def test_eplb_numbers_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"num_packs \(4\) must divide the 6 items"):
        pack(np.ones(6), 4)
    with pytest.raises(ValueError, match=r"num_slots \(5\) must be >= 6"):
        replicate(np.ones(6), 5)
    with pytest.raises(ValueError, match=r"num_ranks \(3\) must divide num_slots \(16\)"):
        rebalance(LOADS[0], 16, 4, num_nodes=1, num_ranks=3)
    with pytest.raises(ValueError, match=r"num_groups \(5\) must divide num_experts \(12\)"):
        rebalance(LOADS[0], 16, 5, num_nodes=1, num_ranks=8)
    with pytest.raises(ValueError, match=r"num_nodes \(3\) must divide num_ranks \(8\)"):
        rebalance(LOADS[0], 16, 4, num_nodes=3, num_ranks=8)


@settings(deadline=None, max_examples=100)
@given(
    ranks_per_node=st.integers(1, 4),
    num_nodes=st.integers(1, 3),
    experts_per_rank=st.integers(1, 4),
    slots=st.integers(1, 3),
    sparsity=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 10_000),
)
def test_copies_fill_slots_and_level(
    ranks_per_node: int,
    num_nodes: int,
    experts_per_rank: int,
    slots: int,
    sparsity: float,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    num_ranks = ranks_per_node * num_nodes
    num_experts = num_ranks * experts_per_rank
    node_of_R = np.arange(num_ranks) % num_nodes
    load_E = generator.random(num_experts) ** 4 * (generator.random(num_experts) >= sparsity)
    home_E = generator.permutation(num_experts) % num_ranks

    expert_N, rank_N = choose_copies(load_E, home_E, node_of_R.tolist(), slots).T

    assert len(set(zip(expert_N.tolist(), rank_N.tolist(), strict=True))) == len(expert_N)
    assert (home_E[expert_N] != rank_N).all()
    assert (node_of_R[home_E[expert_N]] == node_of_R[rank_N]).all()
    assert (load_E[expert_N] > 0).all()
    copies_R = np.bincount(rank_N, minlength=num_ranks)
    assert (copies_R <= slots).all()
    for rank in np.flatnonzero(copies_R < slots):  # it holds all of its node that is ever chosen
        chosen = (node_of_R[home_E] == node_of_R[rank]) & (load_E > 0)
        assert set(np.flatnonzero(chosen)) <= {
            *np.flatnonzero(home_E == rank),
            *expert_N[rank_N == rank],
        }


@pytest.mark.parametrize("seed", range(50))
def test_the_experts_copied_are_those_of_eplb(seed: int) -> None:
    """But for the last slot, whose rank may be the home of the expert whose turn it is."""
    generator = np.random.default_rng(seed)
    load_E = generator.dirichlet(np.ones(64))
    home_E = generator.permutation(64) % 8
    _, copies_E = replicate(load_E, 64 + 8)
    ours = choose_copies(load_E, home_E, [0] * 8, 1)
    different = np.abs(1 + np.bincount(ours[:, 0], minlength=64) - copies_E).sum()
    assert different <= 2


def skewed(seed: int, num_ranks: int, num_experts: int, tokens: int = 500) -> Tensor:
    """Counts of one micro-batch: a few hot experts, the same for every seed, and noise."""
    share_E = 1 / torch.arange(1, num_experts + 1).double()
    share_E = share_E[torch.randperm(num_experts, generator=torch.Generator().manual_seed(7))]
    generator = torch.Generator().manual_seed(seed)
    rows_RT = torch.multinomial(share_E.expand(num_ranks, -1), tokens, True, generator=generator)
    return torch.stack([rows_T.bincount(minlength=num_experts) for rows_T in rows_RT])


HOME = torch.arange(16) // 4


def ratio(load_R: Tensor) -> float:
    return float(load_R.max() / load_R.double().mean())


def test_no_copies_before_a_step_was_learned_from() -> None:
    planner = Replicated(slots=2)
    assert isinstance(planner, StatefulPlanner)
    counts_RE = skewed(0, 4, 16)
    for _ in range(2):
        plan = planner(counts_RE, HOME)
        assert torch.equal(plan.rows, home_plan(counts_RE, HOME).rows)
        assert not len(plan.borrowed)
        planner.next_step([])


def test_copies_stay_for_a_window_and_follow_the_load() -> None:
    planner = Replicated(slots=1, window=3, decay=0.0).for_layer(0)
    hot_first, hot_last = skewed(0, 4, 16), skewed(0, 4, 16).flip(1)
    planner.next_step([])
    planner(hot_first, HOME)
    held = []
    for counts_RE in [hot_first, hot_last, hot_last, hot_last, hot_last]:
        planner.next_step([counts_RE, counts_RE])
        plans = [planner(counts_RE, HOME), planner(counts_RE.flip(0), HOME)]
        assert torch.equal(plans[0].borrowed, plans[1].borrowed)
        assert all(plan.keep for plan in plans)
        held.append(plans[0].borrowed.tolist())
    assert len(held[0]) == len(held[3]) == 4
    assert held[0] == held[1] == held[2] != held[3] == held[4]
    hottest_first, hottest_last = int(hot_first.sum(0).argmax()), int(hot_last.sum(0).argmax())
    assert hottest_first in [expert for expert, _, _ in held[0]]
    assert hottest_last in [expert for expert, _, _ in held[3]]


def test_decay_weighs_the_past() -> None:
    """After a step of other hot experts, a long memory still replicates the old ones."""
    for decay, remembers in ((0.9, True), (0.1, False)):
        planner = Replicated(slots=1, window=1, decay=decay)
        old, new = skewed(0, 4, 16), skewed(0, 4, 16).flip(1)
        for counts_RE in (old, old, new):
            planner.next_step([counts_RE])
        borrowed = planner(new, HOME).borrowed[:, 0].tolist()
        assert (int(old.sum(0).argmax()) in borrowed) == remembers
        assert (int(new.sum(0).argmax()) in borrowed) != remembers


def given_copies(*copies: tuple[int, int], layers: int = 1) -> Replicas:
    """The same copies in every layer, for the homes of HOME."""
    table = np.array(sorted(copies), dtype=np.int64).reshape(-1, 2)
    return Replicas(ExpertPlacement(HOME.repeat(layers, 1), 4), (table,) * layers)


def held(planner: Replicated, home_E: Tensor = HOME) -> list[list[int]]:
    """(expert, borrower) of a plan that is right."""
    counts_RE = skewed(0, 4, 16)
    plan = planner(counts_RE, home_E)
    plan.check(counts_RE, home_E)
    assert plan.keep
    return plan.borrowed[:, [0, 2]].tolist()


def test_copies_given_are_held_from_the_first_step_for_a_window(tmp_path: Path) -> None:
    hot = int(skewed(0, 4, 16).sum(0).argmax())
    other = int(HOME[hot] + 1) % 4
    given_copies((hot, other), layers=2).save(tmp_path / "copies.json")
    planner = Replicated(1, window=2, copies=str(tmp_path / "copies.json")).for_layer(1)
    by_load = Replicated(1, window=2).for_layer(1)
    seen: list[list[list[int]]] = []
    for _ in range(5):
        planner.next_step([skewed(0, 4, 16)] if seen else [])
        seen.append(held(planner))
    by_load.next_step([skewed(0, 4, 16)])
    assert seen[0] == seen[1] == [[hot, other]]
    assert seen[2] == seen[3] == seen[4] == held(by_load) != seen[0]
    level = ratio(planner.for_layer(0)(skewed(0, 4, 16), HOME).load_R())
    assert level < ratio(home_plan(skewed(0, 4, 16), HOME).load_R())


def test_without_a_window_copies_given_stay_for_good() -> None:
    planner = Replicated(1, window=None, copies=given_copies((0, 3), (5, 0)))
    for _ in range(20):
        assert held(planner) == [[0, 3], [5, 0]]
        planner.next_step([skewed(0, 4, 16).flip(1)])


def test_every_layer_holds_its_own_copies() -> None:
    tables = tuple(np.array([[expert, 3]]) for expert in (0, 1))
    planner = Replicated(1, copies=Replicas(ExpertPlacement(HOME.repeat(2, 1), 4), tables))
    assert [held(planner.for_layer(layer)) for layer in (0, 1)] == [[[0, 3]], [[1, 3]]]
    with pytest.raises(ValueError, match="of 2 MoE layers x 16 experts on 4 ranks, but layer 2"):
        held(planner.for_layer(2))
    for counts_RE, home_E in ((skewed(0, 4, 8), HOME[::2]), (skewed(0, 8, 16), HOME * 2)):
        with pytest.raises(ValueError, match="of 2 MoE layers x 16 experts on 4 ranks, but"):
            planner(counts_RE, torch.arange(len(home_E)) // (len(home_E) // len(counts_RE)))


def test_given_copies_that_came_home_or_left_their_node_are_left_out() -> None:
    topology = Topology((0, 0, 1, 1), 400.0, 50.0, 1e12)
    table = given_copies((0, 1), (12, 2), (13, 2))
    moved_E = HOME.clone()
    moved_E[[0, 4]] = moved_E[[4, 0]]  # expert 0 is now at home on rank 1
    moved_E[[1, 13]] = moved_E[[13, 1]]  # and expert 13 on rank 0, another node than its copy
    anywhere = Replicated(2, copies=table).for_topology(topology)
    inside = Replicated(2, copies=table, within_node=True).for_topology(topology)
    assert held(anywhere) == held(inside) == [[0, 1], [12, 2], [13, 2]]
    assert held(anywhere, moved_E) == [[12, 2], [13, 2]]
    assert held(inside, moved_E) == [[12, 2]]
    assert held(anywhere) == [[0, 1], [12, 2], [13, 2]]  # and back


def test_given_copies_that_do_not_fit_are_refused() -> None:
    table = given_copies((0, 3), (1, 3))
    with pytest.raises(ValueError, match=r"planner.slots \(1\) must be >= 2, the most that"):
        Replicated(1, copies=table)
    with pytest.raises(ValueError, match=r"planner.window \(null\) keeps planner.copies for good"):
        Replicated(1, window=None)
    with pytest.raises(ValueError, match="for 4 ranks, the expert-parallel group has 2"):
        Replicated(2, copies=table).for_topology(Topology((0, 0), 400.0, 50.0, 1e12))
    inside = Replicated(2, copies=table, within_node=True)
    with pytest.raises(ValueError, match="expert 0 of layer 0 on rank 3, off its home's node"):
        inside.for_topology(Topology((0, 0, 1, 1), 400.0, 50.0, 1e12))
    with pytest.raises(ValueError, match=r"replicas none.json: not a readable replicas file"):
        Replicated(2, copies="none.json")


def test_level_on_steady_skew() -> None:
    planner = Replicated(slots=2, window=4)
    for step in range(6):
        counts = [skewed(10 * step + micro, 4, 16) for micro in range(3)]
        for counts_RE in counts:
            plan = planner(counts_RE, HOME)
            plan.check(counts_RE, HOME)
            home_ratio = ratio(home_plan(counts_RE, HOME).load_R())
            assert home_ratio > 1.4
            if step:
                assert ratio(plan.load_R()) <= 1.011
        planner.next_step(counts)


@settings(deadline=None, max_examples=50)
@given(
    ranks_per_node=st.integers(1, 3),
    num_nodes=st.integers(1, 2),
    experts_per_rank=st.integers(1, 4),
    slots=st.integers(1, 2),
    within_node=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_exact_and_the_same_on_every_rank(
    ranks_per_node: int,
    num_nodes: int,
    experts_per_rank: int,
    slots: int,
    within_node: bool,
    seed: int,
) -> None:
    """Also when the homes change between steps, or eval batches come between."""
    num_ranks = ranks_per_node * num_nodes
    num_experts = num_ranks * experts_per_rank
    node_of_R = tuple(rank // ranks_per_node for rank in range(num_ranks))
    topology = Topology(node_of_R, 400.0, 50.0, 1e12)
    planner = Replicated(slots, window=2, within_node=within_node).for_topology(topology)
    here, there = planner.for_layer(0), planner.for_layer(0)
    generator = torch.Generator().manual_seed(seed)
    counts: list[Tensor] = []
    for step in range(5):
        here.next_step(counts)
        there.next_step(counts)
        if step % 2 == 0:
            home_E = torch.randperm(num_experts, generator=generator) % num_ranks
        counts = [skewed(seed + 10 * step + micro, num_ranks, num_experts, 30) for micro in (0, 1)]
        for counts_RE in counts:
            plan, other = here(counts_RE, home_E), there(counts_RE, home_E)
            plan.check(counts_RE, home_E)
            assert torch.equal(plan.rows, other.rows)
            assert torch.equal(plan.borrowed, other.borrowed)
            assert plan.load_R().max() <= home_plan(counts_RE, home_E).load_R().max()
            assert plan.borrowed[:, 2].bincount(minlength=num_ranks).max() <= slots
            if within_node:
                node = torch.tensor(node_of_R)
                assert torch.equal(node[plan.borrowed[:, 1]], node[plan.borrowed[:, 2]])
    assert not len(planner(counts_RE, home_E).borrowed)  # it learned nothing from its copies


@pytest.mark.parametrize(
    ("slots", "window", "decay", "message"),
    [
        (0, 1, 0.5, r"planner.slots \(0\) must be >= 1"),
        (1, 0, 0.5, r"planner.window \(0\) must be >= 1"),
        (1, 1, 1.0, r"planner.decay \(1.0\) must be >= 0 and < 1"),
    ],
)
def test_impossible_settings(slots: int, window: int, decay: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Replicated(slots, window=window, decay=decay)


def test_one_planner_for_layers_of_different_size() -> None:
    planner = Replicated(1)
    planner.next_step([skewed(0, 4, 16)])
    with pytest.raises(ValueError, match="has 8 experts, the steps before had 16; take a planner"):
        planner(skewed(0, 4, 8), torch.arange(8) // 2)
