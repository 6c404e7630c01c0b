"""Start a job: `python -m launch launcher=slurm nodes=4 ranks_per_node=8 -- OVERRIDES`.

What follows `--` are the overrides of the job, which get there unchanged. `--help` lists every
launcher and value. `python -m launch plan` sizes a job instead (launch/sizing).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.compose import load_launch
from configs.describe import launch_help_text
from configs.errors import COMPOSE_ERRORS, explain
from configs.launch_schema import LaunchConfig, check_launch
from launch.checks import check_job
from launch.findings import Finding, State
from launch.plan import Launcher, Plan, make_plan

EXIT_CONFIG = 2
FULL_ERROR = "HYDRA_FULL_ERROR"
PLAN, SEPARATOR = "plan", "--"
STYLES = {State.ok: "green", State.note: "yellow", State.problem: "red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and start what the command line says; returns the exit code.

    2: refused, nothing was started or written. Otherwise the launcher's: launcher=local becomes
    the job and does not return.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [PLAN]:
        from launch.sizing.command import size  # takes seconds to import

        return size(given[1:])
    split = given.index(SEPARATOR) if SEPARATOR in given else len(given)
    own, overrides = given[:split], tuple(given[split + 1 :])
    if "--help" in own or "-h" in own:
        print(launch_help_text())
        return 0
    try:
        config = load_launch(*own)
        check_launch(config)
        launcher: Launcher = instantiate(config.launcher)
        plan = make_plan(config, launcher, overrides)
    except (*COMPOSE_ERRORS, ValueError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exception(error)
        print(f"error: {explain(error, LaunchConfig)}", file=sys.stderr)
        if split == len(given):
            print("(overrides of the job follow --, which is missing)", file=sys.stderr)
        return EXIT_CONFIG
    findings, lines = check_job(plan, launcher)
    show(plan, findings, lines)
    problems = sum(finding.state is State.problem for finding in findings)
    if problems and not config.force:
        print(
            f"error: the checks above found {problems} "
            f"problem{'s' * (problems > 1)}; nothing was started (force=true would go on)",
            file=sys.stderr,
        )
        return EXIT_CONFIG
    print(launcher.text(plan))
    return 0 if config.dry_run else launcher.launch(plan)


def show(plan: Plan, findings: Sequence[Finding], lines: dict[str, str]) -> None:
    """What is started, how it is laid out and what the checks found."""
    table = Table(title=f"launch {plan.module}", show_header=False)
    for name, value in lines.items():
        table.add_row(name, "", Text(value))
    if lines:
        table.add_section()
    for finding in findings:
        state = Text(finding.state.value, style=STYLES[finding.state])
        table.add_row(finding.name, state, Text(finding.text))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
