"""Statistics of a job, moves that pay, and whole runs whose experts move."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from configs.compose import load
from parallel.mesh import ParallelMesh
from placement.objective import AFFINITY, ExpertShape, Objective, cost
from placement.solve import Solution
from placement.stats import COUNTS, RoutingStats
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace, joined, load_trace
from tests.ranks import run_ranks
from tests.trainer.test_run import corpus, metrics, train
from trainer.assign import SequenceAssigner
from trainer.checkpoint_files import placement_of
from trainer.living import fitted_placer
from trainer.placement import LivingPlacement, Recorder, Relocator
from trainer.ranks import RankZeroFirst

LAYERS, EXPERTS, SEQUENCES, SEQ_LEN = 2, 8, 3, 5


def _trace(rank: int) -> Trace:
    """Two micro-batches of one rank."""
    made = SyntheticRouter(LAYERS, EXPERTS).sample(2 * SEQUENCES, SEQ_LEN, 2, seed=rank)
    assert made.token_T is not None and made.sequence_T is not None
    return Trace(
        made.ids_TLK,
        EXPERTS,
        source_T=np.full(made.num_tokens, rank % 2),
        token_T=made.token_T % 50,
        domain_T=made.sequence_T % 3,
    )


def _record(folder: str) -> RoutingStats | None:
    """Record this rank's trace twice, with the past halved, and go on from a file."""
    mesh = ParallelMesh.build(ep=2)
    trace = _trace(mesh.rank)
    recorder = Recorder(mesh, LAYERS, EXPERTS, by_token=True, decay=0.5)
    size = SEQUENCES * SEQ_LEN
    routing, batches = [], []
    assert trace.token_T is not None
    for start in (0, size):
        part = trace.take(np.arange(start, start + size))
        assert part.token_T is not None
        batches.append(
            {
                "input_ids": torch.from_numpy(part.token_T).view(SEQUENCES, SEQ_LEN),
                "sequence_ids": torch.arange(start // SEQ_LEN, start // SEQ_LEN + SEQUENCES),
            }
        )
        routing += [(layer, torch.from_numpy(part.ids_TLK[:, layer])) for layer in range(LAYERS)]
    dataset: Any = SimpleNamespace(sources_of=lambda ids: np.asarray(ids) % 3)
    for _ in range(2):
        recorder.record(routing, batches, dataset)
    merged = recorder.merged()
    if merged is not None:
        merged.save(Path(folder) / "stats.npz")
    torch.distributed.barrier()
    again = Recorder(mesh, LAYERS, EXPERTS)
    again.start_from(Path(folder) / "stats.npz")
    return again.merged()


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_counts_are_the_jobs(tmp_path: Path, world: int) -> None:
    results = run_ranks(_record, world, str(tmp_path))
    assert results[1:] == [None] * (world - 1)
    whole = RoutingStats.of_trace(joined([_trace(rank) for rank in range(world)]), 2)
    for name in COUNTS:
        assert torch.equal(getattr(results[0], name), 1.5 * getattr(whole, name)), name
    for name in ("by_token", "by_domain"):
        found, expected = getattr(results[0], name).table, getattr(whole, name).table
        np.testing.assert_array_equal(found.toarray(), 1.5 * expected.toarray())
    assert results[0].tokens == 1.5 * whole.tokens


def test_only_moves_that_pay_are_made() -> None:
    """One expert's move is worth its time if the gain of the steps to come exceeds it."""
    trace = SyntheticRouter(4, 8, "high").sample(50, 32, 1)
    stats = RoutingStats.of_trace(trace)
    topology = Topology.even(1, 4, intra_gbps=8.0, inter_gbps=8.0, flops=1e9)
    shape = ExpertShape(hidden=64, parameters=1000, bytes_per_value=4)
    current = ExpertPlacement.contiguous(4, 8, 4)

    def moves(pays_within: int | None, most: int | None = None) -> int:
        relocator = Relocator(
            topology,
            AFFINITY.__class__(mode="coherent", load_weight=0, shape=shape),
            tokens_per_step=trace.num_tokens // 10,
            pays_within=pays_within,
            max_moves=most,
            time_limit_s=20,
            seed=0,
        )
        solution = relocator.better(stats, current)
        if solution is None:
            return 0
        assert f"{solution.moves:,} of 32 experts move" in relocator.describe(solution, stats)
        assert solution.moves == len(current.moves_to(solution.placement))
        return solution.moves

    free = moves(None)
    assert free > 8
    assert moves(1) == 0
    assert 0 < moves(100) <= free
    assert moves(10**9) > 8
    assert 0 < moves(None, most=4) <= 4


def test_with_assigned_sequences_moves_are_judged_by_what_is_expected_of_them() -> None:
    """Not by the problem that finds them: what they save is the difference of costs, less their
    time; and where experts are as they should be, none moves."""
    trace = SyntheticRouter(4, 16, "domain").sample(64, 32, 1)
    stats = RoutingStats.of_trace(trace)
    topology = Topology.even(2, 2, intra_gbps=8.0, inter_gbps=2.0, flops=1e12)
    shape = ExpertShape(hidden=64, parameters=1000, bytes_per_value=4)
    objective = Objective("batched", two_level=True, load_weight=0.0, shape=shape)

    def expected(placement: ExpertPlacement) -> float:
        return objective.judge(
            cost(placement, stats, topology, mode="batched", two_level=True, shape=shape)
        )

    def better(current: ExpertPlacement, pays_within: int | None) -> Solution | None:
        relocator = Relocator(
            topology,
            objective,
            tokens_per_step=trace.num_tokens // 8,
            pays_within=pays_within,
            max_moves=None,
            time_limit_s=3,
            seed=0,
        )
        return relocator.better(stats, current)

    current = ExpertPlacement.contiguous(4, 16, 4)
    assert better(current, 1) is None
    found = better(current, 50)
    assert found is not None
    moving_RR = shape.move_bytes / topology.bytes_per_s_RR() / 4
    homes = current.home_LE.numpy(), found.placement.home_LE.numpy()
    saved = expected(current) - expected(found.placement) - 8 / 50 * moving_RR[homes].sum()
    assert found.saved == pytest.approx(saved, rel=1e-9) and saved > 0
    settled = better(current, None)
    assert settled is not None and settled.saved > found.saved
    assert better(settled.placement, None) is None


@pytest.mark.slow
def test_a_run_whose_experts_move_is_the_same_run(tmp_path: Path) -> None:
    """Bitwise at home with two choices; a resumed run goes on with the placement it had."""
    text = corpus(tmp_path / "text")
    same = ["planner=home", "mesh.ep=2", "checkpoint.export=false", "train.record_routing_every=3"]
    living = [
        *same,
        "stats.every=1",
        "stats.by_token=true",
        "relocate.every=2",
        "relocate.objective=affinity",
        "relocate.pays_within=null",
    ]
    train(text, tmp_path / "still", 2, *same)
    output = train(
        text, tmp_path / "moving", 2, *living, "train.steps=4", "optim.schedule=constant"
    )
    assert "experts move and save" in output
    train(text, tmp_path / "still4", 2, *same, "train.steps=4", "optim.schedule=constant")
    moving, still = metrics(tmp_path / "moving"), metrics(tmp_path / "still4")
    assert moving[-1]["moe/moved_experts"] > 0
    for name in ("train/loss", "train/grad_norm"):
        assert [line[name] for line in moving] == [line[name] for line in still]
    saved = sorted((tmp_path / "moving/checkpoints").glob("step-*"))[-1]
    table = placement_of(saved)
    assert table.digest() != ExpertPlacement.contiguous(2, 8, 2).digest()
    stats = RoutingStats.load(tmp_path / "moving/stats/step-00000004.npz")
    assert stats.tokens == 4 * 8 * 32
    train(text, tmp_path / "moving", 2, *living, "relocate.every=100", "optim.schedule=constant")
    train(text, tmp_path / "still4", 2, *same, "optim.schedule=constant")
    assert (
        metrics(tmp_path / "moving")[-1]["train/loss"]
        == metrics(tmp_path / "still4")[-1]["train/loss"]
    )
    last = sorted((tmp_path / "moving/checkpoints").glob("step-*"))[-1]
    assert placement_of(last).digest() == table.digest()
    trace = load_trace(tmp_path / "moving/routing/step-00000006.npz")
    assert trace.num_tokens == 8 * 32 and trace.token_T is not None and trace.domain_T is not None
    assert trace.sequence_T is not None and len(set(trace.sequence_T.tolist())) == 8


def _assigns(folder: str) -> tuple[bool, bool, str]:
    """Whether sequences are assigned before and after a run begins, and with an empty start."""
    mesh, rank_zero = ParallelMesh.build(ep=2), RankZeroFirst()
    dataset: Any = SimpleNamespace(batch=lambda ids: {"input_ids": torch.tensor(ids)[:, None]})
    topology = Topology.even(1, 2, intra_gbps=8.0, inter_gbps=8.0, flops=1e9)
    recorder = Recorder(mesh, 1, 2, by_token=True)
    assigner = SequenceAssigner(dataset, mesh, topology)
    living = LivingPlacement(recorder, rank_zero, Path(folder), 1, 0, None, assigner)
    placement = ExpertPlacement.contiguous(1, 2, 2)
    living.begin(placement)
    before = assigner.order([1, 1, 0, 0]) == [0, 0, 1, 1]
    stats = RoutingStats(1, 2, 2)
    stats.observe(0, torch.tensor([[0], [1]]), token_T=torch.tensor([0, 1]))
    if mesh.rank == 0:
        stats.save(Path(folder) / "step-00000003.npz")
        (Path(folder) / "step-00000004.npz").write_bytes(b"torn")
    rank_zero.wait()
    living.restore(3)
    living.begin(placement)
    after = assigner.order([1, 1, 0, 0]) == [0, 0, 1, 1]
    try:
        living.restore(4)
    except ValueError as error:
        return before, after, str(error)
    return before, after, ""


def test_sequences_are_assigned_from_the_first_batch_on(tmp_path: Path) -> None:
    """Token id v chooses expert v, which lives on rank v; torn statistics end all ranks."""
    for before, after, error in run_ranks(_assigns, 2, str(tmp_path)):
        assert (before, after) == (False, True)
        assert "step-00000004.npz: not a readable statistics file" in error


@pytest.mark.parametrize(("saved", "moves"), [(0.0, False), (1e-6, True)])
def test_values_below_zero_pay_like_others(
    monkeypatch: pytest.MonkeyPatch, saved: float, moves: bool
) -> None:
    """What deduplication saves may make them so; a placement as good as the current one stays."""
    found: Any = SimpleNamespace(value=-5.0 - saved, saved=saved, judged=2.0, moves=3)
    monkeypatch.setattr("trainer.placement.solve", lambda *args, **settings: found)
    relocator = Relocator(
        Topology.even(1, 2, intra_gbps=8.0, inter_gbps=8.0, flops=1e9),
        Objective(),
        tokens_per_step=1,
        pays_within=None,
        max_moves=None,
        time_limit_s=1,
        seed=0,
    )
    current = ExpertPlacement.contiguous(1, 2, 2)
    assert (relocator.better(RoutingStats(1, 2), current) is found) == moves


@pytest.mark.parametrize(
    ("overrides", "weight"),
    [
        (["placement=ilp"], 0.0),  # quota evens out the load
        (["placement=ilp", "planner=home"], 1.0),
        (["placement=ilp", "planner=home", "placement.load_weight=0.5"], 0.5),
        (["placement=ilp", "placement.load_weight=0.5"], 0.5),
        (["placement=load"], 1.0),  # there is nothing else to judge by
        (["placement=affinity", "planner=home"], 0.0),
    ],
)
def test_placements_count_waiting_where_the_run_waits(overrides: list[str], weight: float) -> None:
    config = load("experiment=quickstart", "placement.stats=stats.npz", *overrides)
    assert fitted_placer(config, instantiate(config.placement)).load_weight == weight
