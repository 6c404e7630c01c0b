"""Every configuration composes, and what does not compose says why in one message."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from configs.compose import (
    composed,
    load,
    load_upcycle,
    save_resolved,
    sweep_job,
    to_config,
    to_yaml,
)
from configs.describe import FOLDER, choices, examples, fields
from configs.errors import COMPOSE_ERRORS, explain
from configs.schema import Config
from configs.upcycle_schema import check_upcycle

CHOICES = [(choice.group, choice.name) for choice in choices()]
UPCYCLE_CHOICES = [(choice.group, choice.name) for choice in choices("upcycle")]
LAUNCH_CHOICES = [(choice.group, choice.name) for choice in choices("launch")]
GIVEN = {  # values that a choice cannot know
    ("placement", "file"): ["placement.path=placement.json"],
    ("placement", "affinity"): ["placement.stats=stats.npz"],
    ("placement", "ilp"): ["placement.stats=stats.npz"],
    ("placement", "load"): ["placement.stats=stats.npz"],
    ("placement", "moetuner"): ["placement.stats=stats.npz"],
    ("model", "hf"): ["model.source=model"],
    ("data", "datasets"): ["data.sources.datasets.path=corpus"],
    ("data", "indexed"): ["data.sources.indexed.prefix=corpus"],
    ("data", "jsonl"): ["data.sources.jsonl.paths=[corpus.jsonl]"],
    ("data", "mixture"): ["data.sources.text.paths=[corpus.txt]"],
    ("data", "text"): ["data.sources.text.paths=[corpus.txt]"],
    ("router", "replay"): ["router.path=runs/recorded/routing"],
    ("data/tokenizer", "bpe"): ["data.tokenizer.vocab_size=512"],
}


def message(*overrides: str) -> str:
    with pytest.raises((*COMPOSE_ERRORS, ValueError)) as caught:
        load(*overrides)
    return explain(caught.value)


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes(group: str, name: str) -> None:
    start = [] if group == "experiment" else ["experiment=quickstart"]
    composition = composed(*start, f"{group}={name}", *GIVEN.get((group, name), []))
    assert not OmegaConf.missing_keys(composition)
    assert isinstance(OmegaConf.to_object(composition), Config)


def test_experiments_are_named_after_their_file() -> None:
    """Sweeps over experiments keep their jobs apart by run.name."""
    for group, name in CHOICES:
        if group == "experiment":
            assert composed(f"experiment={name}").run.name == name


@pytest.mark.parametrize("command", [command for _, command in examples()])
def test_every_example_composes(command: str) -> None:
    overrides = [word for word in shlex.split(command) if "=" in word and word[0] != "-"]
    composition = composed(*[word.split(",")[0] if "," in word else word for word in overrides])
    assert not OmegaConf.missing_keys(composition)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.step=1", "train.step: no such key; did you mean train.steps?"),
        ("trane.steps=1", "trane: no such key; did you mean train?"),
        ("modle=tiny", "modle: no such key; did you mean model?"),
        (
            "train.zzz=1",
            "train.zzz: no such key; known: activation_checkpointing, allow_lookahead",
        ),
        ("+train.stps=1", "train.stps: no such key; did you mean steps?"),
        ("balance.auto.rat=1", "balance.auto.rat: no such key; did you mean balance.auto.rate?"),
        ("model.overrides.zzz=1", "needs a + before it: +model.overrides.zzz=..."),
        ("train.steps=abc", "train.steps (abc) must be an integer"),
        ("train.steps=null", "train.steps (null) must be an integer"),
        ("train.steps=", "train.steps ('') must be an integer"),
        ("mesh.ep=2.5", "mesh.ep (2.5) must be an integer or null"),
        ("train.compile=maybe", "train.compile (maybe) must be true or false"),
        ("optim.betas=[a,b]", "optim.betas[0] (a) must be list[float]"),
        ("train.precision=fp8", "train.precision (fp8) must be fp32 or bf16"),
        ("train=3", "train (3) is a section; set its values, such as train.steps=..."),
        ("model=tinyy", "model=tinyy: no such choice; did you mean tiny? model has deepseek_v3, "),
        ("logger=[console,wand]", "logger=wand: no such choice; did you mean wandb?"),
        ("experiment=zzz", "experiment=zzz: no such choice; known: innovator_warmup, quickstart"),
        ("placement=file", "missing values: placement.path; give them on the command line"),
        ("run.dir=${run.nam}", "run.dir: Interpolation key 'run.nam' not found"),
        ("train.steps=[1", "train.steps=[1: cannot be read; write KEY=VALUE"),
        ("train.steps=1,2", "add --multirun"),
    ],
)
def test_what_is_refused(override: str, expected: str) -> None:
    assert expected in message("experiment=quickstart", override)


def test_missing_values_are_named_together() -> None:
    assert message() == (
        "missing values: train.batch_size, train.micro_batch_size, train.seq_len, train.steps; "
        "give them on the command line (train.batch_size=...) or choose an experiment that sets "
        "them (experiment=quickstart)"
    )


def test_open_nodes_take_new_keys() -> None:
    config = to_config_without_slots(
        "+model.overrides.rope_theta=5", "+data.weights.stdlib=2", "+logger.mine._target_=a.B"
    )
    assert config.model.overrides["rope_theta"] == 5
    assert config.data.weights == {"stdlib": 2.0}
    assert config.logger["mine"] == {"_target_": "a.B"}


def to_config_without_slots(*overrides: str) -> Config:
    config = OmegaConf.to_object(composed("experiment=quickstart", *overrides))
    assert isinstance(config, Config)
    return config


def test_resolved_config_is_plain_and_complete() -> None:
    config = to_config_without_slots("train.precision=bf16", "run.name=x")
    plain = yaml.safe_load(to_yaml(config))
    assert plain == config.resolved
    assert plain["train"]["precision"] == "bf16"
    assert plain["checkpoint"]["export_dir"] == "runs/x/export"
    assert "${" not in to_yaml(config)
    for field in fields():
        value = plain
        for name in field.key.split("."):
            value = value[name]


def test_resolved_config_gives_the_same_config() -> None:
    config = to_config_without_slots()
    again = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(to_yaml(config)))
    assert OmegaConf.to_object(again) == config


def test_save_resolved_keeps_an_earlier_config(tmp_path: Path) -> None:
    first = to_config_without_slots(f"run.dir={tmp_path}/run")
    second = to_config_without_slots(f"run.dir={tmp_path}/run", "seed=1")
    assert save_resolved(first) == tmp_path / "run" / "config.yaml"
    save_resolved(first)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    save_resolved(second)
    save_resolved(first)
    kept = {path.name: path.read_text() for path in (tmp_path / "run").iterdir()}
    assert kept == {
        "config.yaml": to_yaml(first),
        "config.1.yaml": to_yaml(first),
        "config.2.yaml": to_yaml(second),
    }


def test_no_sweep_folder_outside_sweeps() -> None:
    assert sweep_job() == ""
    assert to_config_without_slots().run.dir == "runs/quickstart"


def test_the_quickstart_is_complete() -> None:
    to_config(composed("experiment=quickstart"))


def test_choices_and_files_agree() -> None:
    all_choices = [*CHOICES, *UPCYCLE_CHOICES, *LAUNCH_CHOICES]
    assert len(all_choices) == len(set(all_choices)) == len(list(FOLDER.glob("*/**/*.yaml")))


@pytest.mark.parametrize(("group", "name"), UPCYCLE_CHOICES)
def test_every_recipe_composes(group: str, name: str) -> None:
    config = load_upcycle("source=dense", "target_dir=moe", f"{group}={name}")
    check_upcycle(config)
    for slot in (config.recipe, config.router_init):
        instantiate(slot)


def test_a_conversion_without_source_or_target() -> None:
    with pytest.raises(ValueError, match=r"missing values: source, target_dir"):
        load_upcycle()
