"""Choices, step times and the command of `python -m launch plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.compose import load, load_sizing
from configs.sizing_schema import check_sizing
from launch.__main__ import main
from launch.sizing.command import given, model_config, sizing_of
from launch.sizing.memory import Engine
from launch.sizing.meshes import GIB, Sizing
from launch.sizing.shapes import Mesh
from launch.sizing.step import ring_seconds
from trainer.metrics import parameter_counts
from trainer.modeling import meta_model

TINY = ["model=tiny", "train.seq_len=64", "train.batch_size=64", "cluster=h100_2x8"]
PUBLISHED = {  # billions: all, and active, as published; see the test
    "qwen3_30b_a3b": (30.5, 3.3),
    "gpt_oss_120b": (116.8, 5.1),
    "glm_4_5": (355.0, 32.0),
    "deepseek_v3": (671.0, 37.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    """gpt-oss does not count the input embedding as active. GLM-4.5 counts neither embedding nor
    output layer, and one more MoE layer, which predicts further tokens."""
    config = model_config(load_sizing(f"model={name}").model)
    model: Any = meta_model(config)
    total, active = (float(number) for number in parameter_counts(model))
    embedding = float(model.get_input_embeddings().weight.numel())
    if name == "gpt_oss_120b":
        active -= embedding
    if name == "glm_4_5":
        layer = sum(p.numel() for p in model.model.layers[-1].parameters())
        total += layer + 2 * config.hidden_size**2 - 2 * embedding
        active -= 2 * embedding
    published, published_active = PUBLISHED[name]
    assert round(total / 1e9, 1) == pytest.approx(published, abs=0.2)
    assert active / 1e9 == pytest.approx(published_active, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_compose_for_training(name: str) -> None:
    config = load("experiment=quickstart", f"model={name}")
    assert model_config(config.model).model_type == config.model.family


def tiny(*overrides: str) -> Sizing:
    config = load_sizing(*TINY, *overrides)
    check_sizing(config)
    return sizing_of(config)


def test_the_largest_micro_batch_that_fits() -> None:
    """One divisor more does not, and the budget is kept; all meshes are there."""
    roomy = tiny()
    needed = [c.memory.total for c in roomy.choices()]
    tight = tiny("cluster.memory_gib=" + str(sorted(needed)[len(needed) // 2] / GIB), "reserve=0")
    choices = tight.choices()
    assert {c.mesh.ep for c in choices} == {1, 2, 4, 8}
    assert len(choices) == 4 * 4 * 2
    assert 0 < sum(c.fits for c in choices) < len(choices) or any(c.sequences < 4 for c in choices)
    for one in choices:
        assert one.sequences * one.micro_batches == 4
        assert one.fits == (one.memory.total <= tight.given.budget)
        larger = [s for s in (1, 2, 4) if s > one.sequences]
        for sequences in larger if one.fits else ():
            other = tight.choice(one.engine, one.mesh, one.recompute, sequences)
            assert other.memory.total > tight.given.budget
    fitting = [c.step.slowest for c in choices if c.step is not None]
    assert fitting == sorted(fitting)


def test_parts_of_a_step_by_hand() -> None:
    """Products from the flops, shards from the bytes, on one node where nothing is borrowed."""
    sizing = tiny("cluster.num_nodes=1", "planner=home", "skew=0", "mesh.ep=1", "engines=[torch]")
    model, cluster = sizing.model, sizing.given.cluster
    assert cluster.flops and cluster.intra_gbps
    for choice in sizing.choices():
        step = choice.step
        assert step is not None and step.fastest <= step.slowest
        tokens = sizing.given.batch_size // 8 * sizing.given.seq_len
        again = 4 / 3 if choice.recompute else 1
        products = tokens * model.flops_per_token * again / (cluster.flops * 0.4)
        assert step.products == pytest.approx(products)
        assert step.exchange == step.borrow == step.latency == 0
        gathered = 2 * 2 * choice.micro_batches + 4  # bf16 twice in each, fp32 gradients once
        seconds = model.parameters * gathered * 7 / 8 / (cluster.intra_gbps * 1e9 / 8)
        assert step.shards == pytest.approx(seconds)


def test_rings_over_nodes() -> None:
    """16 ranks on 2 nodes: what is gathered enters a node over all its ports; a shared port is
    one for all groups."""
    config = load_sizing("cluster=h100_2x8").cluster
    mesh = Mesh(16, 4, 8)
    half = 1e9 / 2 / (400e9 / 8)
    assert ring_seconds(1e9, range(16), mesh, config) == pytest.approx(
        max(half / 8, 1e9 * 7 / 8 / (3600e9 / 8))
    )
    assert ring_seconds(1e9, range(0, 16, 4), mesh, config) == pytest.approx(half / 2)
    config.node_gbps = 400
    assert ring_seconds(1e9, range(0, 16, 4), mesh, config) == pytest.approx(4 * half)


def test_memory_grows_where_it_must() -> None:
    sizing = tiny("skew=1.0", "planner=home")
    mesh = Mesh(16, 8, 8)
    torch_1 = sizing.choice(Engine.torch, mesh, False, 4).memory
    torch_2 = sizing.choice(Engine.torch, mesh, False, 2).memory
    keep = sizing.choice(Engine.torch_keep, mesh, False, 4).memory
    assert torch_2.gradients > torch_1.gradients  # whole ones between micro-batches
    assert torch_2.activations < torch_1.activations
    assert keep.gathered > torch_1.gathered
    assert sizing.choice(Engine.torch_split, mesh, False, 2).memory.gradients == torch_1.gradients
    assert sizing.choice(Engine.torch, mesh, True, 4).memory.activations < torch_1.activations
    level = tiny("skew=1.0", "planner=quota").choice(Engine.torch, mesh, False, 4)
    assert level.layer.borrowed > 0 and level.memory.borrowed > 0
    assert level.memory.activations < torch_1.activations  # the busiest rank has fewer rows
    refetched = tiny("skew=1.0", "planner=quota", "train.refetch_borrowed=true")
    assert refetched.choice(Engine.torch, mesh, False, 4).memory.borrowed < level.memory.borrowed


def test_gradients_are_split_where_there_are_several_micro_batches() -> None:
    """With one it would be a second line about the same."""
    found = [c for c in tiny("planner=home").choices() if c.engine is Engine.torch_split]
    assert all(choice.micro_batches > 1 for choice in found)
    small = tiny("planner=home", "cluster.memory_gib=0.001")
    assert any(choice.engine is Engine.torch_split for choice in small.choices())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", *TINY, f"json={file}", "rows=3"]) == 0
    out = capsys.readouterr().out
    assert "recommended: engine=" in out and "assumed, not measured" in out
    content = json.loads(file.read_text())
    best = content["choices"][0]
    assert best["overrides"] in out and best["fits"]
    load("experiment=quickstart", *best["overrides"].split())  # the trainer takes them
    assert main(["plan", *TINY, "cluster.memory_gib=0.001"]) == 1
    assert "most of it" in capsys.readouterr().out
    assert main(["plan", "--help"]) == 0
    assert "train.seq_len" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster=local"], "cluster.num_nodes, cluster.ranks_per_node, cluster.intra_gbps"),
        (["cluster=laptop"], "cluster.memory_gib: not given, but a plan needs them"),
        (["train.batch_size=65"], "train.batch_size (65) must be a multiple of the ranks"),
        (["mesh.ep=3"], "mesh.ep (3) must divide the ranks (16) and the experts (8)"),
        (
            ["cluster=rack_scale", "train.batch_size=72"],
            "none does; change cluster.ranks_per_node",
        ),
        (["engines=[zero4]"], "engines (zero4): no such engine; use some of torch"),
        (["engines=[zero1]"], "engines (zero1) does not run train.precision=bf16"),
        (["planner=sticky"], "planner (Sticky) keeps experts over micro-batches"),
        (["reserve=1"], "reserve (1.0) must be >= 0 and < 1"),
        (["model=hf", "model.source=nowhere"], "nowhere: no config.json"),
        (["train.seq_lem=1"], "train.seq_lem: no such key; did you mean train.seq_len?"),
    ],
)
def test_what_is_refused(
    overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *TINY, *overrides]) == 2
    assert expected in capsys.readouterr().err


def test_given_is_what_was_composed() -> None:
    values = given(load_sizing(*TINY, "train.precision=fp32", "engines=[zero1,torch]"))
    assert (values.num_ranks, values.value, values.engines) == (16, 4, (Engine.zero1, Engine.torch))
