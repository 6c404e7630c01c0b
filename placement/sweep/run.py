"""Compare placements, planners, dispatchers and clusters by simulation.

    python -m placement.sweep -m placement=contiguous,random,affinity planner=home,quota

`--help` lists every group and value. The folder of a sweep keeps every finished cell, so the same
command goes on where it was stopped, and a larger sweep runs only what is new.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from configs.compose import composed_cell, to_cell
from configs.describe import choices, sweep_help_text
from configs.errors import COMPOSE_ERRORS, did_you_mean, explain
from configs.sweep_schema import GROUPS, SweepConfig, check_sweep
from placement.sweep.cell import FORMAT, Cell, failure, run_group, write
from placement.sweep.page import write_page
from placement.sweep.table import print_table, write_tables

EXIT_CONFIG, EXIT_RUN, EXIT_STOPPED = 2, 1, 130
FULL_ERROR = "HYDRA_FULL_ERROR"
LOOK_EVERY_S = 0.25
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says; returns the exit code.

    0: every cell is simulated. 1: some failed; the table says why. 2: refused before any work.
    130: stopped by Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in given or "-h" in given:
        print(sweep_help_text())
        return 0
    try:
        cells = cells_of(given)
    except (*COMPOSE_ERRORS, ValueError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exception(error)
        print(f"error: {explain(error, SweepConfig)}", file=sys.stderr)
        return EXIT_CONFIG
    folder, console = Path(cells[0].config.dir), Console()
    stopped = False
    try:
        run(cells, folder, cells[0].config.n_jobs or _cores(), console)
    except KeyboardInterrupt:
        stopped = True
    records = [read(cell, folder) for cell in cells]
    done = sum(record is not None and record["status"] == "done" for record in records)
    known = [(cell, record) for cell, record in zip(cells, records, strict=True) if record]
    if known:
        write_tables(known, folder)
        print_table(known, console)
        write_page(known, folder / "report.html")
        console.print(f"report: {folder / 'report.html'}", markup=False, soft_wrap=True)
    if stopped:
        print(
            f"stopped: {done} of {len(cells)} cells are finished; the same command goes on from "
            f"there",
            file=sys.stderr,
        )
        return EXIT_STOPPED
    return 0 if done == len(cells) else EXIT_RUN


def cells_of(arguments: Sequence[str]) -> list[Cell]:
    """Every combination of the values on the command line, composed and checked.

    Raises:
        HydraException, OmegaConfBaseException: `explain` of configs/errors.py words them.
        ValueError: for flags, groups and values that a sweep cannot have.
    """
    flags = {argument for argument in arguments if argument.startswith("-")}
    unknown = sorted(flags - {"-m", "--multirun"})
    if unknown:
        raise ValueError(f"{unknown[0]}: no such flag; known: -m, --help")
    words = [argument for argument in arguments if argument not in flags]
    overrides = OverridesParser.create().parse_overrides(words)
    for override in overrides:
        _check_override(override, many=bool(flags))
    axes = [_values(override) for override in overrides]
    varying = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    cells: dict[str, Cell] = {}
    for values in itertools.product(*axes):
        cell = _cell(values, varying)
        cells.setdefault(cell.digest, cell)
    for key in ("dir", "n_jobs"):
        if key in varying:
            raise ValueError(f"{key}: a sweep has one; give it one value")
    return list(cells.values())


def run(cells: Sequence[Cell], folder: Path, n_jobs: int, console: Console) -> None:
    """Simulate what is not finished yet, in so many processes; cells of a group in one."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        record = read(cell, folder)
        if record is None or record["status"] != "done":
            cell.path(folder).unlink(missing_ok=True)
            groups.setdefault(cell.group, []).append(cell)
    kept, waiting = len(cells) - sum(map(len, groups.values())), list(groups.values())
    if kept:
        console.print(f"{kept} of {len(cells)} cells are finished already, in {folder}")
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["placement.sweep.cell"])
    running: dict[int, tuple[BaseProcess, list[Cell]]] = {}
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(cells), completed=kept)
            while waiting or running:
                while waiting and len(running) < n_jobs:
                    group = waiting.pop(0)
                    process: BaseProcess = processes.Process(target=_work, args=(group, folder))
                    process.start()
                    running[process.sentinel] = process, group
                for sentinel in wait(list(running), LOOK_EVERY_S):
                    assert isinstance(sentinel, int)
                    _close(*running.pop(sentinel), folder)
                written = sum(cell.path(folder).exists() for cell in cells)
                progress.update(task, completed=written)
    finally:
        for process, _ in running.values():
            _kill(process)


def read(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The record of a cell; None if there is none, or one of another version."""
    try:
        record = json.loads(cell.path(folder).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return record if record.get("format") == FORMAT else None


def _work(cells: list[Cell], folder: Path) -> None:
    """What a process does, away from the terminal; solvers write to a log."""
    os.setsid()
    path = folder / "cells" / f"{cells[0].group}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        run_group(cells, folder)


def _close(process: BaseProcess, cells: list[Cell], folder: Path) -> None:
    """A process has ended; what it left undone has failed."""
    process.join()
    for cell in cells:
        if read(cell, folder) is None:
            code = process.exitcode
            why = " (killed; out of memory?)" if code == -signal.SIGKILL else ""
            write(cell, folder, failure(RuntimeError(f"its process ended with code {code}{why}")))


def _kill(process: BaseProcess) -> None:
    """End a process and what it started."""
    try:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not become a group of its own yet, or has ended
        process.kill()
    process.join()


def _check_override(override: Override, many: bool) -> None:
    line, key = override.input_line, override.get_key_element().lstrip("+~")
    others = {choice.group for choice in choices()} - set(GROUPS)
    if key in others and not hasattr(SweepConfig, key):
        raise ValueError(
            f"{line}: a sweep has no group {key}; it has {', '.join(GROUPS)} "
            f"({did_you_mean(key, GROUPS)})"
        )
    if override.is_sweep_override() and not many:
        raise ValueError(f"{line}: several values; add -m to simulate all of them")
    if override.is_sweep_override() and not override.is_discrete_sweep():
        raise ValueError(f"{line}: an interval has no values to run through; list them: {key}=A,B")


def _values(override: Override) -> list[tuple[str, str]]:
    """An override's key and each of its values, as overrides of one value."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [(key, str(override.input_line))]
    return [(key, f"{key}={value}") for value in override.sweep_string_iterator()]


def _cell(values: Sequence[tuple[str, str]], varying: Sequence[str]) -> Cell:
    composition, chosen = composed_cell(*(line for _, line in values))
    config = to_cell(composition)
    check_sweep(config, chosen)
    name = {key: line.partition("=")[2] for key, line in values if key in varying}
    decides = {n: v for n, v in config.resolved.items() if n not in ("dir", "n_jobs")}
    files = [config.stats, config.trace, config.placement.get("path")]
    files += [config.placement.get("stats"), config.planner.get("copies")]
    contents = {path: _fingerprint(Path(path)) for path in files if path is not None}
    shared = {n: v for n, v in decides.items() if n not in ("planner", "dispatcher")}
    group, digest = (_digest([FORMAT, part, contents]) for part in (shared, decides))
    return Cell(digest, group, chosen, name, config)


@cache
def _fingerprint(path: Path) -> str:
    """Of a file's contents, or of all files of a folder.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        files = sorted(path.glob("*")) if path.is_dir() else [path]
        return _digest([[file.name, _contents(file)] for file in files if not file.is_dir()])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give another path") from error


def _contents(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
