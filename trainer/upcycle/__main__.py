"""Turn a dense checkpoint into an MoE: `python -m trainer.upcycle source=... target_dir=...`.

`--help` lists every recipe and value; `verify DIR` checks a result again.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from configs.compose import load_upcycle
from configs.describe import upcycle_help_text
from configs.errors import COMPOSE_ERRORS, explain
from configs.upcycle_schema import UpcycleConfig, check_upcycle
from parallel.memory import return_freed_memory
from trainer.upcycle.advice import advice
from trainer.upcycle.convert import Advance, convert, read_receipt, write_receipt
from trainer.upcycle.plan import describe, make_plan
from trainer.upcycle.verify import verify

EXIT_CONFIG, EXIT_RUN = 2, 1
FULL_ERROR = "HYDRA_FULL_ERROR"


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert or verify as the command line says; returns the exit code.

    0: done, and as expected. 1: failed, or not as expected. 2: refused before any work.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in given or "-h" in given:
        print(upcycle_help_text())
        return 0
    console = Console()
    return_freed_memory()
    try:
        if given[:1] == ["verify"]:
            return check_result(given[1:], console)
        config = load_upcycle(*given)
        check_upcycle(config)
        plan = make_plan(config)
    except (*COMPOSE_ERRORS, ValueError) as error:
        return _refused(explain(error, UpcycleConfig), error, EXIT_CONFIG)
    print_lines("plan", describe(plan), console)
    for line in advice(plan):
        console.print(f"note: {line}", markup=False)
    if config.dry_run:
        return 0
    try:
        with progress_bar(console, "writing", plan.num_bytes) as advance:
            target = convert(plan, advance)
        console.print(f"written to {target}", markup=False)
        return check_result([str(target)], console) if config.verify else 0
    except (ValueError, OSError) as error:
        return _refused(str(error), error, EXIT_RUN)


def check_result(arguments: Sequence[str], console: Console) -> int:
    """Verify a folder and write what was measured into its receipt."""
    if len(arguments) != 1:
        raise ValueError("verify takes one folder: python -m trainer.upcycle verify DIR")
    target = Path(arguments[0])
    content, config = read_receipt(target)
    plan = make_plan(config)
    with progress_bar(console, "verifying", plan.num_bytes) as advance:
        steps = verify(plan, content, advance)
    content["measured"] = {step.name: step.outcome for step in steps}
    write_receipt(target, content)
    print_lines(
        "verified", {s.name: ("" if s.good else "FAILED: ") + s.outcome for s in steps}, console
    )
    return 0 if all(step.good for step in steps) else EXIT_RUN


def print_lines(title: str, lines: dict[str, Any], console: Console) -> None:
    """A table of names and values."""
    table = Table(title=title, show_header=False)
    for name, value in lines.items():
        table.add_row(name, str(value))
    console.print(table)


@contextmanager
def progress_bar(console: Console, what: str, num_bytes: int) -> Iterator[Advance]:
    """A bar with bytes, speed and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda done: progress.advance(task, done)


def _refused(message: str, error: BaseException, code: int) -> int:
    if os.environ.get(FULL_ERROR) == "1":
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
