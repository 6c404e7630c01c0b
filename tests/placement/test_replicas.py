"""Chosen copies: against all copy sets of tiny instances, by hand, against the simulator."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planners import Replicated
from placement.objective import ExpertShape, cost
from placement.replicas import Replicas
from placement.replicate import JUDGED, choose_replicas
from placement.simulate import expected_rows, simulate_trace
from placement.stats import RoutingStats
from placement.sweep.replicas import main
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import GIGABIT, Topology
from placement.traffic import sources_of

SHAPE = ExpertShape(hidden=100, parameters=1000, bytes_per_value=2)


@pytest.fixture(scope="module", autouse=True)
def hardly_any_kicks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("placement.replicate.JUDGED", 50)
        yield


def nodes(node_of_R: tuple[int, ...], **more: Any) -> Topology:
    """8 Gbit/s within a node, 0.8 across."""
    return Topology(node_of_R, 8.0, 0.8, 1e9, **more)


def of_counts(rows_LRE: Any) -> RoutingStats:
    """Statistics of tokens with one choice each."""
    rows = torch.tensor(rows_LRE, dtype=torch.float64)
    layers, ranks, experts = rows.shape
    stats = RoutingStats(layers, experts, ranks)
    stats.source_LRE.copy_(rows)
    stats.load_LE.copy_(rows.sum(1))
    stats.tokens, stats.top_k = float(rows[0].sum()), 1
    return stats


def synthetic(num_ranks: int, top_k: int, num_experts: int = 8, seed: int = 0) -> RoutingStats:
    router = SyntheticRouter(2, num_experts, "domain", skew=1.0, seed=seed)
    return RoutingStats.of_trace(router.sample(12, 40, top_k), 1).with_sources(num_ranks)


def pairs(replicas: Replicas, layer: int = 0) -> list[tuple[int, int]]:
    return [(expert, rank) for expert, rank in replicas.copies_LN2[layer].tolist()]


# ---------------------------------------------------------------- against all copy sets


def seconds_of(
    placement: ExpertPlacement,
    rows_RE: np.ndarray,
    topology: Topology,
    copies: list[tuple[int, int]],
    steps: float,
) -> float:
    """Row by row what the real planner makes of these copies in its first step."""
    table = np.array(sorted(copies), dtype=np.int64).reshape(-1, 2)
    planner = Replicated(9, copies=Replicas(placement, (table,))).for_topology(topology)
    plan = planner.for_layer(0)(torch.from_numpy(rows_RE), placement.home_LE[0])
    node_R, num_ranks = topology.node_of_R, topology.num_ranks

    def seconds_per_byte(one: int, other: int) -> float:
        if one == other:
            return 0.0
        gbps = topology.intra_gbps
        if node_R[one] != node_R[other]:
            links_NN = topology.inter_gbps_NN
            gbps = links_NN[node_R[one]][node_R[other]] if links_NN else topology.inter_gbps
        return 1 / (gbps * GIGABIT)

    busy_R, ways = [0.0] * num_ranks, 0.0
    for _, source, rank, rows in plan.rows.tolist():
        speed = topology.flops_R[rank] if topology.flops_R else topology.flops
        busy_R[rank] += rows * 6 * SHAPE.parameters / speed
        ways += 4 * rows * SHAPE.hidden * SHAPE.bytes_per_value * seconds_per_byte(source, rank)
    relay: dict[tuple[int, int], int] = {}
    for expert, home, rank in plan.borrowed.tolist():
        sender = home
        if node_R[rank] != node_R[home]:
            sender = relay.setdefault((expert, node_R[rank]), rank)
            sender = home if sender == rank else sender
        ways += steps * SHAPE.parameters * (2 + 4) * seconds_per_byte(sender, rank)
    return max(busy_R) + ways / num_ranks


def all_copy_sets(placement: ExpertPlacement) -> list[list[tuple[int, int]]]:
    """Every way to give every rank no copy or one."""
    ranks, home_E = range(placement.num_ranks), placement.home_LE[0].tolist()
    choices = [[None, *(e for e, h in enumerate(home_E) if h != rank)] for rank in ranks]
    return [
        [(expert, rank) for rank, expert in enumerate(held) if expert is not None]
        for held in product(*choices)
    ]


TINY = [
    (2, nodes((0, 0))),
    (4, nodes((0, 1))),
    (3, nodes((0, 0, 1), flops_R=(1e9, 3e9, 5e8))),
    (3, nodes((0, 1, 2), inter_gbps_NN=((0, 0.8, 0.1), (0.8, 0, 2.0), (0.1, 2.0, 0)))),
    (4, nodes((0, 0, 1, 1))),
    (4, nodes((0, 1, 0, 1), flops_R=(1e9, 2e9, 1e9, 1e8))),
]


@pytest.mark.parametrize("case", range(len(TINY)))
def test_the_best_of_all_copy_sets_is_found(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placement.replicate.JUDGED", JUDGED)
    num_experts, topology = TINY[case]
    rng = np.random.default_rng(case)
    for steps in (0.0, 30.0, 0.0, 200.0):
        home_E = torch.from_numpy(rng.permutation(num_experts) % topology.num_ranks)
        placement = ExpertPlacement(home_E[None], topology.num_ranks)
        share_RE = rng.dirichlet(np.full(num_experts, 0.5), topology.num_ranks)
        rows_RE = np.rint(2000 * share_RE).astype(np.int64)
        stats = of_counts(rows_RE[None].tolist())
        chosen = choose_replicas(
            placement, stats, topology, Replicated(1), steps=steps, shape=SHAPE
        )
        found = seconds_of(placement, rows_RE, topology, pairs(chosen.replicas), steps)
        assert chosen.cost.seconds == pytest.approx(found)
        best = min(
            seconds_of(placement, rows_RE, topology, copies, steps)
            for copies in all_copy_sets(placement)
        )
        assert found == pytest.approx(best, rel=1e-9)


# ---------------------------------------------------------------- by hand


def test_a_hot_expert_comes_to_the_node_of_its_sources() -> None:
    """Expert 0 lives on node 0, but nearly all of its rows come from node 1, most from rank 3."""
    rows_RE = np.array([[40, 50, 40, 40], [40, 40, 50, 40], [400, 50, 40, 40], [900, 40, 40, 50]])
    placement, stats = ExpertPlacement.contiguous(1, 4, 4), of_counts(rows_RE[None].tolist())
    chosen = choose_replicas(placement, stats, nodes((0, 0, 1, 1)), Replicated(1), shape=SHAPE)
    assert {rank for expert, rank in pairs(chosen.replicas) if expert == 0} >= {2, 3}
    without, found = chosen.without, chosen.cost
    assert without.rows_inter == (40 + 40 + 50 + 40) + (400 + 50 + 900 + 40)
    assert found.rows_inter < without.rows_inter / 2
    assert found.load_ratio_L[0] < 1.3 < without.load_ratio_L[0]


def test_slow_ranks_get_no_copies() -> None:
    """The planner would give every holder as many rows, so none goes to the slowest rank."""
    stats = of_counts([[[600, 10, 10], [10, 10, 10], [10, 10, 10]]])
    placement = ExpertPlacement.contiguous(1, 3, 3)
    for slow in (1, 2):
        flops_R = tuple(2e8 if rank == slow else 1e9 for rank in range(3))
        topology = nodes((0, 0, 0), flops_R=flops_R)
        chosen = choose_replicas(placement, stats, topology, Replicated(1), shape=SHAPE)
        assert [rank for expert, rank in pairs(chosen.replicas) if expert == 0] == [3 - slow]
        assert chosen.cost.seconds < chosen.without.seconds < chosen.by_load.seconds


def test_copies_that_take_longer_to_fetch_than_they_save_are_not_made() -> None:
    stats, placement = synthetic(4, 2), ExpertPlacement.contiguous(2, 8, 4)
    topology, numbers = nodes((0, 0, 1, 1)), []
    for steps in (0.0, 3.0, 30.0, 3000.0):
        chosen = choose_replicas(
            placement, stats, topology, Replicated(2), steps=steps, shape=SHAPE
        )
        numbers.append(sum(map(len, chosen.replicas.copies_LN2)))
        assert chosen.cost.seconds <= min(chosen.without.seconds, chosen.by_load.seconds)
    assert numbers[0] >= numbers[1] > numbers[2] >= numbers[3] == 0
    assert chosen.cost.seconds == chosen.without.seconds < chosen.by_load.seconds


def test_one_expert_no_load_and_more_slots_than_help() -> None:
    one = ExpertPlacement.contiguous(1, 1, 1)
    chosen = choose_replicas(one, of_counts([[[5]]]), nodes((0,)), Replicated(3))
    assert pairs(chosen.replicas) == [] and chosen.cost.load_ratio_L.tolist() == [1.0]

    placement, topology = ExpertPlacement.contiguous(2, 4, 2), nodes((0, 1))
    unloaded = of_counts(np.zeros((2, 2, 4)).tolist())
    chosen = choose_replicas(placement, unloaded, topology, Replicated(2))
    assert pairs(chosen.replicas, 0) == pairs(chosen.replicas, 1) == []
    assert chosen.cost.seconds == chosen.by_load.seconds == 0

    only_own = of_counts([[[9, 9, 0, 0], [0, 0, 9, 9]]] * 2)  # level, every row at its source
    chosen = choose_replicas(placement, only_own, topology, Replicated(2))
    assert pairs(chosen.replicas, 0) == pairs(chosen.replicas, 1) == []


def test_expected_rows_by_hand() -> None:
    """Rank 0 computes two of its three rows of expert 0: 2.2 of 3.3. What is no row stays home."""
    rows_RE, home_E = np.array([[3.3, 0.4], [2.0, 0.2]]), torch.tensor([1, 0])
    counts_RE = torch.tensor([[3, 0], [2, 0]])
    plan = Replicated(1).with_copies(counts_RE, home_E, np.array([[0, 0]]))
    rows_RR, rows_ER = expected_rows(plan, rows_RE, counts_RE, home_E)
    assert plan.rows.tolist() == [[0, 0, 0, 2], [0, 0, 1, 1], [0, 1, 1, 2]]
    np.testing.assert_allclose(rows_RR, [[2.6, 1.1], [0.2, 2.0]])
    np.testing.assert_allclose(rows_ER, [[2.2, 3.1], [0.6, 0]])


# ---------------------------------------------------------------- on structured routing


@settings(deadline=None, max_examples=12)
@given(
    top_k=st.sampled_from([1, 2, 3]),
    slots=st.integers(1, 3),
    within_node=st.booleans(),
    two_level=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_never_worse_than_none_or_by_load(
    top_k: int, slots: int, within_node: bool, two_level: bool, seed: int
) -> None:
    stats, topology = synthetic(4, top_k, seed=seed), nodes((0, 0, 1, 1))
    placement = ExpertPlacement.contiguous(2, 8, 4)
    planner = Replicated(slots, within_node=within_node)
    run: Any = {"two_level": two_level, "shape": SHAPE}
    chosen = choose_replicas(placement, stats, topology, planner, **run)
    again = choose_replicas(placement, stats, topology, planner, **run)
    assert chosen.cost.seconds <= min(chosen.without.seconds, chosen.by_load.seconds)
    expected = cost(placement, stats, topology, **run)
    assert chosen.without.seconds == pytest.approx(expected.seconds)
    assert chosen.without.rows_inter == pytest.approx(expected.rows_inter)
    replicas = chosen.replicas
    assert replicas.slots <= slots
    replicas.check_fit(topology, within_node)
    assert again.replicas.digest() == replicas.digest()


def test_the_simulated_planner_computes_what_was_judged() -> None:
    """One choice per token, one micro-batch: the very rows; and better than load alone knows."""
    trace = SyntheticRouter(2, 16, "domain", skew=1.0).sample(24, 40, 1)
    topology = nodes((0, 0, 0, 0, 1, 1, 1, 1))
    trace = dataclasses.replace(trace, source_T=sources_of(trace, 8))
    stats, placement = RoutingStats.of_trace(trace, 8), ExpertPlacement.contiguous(2, 16, 8)
    chosen = choose_replicas(placement, stats, topology, Replicated(1), shape=SHAPE)
    planner = Replicated(1, copies=chosen.replicas).for_topology(topology)
    step = simulate_trace(placement, trace, topology, planner, micro_batch=120, shape=SHAPE)
    assert (step.rows_local, step.rows_intra, step.rows_inter) == (
        chosen.cost.rows_local,
        chosen.cost.rows_intra,
        chosen.cost.rows_inter,
    )
    assert step.load_ratio == pytest.approx(chosen.cost.load_ratio_L.mean())
    assert step.compute_s == pytest.approx(chosen.cost.compute_s)
    assert step.borrowed == sum(map(len, chosen.replicas.copies_LN2)) > 0
    assert chosen.cost.rows_inter < 0.95 * chosen.by_load.rows_inter
    assert chosen.by_load.rows_inter < chosen.without.rows_inter


# ---------------------------------------------------------------- files and refusals


def table() -> Replicas:
    placement = ExpertPlacement.contiguous(2, 4, 2)
    return Replicas(placement, (np.array([[0, 1], [2, 0]]), np.empty((0, 2), dtype=np.int64)))


def test_a_file_holds_the_table(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "copies.json"
    table().save(path)
    loaded = Replicas.load(path)
    assert loaded.digest() == table().digest() and loaded.slots == 1
    assert pairs(loaded) == [(0, 1), (2, 0)] and pairs(loaded, 1) == []
    assert torch.equal(loaded.placement.home_LE, table().placement.home_LE)
    moved_E = np.array([1, 0, 1, 0])  # expert 0 has come home to its copy
    assert loaded.of_layer(0, moved_E, 2).tolist() == [[2, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"copies": [[[0, 1]], []]}, "does not match its digest; restore"),
        ({"copies": [[[0, 1]]]}, "copies of 1 layers for a placement of 2"),
        ({"copies": [[[0, 0]], []]}, "layer 0 has a copy of expert 0 at its home, rank 0"),
        ({"copies": [[[0, 1], [0, 1]], []]}, "layer 0 has expert 0 on rank 1 twice or out of"),
        ({"copies": [[], [[4, 1]]]}, "layer 1 names expert 4 on rank 1, of 4 and 2"),
        ({"copies": [[[0]], []]}, "not a readable replicas file"),
        ({"copies": None}, "not a readable replicas file"),
        ({"home": [[0, 0, 0, 1]] * 2}, "each must be home to exactly 2; restore the file"),
        ({"format": 2}, "format 2 is newer than 1"),
    ],
)
def test_changed_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "copies.json"
    table().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        Replicas.load(path)
    assert str(path) in str(caught.value)


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "copies.json"
    table().save(path)
    path.write_text(path.read_text()[:50])
    for file in (path, tmp_path / "none.json"):
        with pytest.raises(ValueError, match="not a readable replicas file"):
            Replicas.load(file)
    table().placement.save(path)
    with pytest.raises(ValueError, match="not a readable replicas file"):
        Replicas.load(path)


def test_what_does_not_fit_is_refused() -> None:
    placement, stats = ExpertPlacement.contiguous(2, 4, 2), synthetic(2, 1)
    with pytest.raises(ValueError, match="the statistics are of 2 MoE layers x 8 experts"):
        choose_replicas(placement, stats, nodes((0, 1)), Replicated(1))
    with pytest.raises(ValueError, match="the placement is for 2 ranks, the topology has 3"):
        choose_replicas(placement, stats, nodes((0, 1, 1)), Replicated(1))
    with pytest.raises(ValueError, match=r"steps \(-1\) must be >= 0"):
        choose_replicas(placement, stats, nodes((0, 1)), Replicated(1), steps=-1)


# ---------------------------------------------------------------- the command


SMALL = [
    "synthetic.layers=2",
    "synthetic.experts=8",
    "synthetic.strength=high",
    "synthetic.stats_tokens=2048",
    "micro_batches=16",
    "cluster.num_nodes=2",
    "cluster.ranks_per_node=2",
]


def test_the_command_saves_copies_and_says_what_they_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placement = ExpertPlacement(torch.arange(8).repeat(2, 1) % 4, 4)
    placement.save(tmp_path / "table.json")
    out = tmp_path / "copies.json"
    given = [*SMALL, "planner.slots=2", "placement=file", f"placement.path={tmp_path}/table.json"]
    assert main([f"out={out}", *given]) == 0
    loaded = Replicas.load(out)
    assert torch.equal(loaded.placement.home_LE, placement.home_LE)
    text = capsys.readouterr().out
    number = sum(map(len, loaded.copies_LN2))
    assert 0 < loaded.slots <= 2 and f"{number} copies" in text
    without, by_load, chosen = (float(line.split()[-5]) for line in text.splitlines()[1:4])
    assert chosen <= min(without, by_load) and chosen < without


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "out is missing: name the file of the copies once"),
        (["out=a.json", "planner=quota"], "planner (parallel.planners.Quota) holds no copies"),
        (["out=a.json", "stats=none.npz"], "none.npz: not a readable statistics file"),
        (["out=a.json", "planner.slots=0"], "planner.slots (0) must be >= 1"),
        (["out=a.json", "planer.slots=1"], "planer: no such key; did you mean planner?"),
    ],
)
def test_commands_that_cannot_be_right(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *given]) == 2
    assert message in capsys.readouterr().err
