"""Hybrid sharding and CPU offload change where parameters lie, and no number."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy

from configs.compose import load as composed
from configs.engine_rules import engine_problems
from parallel.mesh import ParallelMesh
from tests.benchmarks.sharding import PER_NODE, WORLD, traffic
from tests.parallel.test_layer import RandomPlanner
from tests.ranks import run_ranks
from tests.trainer import test_coupling
from tests.trainer.checkpoint_runs import merge
from tests.trainer.deepspeed_runs import make, train_step
from tests.trainer.relocation_runs import make_engine, random_table
from tests.trainer.test_deepspeed_checkpoint import falling, grouped, load, store
from tests.trainer.test_engine import BASE, check, engine_run
from tests.trainer.test_engine_borrowed import KeepingPlanner
from tests.trainer.test_relocation import both
from trainer.engine import TorchEngine
from trainer.engine_deepspeed import DeepSpeedEngine
from trainer.sharding import Sharding

HYBRID: dict[str, Any] = {"engine": {"shard_within_node": True}}
BOTH: dict[str, Any] = {"shard_within_node": True, "cpu_offload": True}
# Four ranks on a node and EP 2: the only mesh of these in which experts are split within a node,
# copied across, and lent.
EIGHT = {"world": 8, "ranks_per_node": 4, "ep": 2}


@pytest.mark.parametrize(
    ("world", "per_node", "ep", "accumulate"),
    [(4, 2, 1, 2), (4, 2, 2, 2), (4, 2, 4, 1), (6, 2, 1, 1)],
)
def test_hybrid_equals_one_process(world: int, per_node: int, ep: int, accumulate: int) -> None:
    mesh = {"world": world, "ranks_per_node": per_node, "ep": ep}
    check({**BASE, **HYBRID, **mesh, "accumulate": accumulate})


@pytest.mark.parametrize(
    ("planner", "family"),
    [(RandomPlanner(5), "qwen3_moe"), (KeepingPlanner(6), "two_experts")],
)
def test_hybrid_with_borrowed_experts(planner: RandomPlanner, family: str) -> None:
    """Split by experts, and within each; copies of both nodes get what both nodes owe."""
    layers = {"refetch": not isinstance(planner, KeepingPlanner)}
    case = {"accumulate": 2, "planner": planner, "family": family, "layers": layers}
    check({**BASE, **HYBRID, **EIGHT, **case, "sequences": 16})


def test_hybrid_with_loss_free_bias() -> None:
    """Of a family that declares the bias as a parameter."""
    mesh = {"world": 4, "ranks_per_node": 2, "ep": 1, "family": "ernie4_5_moe"}
    check({**BASE, **HYBRID, **mesh, "accumulate": 2, "balancer": "bias"})


def test_hybrid_with_the_coupling_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of whole stacks of experts: over ranks and copies it counts once."""

    def hybrid(model: Any, mesh: ParallelMesh, **options: Any) -> TorchEngine:
        on_nodes = replace(mesh, ranks_per_node=PER_NODE)
        return TorchEngine(model, on_nodes, shard_within_node=True, **options)

    monkeypatch.setattr(test_coupling, "TorchEngine", hybrid)
    test_coupling.check({**test_coupling.CASE, "world": WORLD, "ep": 1})


@pytest.mark.parametrize("within_node", [False, True])
def test_gradients_split_after_every_micro_batch(within_node: bool) -> None:
    """With experts that stay borrowed, whose gradients come home with the last one."""
    case = {**EIGHT, "sequences": 24} if within_node else {"world": 2, "ep": 2}
    engine = {"shard_gradients": True, "shard_within_node": within_node}
    check({**BASE, **case, "accumulate": 3, "planner": KeepingPlanner(6), "engine": engine})


def test_compiled_layers_equal_one_process() -> None:
    """Under hybrid sharding, with borrowed experts."""
    mesh = {"world": 4, "ranks_per_node": 2, "ep": 2}
    case = {**BASE, **mesh, "accumulate": 2, "planner": RandomPlanner(5)}
    check({**case, "engine": {"compile": True, "shard_within_node": True}}, compiled_run)


def compiled_run(case: dict[str, Any]) -> dict[str, Any]:
    """Traced and differentiated as for every backend, but run as it is: this needs no compiler."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compile_module = nn.Module.compile
    pytest.MonkeyPatch().setattr(
        nn.Module, "compile", lambda module: compile_module(module, backend=backend)
    )
    found = engine_run(case)
    assert graphs
    return found


def test_offload_equals_one_process() -> None:
    """With borrowed experts, whose gradients are added on the CPU."""
    case = {"world": 2, "ep": 2, "accumulate": 2, "planner": RandomPlanner(5)}
    check({**BASE, **case, "engine": {"cpu_offload": True}})


def test_offload_reaches_every_parameter() -> None:
    (found,) = run_ranks(policies, 1)
    assert found == {False: {OffloadPolicy}, True: {CPUOffloadPolicy}}


def policies() -> dict[bool, set[type]]:
    """What FSDP2 keeps of the policy of its groups, with offload and without."""
    found = {}
    for cpu_offload in (False, True):
        model = make_engine(1, cpu_offload=cpu_offload).model
        states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
        groups = [group for state in states for group in state._fsdp_param_groups]
        assert len(groups) == 5  # experts and the rest of two layers, and what is around them
        found[cpu_offload] = {type(group.offload_policy) for group in groups}
    return found


def test_bf16_as_under_full_sharding() -> None:
    case = {**BASE, "world": 4, "ranks_per_node": 2, "ep": 1, "accumulate": 2, "steps": 2}
    plain = run_ranks(engine_run, 4, {**case, "engine": {"bf16": True}})
    other = run_ranks(engine_run, 4, {**case, "engine": {**BOTH, "bf16": True}})
    for a, b in zip(plain, other, strict=True):
        for x, y in zip(a["metrics"], b["metrics"], strict=True):
            assert y["train/loss"] == pytest.approx(x["train/loss"], rel=1e-4)
            assert y["train/grad_norm"] == pytest.approx(x["train/grad_norm"], rel=1e-3)
        assert all(value.dtype == torch.float64 for value in b["state"].values())


MOVED: dict[str, dict[str, Any]] = {
    "by experts": {},
    "within experts": {"model": {"num_experts": 6}, "cpu_offload": True},
}


@pytest.mark.parametrize("name", MOVED)
def test_experts_move_bit_for_bit(name: str) -> None:
    mesh = {"ep": EIGHT["ep"], "ranks_per_node": EIGHT["ranks_per_node"]}
    moved, plain = both(
        EIGHT["world"], {**mesh, "shard_within_node": True, **MOVED[name]}, {0: 1, 2: 2}
    )
    assert moved == plain


def test_a_move_counts_the_bytes_of_all_nodes() -> None:
    """Half of every expert on a rank instead of a quarter: twice the bytes."""
    results = run_ranks(moved_bytes, EIGHT["world"])
    assert set(results) == {results[0]}
    full, hybrid = results[0]
    assert hybrid == 2 * full > 0


def moved_bytes() -> tuple[int, int]:
    found = []
    for hybrid in (False, True):
        engine = make_engine(
            2,
            ranks_per_node=EIGHT["ranks_per_node"],
            model={"num_experts": 6},
            shard_within_node=hybrid,
        )
        found.append(engine.relocate(random_table(1, 6, 2)).bytes)
    return found[0], found[1]


CHAIN: list[tuple[Any, int, int]] = [  # engine, EP, ZeRO stage
    (TorchEngine, 4, 0),
    (partial(TorchEngine, shard_within_node=True), 1, 0),
    (DeepSpeedEngine, 2, 2),
    (partial(TorchEngine, **BOTH), 2, 0),
    (TorchEngine, 1, 0),
]


def test_checkpoints_go_from_sharding_to_sharding(tmp_path: Path) -> None:
    """To the other engine and back, at other EP sizes, bit for bit."""
    by_rank = run_ranks(exchanged, WORLD, str(tmp_path))
    before: dict[str, Tensor] = {}
    for number, results in enumerate(zip(*by_rank, strict=True)):
        loaded = merge([result["loaded"] for result in results])
        assert number == 0 or any(key.startswith("optimizer.exp_avg_sq.") for key in loaded)
        assert loaded.keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in loaded.items())
        before = merge([result["saved"] for result in results])


def exchanged(directory: str) -> list[dict[str, Any]]:
    """Engines that take over from each other, one step each, and save."""
    os.environ["LOCAL_WORLD_SIZE"] = str(PER_NODE)
    results: list[dict[str, Any]] = []
    for number, (kind, ep, stage) in enumerate(CHAIN):
        case = {"ep": ep, "zero_stage": stage, "clip": 0.5}
        engine = make(case, kind, optimizer=grouped, schedule=falling, scale=1 + number)
        loaded = load(engine, directory) if number else {}
        train_step(engine, number)
        results.append({"loaded": loaded, "saved": store(engine, directory, number + 1)})
        if kind is DeepSpeedEngine:
            engine.zero.destroy()
    return results


def test_gathers_stay_within_nodes() -> None:
    """Of all collectives only the sums of gradient shards span nodes, and those of a few numbers:
    loss, counts, norm."""
    for found, own in run_ranks(traffic, WORLD, 1, True):
        assert "gathered across nodes" not in found and "scattered across nodes" not in found
        assert found["gathered within nodes"] >= 2 * own
        assert own <= found["summed across nodes"] <= own + 1000
    for found, own in run_ranks(traffic, WORLD, 1, False):
        assert found["gathered across nodes"] >= 2 * 4 * own
        assert found["scattered across nodes"] >= 4 * own


def test_split_gradients_cross_nodes_once() -> None:
    """Those of dense parameters; within the node they are summed after every micro-batch."""
    (once, _), (split, _) = (
        run_ranks(traffic, WORLD, 2, True, 3, shard_gradients)[0]
        for shard_gradients in (False, True)
    )
    assert split["summed across nodes"] == once["summed across nodes"]
    assert split["scattered within nodes"] == 3 * once["scattered within nodes"]


@pytest.mark.parametrize(
    ("world", "per_node", "ep", "parts"), [(4, 2, 1, 2), (4, 2, 2, 2), (4, 2, 4, 1), (6, 3, 2, 3)]
)
def test_ranks_that_split_experts(world: int, per_node: int, ep: int, parts: int) -> None:
    """Within a node where it holds whole EP groups, and several; else all over EDP."""
    within = per_node > ep and per_node % ep == 0
    assert run_ranks(split, world, per_node, ep) == [(("node", "dp"), parts, within)] * world


def split(per_node: int, ep: int) -> tuple[Any, int, bool]:
    """Axes of dense parameters, parts of the stacks of experts, whether other nodes have copies."""
    mesh = ParallelMesh.build(ep=ep, ranks_per_node=per_node, device_type="cpu")
    sharding = Sharding.within_nodes(mesh)
    return sharding.dense.mesh_dim_names, sharding.experts.edp_size, sharding.copies is not None


@pytest.mark.parametrize("per_node", [1, 2])
def test_one_node_or_one_rank_per_node_is_refused(per_node: int) -> None:
    (message, _) = run_ranks(refused, 2, per_node)
    assert message == (
        f"engine.shard_within_node (true) needs several nodes of several ranks, but "
        f"mesh.ranks_per_node is {per_node} of 2 ranks; set it to false"
    )


def refused(per_node: int) -> str:
    mesh = ParallelMesh.build(ep=1, ranks_per_node=per_node, device_type="cpu")
    with pytest.raises(ValueError) as caught:
        Sharding.within_nodes(mesh)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "world", "text"),
    [
        (["mesh.ranks_per_node=1"], 4, "needs mesh.ranks_per_node (1) to be >= 2: a node of one"),
        (
            ["mesh.ranks_per_node=4"],
            4,
            "needs several nodes, but mesh.ranks_per_node (4) puts all 4 ranks on one; set it to",
        ),
        (
            ["mesh.ranks_per_node=2", "balance=merge_experts"],
            4,
            "balance (merge_experts) would count the experts of every node with engine.shard",
        ),
        (
            ["mesh.ranks_per_node=2", "engine.cpu_offload=true", "planner=quota"],
            4,
            "engine.cpu_offload (true) is not supported with planner (Quota): gradients of",
        ),
    ],
)
def test_refused_before_anything_is_built(overrides: list[str], world: int, text: str) -> None:
    config = composed("experiment=quickstart", "engine.shard_within_node=true", *overrides)
    (problem,) = engine_problems(config, world)
    assert text in problem
    fitting = ["engine.shard_within_node=true", "mesh.ranks_per_node=2"]
    fitting += ["engine.cpu_offload=true", "planner=home"]
    assert list(engine_problems(composed("experiment=quickstart", *fitting), 4)) == []
