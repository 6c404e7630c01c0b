"""From the command line to one checked configuration, and back to YAML."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from configs.describe import help_node
from configs.errors import did_you_mean
from configs.launch_schema import LaunchConfig
from configs.schema import Config
from configs.secrets import masked_text
from configs.sizing_schema import SizingConfig
from configs.slots import slot_problems, slots
from configs.sweep_schema import GROUPS, SweepConfig
from configs.upcycle_schema import UpcycleConfig

MAX_FOLDER_NAME = 120


def register() -> None:
    """Make the schema, the help text, `${sweep_job:}` and `${per_rank:N}` known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="sweep_schema", node=SweepConfig)
    store.store(name="upcycle_schema", node=UpcycleConfig)
    store.store(name="launch_schema", node=LaunchConfig)
    store.store(name="sizing_schema", node=SizingConfig)
    store.store(group="hydra/help", name="evenkeel", node=help_node())
    OmegaConf.register_new_resolver("sweep_job", sweep_job, replace=True)
    OmegaConf.register_new_resolver("per_rank", per_rank, replace=True)


def composed(*overrides: str) -> DictConfig:
    """The groups and overrides of a command line, merged into the schema and not yet resolved.

    Raises:
        HydraException, OmegaConfBaseException: `explain` of configs/errors.py words them.
    """
    register()
    with initialize_config_module("configs", version_base="1.3"):
        return compose("config", list(overrides))


def composed_cell(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """One cell of a sweep, merged into its schema and not yet resolved, and its groups' choices.

    Raises:
        HydraException, OmegaConfBaseException: `explain` of configs/errors.py words them.
    """
    register()
    with initialize_config_module("configs", version_base="1.3"):
        composition = compose("sweep", list(overrides), return_hydra_config=True)
    chosen = composition.hydra.runtime.choices
    choices = {group: str(chosen[group]) for group in GROUPS}
    with open_dict(composition):
        del composition["hydra"]
    return composition, choices


def load(*overrides: str) -> Config:
    """The configuration that these overrides of the command line give.

    Raises:
        HydraException, OmegaConfBaseException: `explain` of configs/errors.py words them.
        ValueError: for missing values and for slots that do not fit their target.
    """
    return to_config(composed(*overrides))


def to_config(composed: DictConfig) -> Config:
    """Resolve a composed configuration into dataclasses and check its slots.

    Raises:
        ValueError: for missing values and for slots that do not fit their target.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(
            f"missing values: {', '.join(missing)}; give them on the command line "
            f"({missing[0]}=...) or choose an experiment that sets them (experiment=quickstart)"
        )
    config = _resolved(composed)
    assert isinstance(config, Config)
    return config


def load_upcycle(*overrides: str) -> UpcycleConfig:
    """The configuration of a conversion that these overrides of the command line give.

    Raises:
        HydraException, OmegaConfBaseException: `explain` of configs/errors.py words them.
        ValueError: for missing values and for slots that do not fit their target.
    """
    config = _load("upcycle", *overrides)
    assert isinstance(config, UpcycleConfig)
    return config


def load_launch(*overrides: str) -> LaunchConfig:
    """The configuration of a launch that these overrides of the command line give.

    Raises:
        HydraException, OmegaConfBaseException: `explain` of configs/errors.py words them.
        ValueError: for missing values and for slots that do not fit their target.
    """
    config = _load("launch", *overrides)
    assert isinstance(config, LaunchConfig)
    return config


def load_sizing(*overrides: str) -> SizingConfig:
    """The configuration of a plan that these overrides of the command line give.

    Raises:
        HydraException, OmegaConfBaseException: `explain` of configs/errors.py words them.
        ValueError: for missing values and for slots that do not fit their target.
    """
    config = _load("sizing", *overrides)
    assert isinstance(config, SizingConfig)
    return config


def _load(root: str, *overrides: str) -> Any:
    register()
    with initialize_config_module("configs", version_base="1.3"):
        composition = compose(root, list(overrides))
    _refuse_missing(composition)
    return _resolved(composition)


def to_cell(composed: DictConfig) -> SweepConfig:
    """Resolve a composed cell of a sweep into dataclasses and check its slots.

    Without `placement.stats` a solved placement has the statistics of the sweep, and so null here.

    Raises:
        ValueError: for missing values and for slots that do not fit their target.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if "placement.stats" in missing:
        composed.placement.stats = None
    _refuse_missing(composed)
    config = _resolved(composed)
    assert isinstance(config, SweepConfig)
    return config


def _refuse_missing(composed: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(
            f"missing values: {', '.join(missing)}; give them on the command line "
            f"({missing[0]}=...)"
        )


def _resolved(composed: DictConfig) -> Any:
    config: Any = OmegaConf.to_object(composed)
    problems = unknown_fields(config)
    problems += [
        line for slot in slots(dataclasses.asdict(config)) for line in slot_problems(*slot)
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return config


def unknown_fields(config: Any, prefix: str = "") -> list[str]:
    """Keys that `+key=value` forced into a section of the schema, one line each."""
    known = {item.name for item in dataclasses.fields(config)}
    lines = [
        f"{prefix}{name}: no such key; {did_you_mean(name, known)}"
        for name in vars(config)
        if name not in known
    ]
    for name in known:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            lines += unknown_fields(value, f"{prefix}{name}.")
    return sorted(lines)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config.resolved))


def save_resolved(config: Config) -> Path:
    """Write the configuration to `config.yaml` in `run.dir`; call it on rank 0 only.

    A different one of an earlier start of the run stays there as `config.1.yaml`, and so on.
    """
    path = Path(config.run.dir) / "config.yaml"
    text = to_yaml(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        earlier = 1
        while (old := path.with_name(f"config.{earlier}.yaml")).exists():
            earlier += 1
        path.rename(old)
    partial = path.with_name("config.yaml.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def sweep_job() -> str:
    """`/` and the overrides of this job of a sweep, as a folder name; empty outside sweeps."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return ""
    overrides = masked_text(str(HydraConfig.get().job.override_dirname))
    name = overrides.replace(os.sep, "_") or "defaults"
    if len(name) > MAX_FOLDER_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        name = f"{name[: MAX_FOLDER_NAME - 13]}-{digest}"
    return f"/{name}"


def per_rank(total: int) -> int:
    """A rank's share of a number, rounded down, at least 1; `check` refuses what does not fit."""
    return max(1, total // int(os.environ.get("WORLD_SIZE", "1")))
