"""Checks of a training job before it is started: its configurations, its model, its files."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from torch import nn
from transformers import PretrainedConfig

from configs.compose import load
from configs.errors import COMPOSE_ERRORS, explain
from configs.schema import Config, check
from launch.findings import Finding, existing_parent, folder_finding, note, ok, problem
from launch.layout import Layout
from launch.plan import Plan
from parallel.model import find_experts
from trainer.data.files import find_files
from trainer.export import HFCheckpoint, own_dtype
from trainer.metrics import parameter_counts
from trainer.modeling import family_config, meta_model, override
from trainer.upcycle.plan import made

MULTIRUN = {"-m", "--multirun"}
BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weights and AdamW's two moments
GIB = 2**30


@dataclass(frozen=True)
class Model:
    """The model of a job, without storage."""

    shape: nn.Module
    num_experts: int

    @property
    def text_config(self) -> PretrainedConfig:
        config: Any = self.shape.config
        return config.get_text_config()


def check_training(plan: Plan, sees_files: bool) -> tuple[list[Finding], dict[str, str]]:
    """Everything about the job that can be known here, and its layout.

    Args:
        sees_files: whether the job has the files of this machine.
    """
    try:
        jobs = jobs_of(plan.overrides)
        configs_by_ranks = {}
        for ranks in plan.possible_ranks:
            with world_size(ranks):
                configs_by_ranks[ranks] = [load(*words) for words in jobs]
        configs = configs_by_ranks[plan.num_ranks]
    except (*COMPOSE_ERRORS, ValueError) as error:
        return [problem("config", line) for line in explain(error).splitlines()], {}
    found: list[Finding] = []
    models: list[Model | None] = []
    for job, config in enumerate(configs):
        model = None
        try:
            if sees_files or config.model.source is None:
                model = read_model(config)
        except ValueError as error:
            found += [problem("model", line) for line in str(error).splitlines()]
        models.append(model)
        for ranks, alike in configs_by_ranks.items():
            lines = config_problems(alike[job], ranks, model)
            on = f"on {ranks} ranks: " * (len(configs_by_ranks) > 1)
            found += [problem("config", on + line) for line in lines]
    if not found:
        numbers = " or ".join(map(str, configs_by_ranks))
        fit = f"{len(jobs)} jobs compose and fit" if len(jobs) > 1 else "composes and fits"
        found.append(ok("config", f"{fit} {numbers} ranks"))
        found.append(model_finding(models[0]))
    layout = layout_of(configs[0], plan, models[0])
    found.append(ep_finding(layout, models[0]))
    if sees_files:
        found += [one for config in configs for one in path_findings(config)]
        if models[0] is not None:
            found.append(disk_finding(configs[0], models[0].shape))
    else:
        found.append(note("paths", "the job's files are not on this machine and were not checked"))
    shown = layout.lines("GPUs" if plan.cuda else "CPUs", configs[0].cluster)
    return list(dict.fromkeys(found)), shown  # jobs of a sweep share most of theirs


def jobs_of(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a sweep (-m), or of the one job.

    Raises:
        OverrideParseException: for an override that is none.
        ValueError: for other flags, and for values that cannot be listed.
    """
    flags = [word for word in overrides if word.startswith("-")]
    words = [word for word in overrides if not word.startswith("-")]
    unknown = sorted({*flags} - MULTIRUN)
    if unknown:
        raise ValueError(f"{unknown[0]}: of the job's flags only -m can be launched; leave it out")
    parsed = OverridesParser.create().parse_overrides(words)
    if not flags:
        return [words]
    axes = []
    for one in parsed:
        if one.is_sweep_override() and not one.is_discrete_sweep():
            raise ValueError(
                f"{one.input_line}: an interval has no values to run through; list them"
            )
        swept = one.is_sweep_override()
        key = one.get_key_element()
        values = one.sweep_string_iterator() if swept else ()
        axes.append([f"{key}={value}" for value in values] if swept else [str(one.input_line)])
    return [list(job) for job in itertools.product(*axes)]


def read_model(config: Config) -> Model | None:
    """The job's model, of shapes alone; None if its checkpoint is not in a folder here.

    Raises:
        ValueError: for a model that cannot be built or has no experts.
    """
    model, source = config.model, config.model.source
    if source is None:
        if model.family is None:
            return None
        shape = meta_model(family_config(model.family, dict(model.overrides)))
    elif not Path(source).is_dir():
        return None
    else:
        checkpoint: Any = HFCheckpoint(source)
        if model.upcycle.recipe is not None:
            checkpoint = made(model.upcycle, [checkpoint], config.seed)
        shape = meta_model(override(checkpoint.config, dict(model.overrides)))
    experts: Any = find_experts(shape)[0][1]
    return Model(shape, int(experts.num_experts))


def config_problems(config: Config, num_ranks: int, model: Model | None) -> list[str]:
    """What does not fit, one line each."""
    known: dict[str, Any] = {}
    if model is not None:
        known = {
            "num_experts": model.num_experts,
            "top_k": getattr(model.text_config, "num_experts_per_tok", None),
            "max_positions": getattr(model.text_config, "max_position_embeddings", None),
        }
    problems = []
    for test in (
        lambda: check(config, num_ranks, **known),
        lambda: instantiate(config.planner),  # refuses impossible bounds
    ):
        try:
            test()
        except ValueError as error:
            problems += str(error).splitlines()
        except COMPOSE_ERRORS as error:
            problems += str(error.__cause__ or error).splitlines()
    return problems


def layout_of(config: Config, plan: Plan, model: Model | None) -> Layout:
    """The arrangement that trainer/run.py and parallel/mesh.py make."""
    ep = config.mesh.ep
    if ep is None and model is not None:
        ep = math.gcd(plan.num_ranks, model.num_experts)
    if ep is not None and (ep < 1 or plan.num_ranks % ep):
        ep = None  # refused
    return Layout(plan.config.nodes, plan.ranks_per_node, ep)


def ep_finding(layout: Layout, model: Model | None) -> Finding:
    """Whether EP groups stay within nodes."""
    if layout.ep is None:
        return note("EP", "not known before the model is read")
    across = layout.most_nodes()
    if across == 1:
        return ok("EP", f"groups of {layout.ep} stay within a node")
    fitting = math.gcd(layout.ranks_per_node, model.num_experts if model else layout.ep)
    within = f"mesh.ep={fitting} would stay within, " if fitting > 1 else ""
    return note(
        "EP",
        f"a group of {layout.ep} is on {across} nodes, so its exchange crosses nodes; {within}"
        f"dispatcher=two_level sends less between nodes",
    )


def model_finding(model: Model | None) -> Finding:
    """The model's size."""
    if model is None:
        return note("model", "not in a folder here: experts, sizes and disk space not checked")
    total, active = parameter_counts(model.shape)
    text = f"{total:,} parameters, {active:,} active, {model.num_experts} experts a layer"
    return ok("model", text)


def path_findings(config: Config) -> Iterator[Finding]:
    """Whether what the job reads is there, and where it writes can be written."""
    folders = {"run.dir": config.run.dir}
    if config.checkpoint.export:
        folders["checkpoint.export_dir"] = config.checkpoint.export_dir
    if config.data.cache_dir is not None:
        folders["data.cache_dir"] = config.data.cache_dir
    yield from (folder_finding(key, folder) for key, folder in folders.items())
    for key, files in sources(config):
        try:
            yield ok("paths", f"{key}: {len(find_files(files))} files")
        except ValueError as error:
            yield problem("paths", f"{key}: {error}")
    for key, path in single_paths(config):
        if Path(path).expanduser().exists():
            yield ok("paths", f"{key} ({path}) is there")
        elif key.startswith(("model.", "data.")) and looks_like_hub_id(path):
            yield note(
                "paths", f"{key} ({path}) is no folder here: the job fetches it from the hub"
            )
        else:
            yield problem("paths", f"{key} ({path}) is not there; looked from {Path.cwd()}")


def sources(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Key and patterns of every list of files of the data."""
    for name, source in config.data.sources.items():
        for field in ("paths", "validation_paths"):
            given = source.get(field)
            if given is not None:
                yield f"data.sources.{name}.{field}", [given] if isinstance(given, str) else given
        for field in ("prefix", "validation_prefix"):
            if source.get(field) is not None:
                pair = [f"{source[field]}.bin", f"{source[field]}.idx"]
                yield f"data.sources.{name}.{field}", pair


def single_paths(config: Config) -> Iterator[tuple[str, str]]:
    """Key and value of every other path that the job reads."""
    for name, source in config.data.sources.items():
        if source.get("path") is not None:
            yield f"data.sources.{name}.path", source["path"]
    if config.model.source is not None:
        yield "model.source", config.model.source
    if config.stats.path is not None:
        yield "stats.path", config.stats.path
    if config.checkpoint.resume not in ("auto", "none"):
        yield "checkpoint.resume", config.checkpoint.resume
    for slot in ("placement", "planner", "router"):
        for field in ("path", "stats", "copies"):
            value = getattr(config, slot).get(field)
            if isinstance(value, str):
                yield f"{slot}.{field}", value


def looks_like_hub_id(path: str) -> bool:
    """Whether it may be the name of a model or data set rather than a path."""
    return path.count("/") <= 1 and not path.startswith((".", "/", "~"))


def disk_finding(config: Config, shape: nn.Module) -> Finding:
    """Whether checkpoints and the export fit on the disk of run.dir."""
    parameters, _ = parameter_counts(shape)
    kept = config.checkpoint.keep + 1 if config.checkpoint.every else 1
    needed = parameters * BYTES_PER_PARAMETER * kept
    if config.checkpoint.export:
        model: Any = shape
        needed += parameters * own_dtype(model.config).itemsize
    folder = existing_parent(config.run.dir)
    free = shutil.disk_usage(folder).free
    what = f"{kept} checkpoint{'s' * (kept > 1)}" + " and the export" * config.checkpoint.export
    text = f"{needed / GIB:.2f} GiB for {what}, {free / GIB:.1f} GiB free"
    if needed > free:
        return problem("disk", f"{text} on {folder}; lower checkpoint.keep or move run.dir")
    return ok("disk", text)


@contextmanager
def world_size(ranks: int) -> Iterator[None]:
    """Compose as a rank of so many would."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(ranks)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before
