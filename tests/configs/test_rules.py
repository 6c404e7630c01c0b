"""Bounds and rules between fields: every message names key, value, bound and remedy."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from omegaconf import OmegaConf

from configs import launch_schema, schema, sweep_schema, upcycle_schema
from configs.compose import composed
from configs.describe import fields, launch_fields
from configs.launch_schema import LaunchConfig
from configs.rules import bounds_text
from configs.schema import Config, check
from configs.sweep_schema import SweepConfig
from configs.upcycle_schema import UpcycleConfig

FIELDS = [*fields(), *fields(SweepConfig), *fields(UpcycleConfig)]
SIZES = {  # of these tests, whatever the experiments choose
    "train.steps": 300,
    "train.batch_size": 32,
    "train.micro_batch_size": 8,
    "train.seq_len": 256,
    "optim.warmup_steps": 5,
}


def config(*overrides: str) -> Config:
    given = {override.partition("=")[0] for override in overrides}
    sizes = [f"{key}={value}" for key, value in SIZES.items() if key not in given]
    made = OmegaConf.to_object(composed(*sizes, *overrides))
    assert isinstance(made, Config)
    return made


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_the_quickstart_fits_as_many_ranks_as_there_are_gpus(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    quickstart = OmegaConf.to_object(composed("experiment=quickstart"))
    assert isinstance(quickstart, Config)
    check(quickstart, world_size)
    assert quickstart.train.micro_batch_size * world_size == quickstart.train.batch_size


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (4, ["mesh.ep=3"], "mesh.ep (3) must divide the world size (4); use 1, 2 or 4"),
        (6, ["mesh.ep=4", "train.batch_size=48"], "(4) must divide the world size (6); use 1 or 2"),
        (
            3,
            ["mesh.ep=3", "train.batch_size=48"],
            "mesh.ep (3) must divide the number of experts (8); use 1",
        ),
        (4, ["mesh.ranks_per_node=3"], "mesh.ranks_per_node (3) must divide the world size (4)"),
        (
            4,
            ["train.batch_size=30", "train.micro_batch_size=4"],
            "train.batch_size (30) must be a multiple of the world size (4) x "
            "train.micro_batch_size (4) = 16; use 16 or 32",
        ),
        (2, ["train.batch_size=8"], "x train.micro_batch_size (8) = 16; use 16"),
        (1, ["train.steps=0"], "train.steps (0) must be >= 1"),
        (1, ["train.seq_len=1"], "train.seq_len (1) must be >= 2"),
        (1, ["optim.lr=0"], "optim.lr (0.0) must be > 0"),
        (1, ["optim.lr=nan"], "optim.lr (nan) must be > 0"),
        (1, ["optim.lr=inf"], "optim.lr (inf) must be > 0"),
        (1, ["optim.min_lr_ratio=1.5"], "optim.min_lr_ratio (1.5) must be >= 0, <= 1"),
        (1, ["data.validation_fraction=1"], "data.validation_fraction (1.0) must be >= 0, < 1"),
        (1, ["checkpoint.keep=0"], "checkpoint.keep (0) must be >= 1"),
        (1, ["mesh.timeout_s=0"], "mesh.timeout_s (0.0) must be > 0"),
        (1, ["train.stop_after_s=-1"], "train.stop_after_s (-1.0) must be > 0"),
        (1, ["optim.betas=[0.9]"], "optim.betas ([0.9]) must be two numbers, each >= 0 and < 1"),
        (1, ["optim.betas=[0.9,1]"], "optim.betas ([0.9, 1.0]) must be two numbers"),
        (
            1,
            ["optim.warmup_steps=20", "train.steps=10"],
            "optim.warmup_steps (20) must be <= train.steps (10)",
        ),
        (1, ["optim.schedule=wsd"], "optim.decay_steps (0) must be >= 1 with optim.schedule=wsd"),
        (
            1,
            ["optim.schedule=wsd", "optim.warmup_steps=6", "optim.decay_steps=5", "train.steps=10"],
            "optim.warmup_steps (6) + optim.decay_steps (5) must be <= train.steps (10)",
        ),
        (1, ["optim.decay_steps=5"], "optim.decay_steps (5) has no meaning with optim.schedule="),
        (
            1,
            ["model.overrides.num_experts_per_tok=9"],
            "model.top_k (9, experts per token) must be <= model.num_experts (8)",
        ),
        (
            1,
            ["train.seq_len=2048"],
            "train.seq_len (2048) must be <= max_position_embeddings of the model (1024)",
        ),
        (1, ["model=hf"], "model.source and model.family are both null; give model.source"),
        (1, ["model.source=x"], "choose model=hf to continue a checkpoint"),
        (1, ["~data.sources.stdlib"], "data.sources is empty; choose a data group"),
        (1, ["+data.weights.code=1"], "data.weights names ['code'] but data.sources has"),
        (1, ["+data.weights.stdlib=-1"], "data.weights ({'stdlib': -1.0}) must be >= 0"),
        (1, ["+data.weights.stdlib=0"], "data.weights ({'stdlib': 0.0}) must be >= 0, and one"),
        (1, ["run.name='../x'"], "run.name ('../x') must be made of letters, digits and . _ -"),
        (1, ["run.name='..'"], "run.name ('..') must be made of"),
        (1, ["checkpoint.resume="], "checkpoint.resume is empty; leave it out"),
        (
            1,
            ["planner=sticky", "train.refetch_borrowed=true"],
            "train.refetch_borrowed (true) contradicts planner (Sticky), which keeps borrowed",
        ),
        (
            12,
            ["mesh.ep=4", "mesh.ranks_per_node=6", "dispatcher=two_level", "train.batch_size=96"],
            "dispatcher (two_level) needs mesh.ep (4) to be a multiple or a divisor of "
            "mesh.ranks_per_node (6), so that its groups lie evenly on nodes; "
            "use mesh.ep=1, 2, 3, 6 or 12",
        ),
        (
            1,
            ["relocate.every=50"],
            "relocate.every (50) needs statistics; set stats.every, such as st",
        ),
        (1, ["train.assign_sequences=true"], "predicts by token id; set stats.by_token=true"),
        (
            1,
            ["train.assign_sequences=true", "stats.by_token=true", "stats.every=1"],
            "has no statistics to begin with and none are looked at later; set relocate.every, or",
        ),
        (
            1,
            ["relocate.objective=batched"],
            "relocate.objective (batched) supposes train.assign_sequences=true",
        ),
        (1, ["stats.decay=1.5"], "stats.decay (1.5) must be > 0, <= 1"),
        (1, ["train.dispatch_chunks=-1"], "train.dispatch_chunks (-1) must be >= 0"),
        (1, ["cluster.inter_gbps=0"], "cluster.inter_gbps (0.0) must be > 0"),
    ],
)
def test_what_is_refused(world_size: int, overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(config(*overrides), world_size)
    assert expected in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        check(config("mesh.ep=3", "train.steps=0", "optim.warmup_steps=0"), 4)
    assert str(caught.value).splitlines() == [
        "train.steps (0) must be >= 1",
        "mesh.ep (3) must divide the world size (4); use 1, 2 or 4",
    ]


def test_facts_of_the_built_model_come_before_overrides() -> None:
    good = config("mesh.ep=4", "train.seq_len=512")
    check(good, 4, num_experts=16, top_k=4, max_positions=512)
    with pytest.raises(ValueError, match=r"mesh.ep \(4\) must divide the number of experts \(6\)"):
        check(good, 4, num_experts=6)
    with pytest.raises(ValueError, match=r"model.top_k \(5, experts per token\)"):
        check(good, 4, num_experts=4, top_k=5)
    with pytest.raises(ValueError, match=r"train.seq_len \(512\)"):
        check(good, 4, max_positions=256)


def test_every_number_has_a_bound() -> None:
    for field in [*FIELDS, *fields(LaunchConfig)]:
        if field.type.split(" | ")[0] in ("int", "float"):
            assert bounds_text(field.key), f"{field.key} has no bound in configs/rules.py"


def test_bounds_are_of_fields_that_exist() -> None:
    from configs.rules import ABOVE, AT_LEAST, AT_MOST, BELOW

    known = {field.key for field in [*FIELDS, *fields(LaunchConfig)]}
    assert {*ABOVE, *AT_LEAST, *AT_MOST, *BELOW} <= known


def test_every_value_is_documented() -> None:
    for field in [*FIELDS, *launch_fields()]:
        assert field.text.endswith("."), f"{field.key} has no text"
    modules = schema, sweep_schema, upcycle_schema, launch_schema
    for cls in [value for module in modules for value in vars(module).values()]:
        if dataclasses.is_dataclass(cls) and isinstance(cls, type):
            assert cls.__doc__ and typing.get_type_hints(cls)
