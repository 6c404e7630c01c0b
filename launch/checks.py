"""All checks of a job before it is started; every problem is found, not the first alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from configs.compose import load_upcycle
from configs.errors import COMPOSE_ERRORS, explain
from configs.launch_schema import Job
from configs.sweep_schema import SweepConfig
from configs.upcycle_schema import UpcycleConfig, check_upcycle
from launch.findings import Finding, existing_parent, folder_finding, note, ok, problem
from launch.plan import Launcher, Plan
from launch.training import GIB, check_training, looks_like_hub_id
from placement.sweep.run import cells_of
from trainer.upcycle.plan import make_plan


def check_job(plan: Plan, launcher: Launcher) -> tuple[list[Finding], dict[str, str]]:
    """What the checks found, and the layout of the ranks by name and value."""
    lines: dict[str, str] = {}
    if plan.config.job is Job.train:
        found, lines = check_training(plan, launcher.sees_files)
    elif plan.config.job is Job.upcycle:
        found = check_conversion(plan.overrides, launcher.sees_files)
    else:
        found = check_sweep(plan.overrides, launcher.sees_files)
    few = plan.config.min_nodes
    if few is not None and not launcher.is_here:
        text = f"min_nodes ({few}): this launcher starts jobs of all nodes alone; leave it out"
        found.append(problem("values", text))
    return [*found, *launcher.findings(plan)], lines


def check_conversion(overrides: Sequence[str], sees_files: bool) -> list[Finding]:
    """Of trainer.upcycle: its values, sources, target and disk space."""
    if overrides[:1] == ("verify",):
        folders = overrides[1:]
        if len(folders) != 1:
            return [problem("config", "verify takes one folder: -- verify DIR")]
        if sees_files and not Path(folders[0]).is_dir():
            return [problem("paths", f"{folders[0]} is no folder here")]
        return [ok("config", f"verifies {folders[0]}")]
    try:
        config = load_upcycle(*overrides)
        check_upcycle(config)
    except (*COMPOSE_ERRORS, ValueError) as error:
        return [problem("config", line) for line in explain(error, UpcycleConfig).splitlines()]
    found = [ok("config", "composes")]
    if not sees_files:
        return [*found, note("paths", "the job's files are not on this machine")]
    found.append(folder_finding("target_dir", config.target_dir))
    missing = [source for source in config.sources if not Path(source).is_dir()]
    for source in missing:
        if looks_like_hub_id(source):
            text = f"source ({source}) is no folder here: the job fetches it from the hub"
            found.append(note("paths", text))
        else:
            found.append(problem("paths", f"source ({source}) is no folder here"))
    return found if missing else [*found, _disk(config)]


def check_sweep(overrides: Sequence[str], sees_files: bool) -> list[Finding]:
    """Of placement.sweep: its cells and their files."""
    try:
        cells = cells_of(overrides)
    except (*COMPOSE_ERRORS, ValueError) as error:
        return [problem("config", line) for line in explain(error, SweepConfig).splitlines()]
    found = [ok("config", f"{len(cells)} cells compose")]
    if sees_files:
        found.append(folder_finding("dir", cells[0].config.dir))
    return found


def _disk(config: UpcycleConfig) -> Finding:
    """Whether the plan can be made of the sources, and its files fit."""
    try:
        needed = make_plan(config).num_bytes
    except ValueError as error:
        return problem("plan", str(error))
    folder = existing_parent(config.target_dir)
    free = shutil.disk_usage(folder).free
    text = f"{needed / GIB:.2f} GiB for the model, {free / GIB:.1f} GiB free"
    if needed > free:
        return problem("disk", f"{text} on {folder}; choose another target_dir")
    return ok("disk", text)
