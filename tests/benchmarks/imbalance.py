"""Planners on imbalanced routing: who waits for whom, and how near each comes to the ideal.

    export OMP_NUM_THREADS=1
    python -m tests.benchmarks.imbalance                           # W0..W7 and some cells
    python -m tests.benchmarks.imbalance --quick                   # under a minute
    python -m tests.benchmarks.imbalance --full --json out.json --plot out.png
    python -m tests.benchmarks.imbalance --workloads W2 95:1@0 --arms home quota
    python -m tests.benchmarks.imbalance --routing ids.npz --experts 64

Real gloo ranks run one MoE layer, the arms taking turns on the same rows, each step several times.
As the ranks share cores, the figure is the critical path: CPU seconds of each rank's own thread in
the layer, the fastest repeat of a step, its slowest rank, the median over steps. The forward time
is that of the forward pass of the training step. Every step is an optimizer step of one
micro-batch, so borrowed weights are fetched and their gradients returned in each. `ideal` is the
home plan's time times mean over max rows of a rank: what a level load would take if time followed
rows; `even` is the home plan on as many tokens whose routing is forced to be balanced (W0's), which
has smaller products than one hot rank. (On W0 it is the home plan once more: how much the two
differ is the noise.) Before the clocks run, output and gradients of every arm are compared with the
home plan's.

Workloads: see `tests/benchmarks/workloads.py`. Steps that move a hotspot, or that burst, are cells
of their own. Memory is the peak of live tensors in one more step, untimed, without parameters and
their gradients, against that of `even`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from parallel import planners
from parallel.plan import Planner
from tests.benchmarks.imbalance_figures import HOME, Cell, summarize, verdicts
from tests.benchmarks.imbalance_ranks import BYTES_PER_PARAMETER, VALUE_BYTES, Setup, measure
from tests.benchmarks.imbalance_report import plot, print_cell, print_verdicts
from tests.benchmarks.workloads import (
    RoutingShape,
    Workload,
    grid_names,
    public_workloads,
    recording,
    workload,
)
from tests.ranks import run_ranks

DEFAULTS = {
    "tokens": 4096,
    "hidden": 256,
    "width": 512,
    "experts": 32,
    "top_k": 2,
    "steps": 3,
    "repeats": 5,
}
QUICK = {
    "tokens": 64,
    "hidden": 64,
    "width": 64,
    "experts": 16,
    "top_k": 2,
    "steps": 2,
    "repeats": 3,
}
QUICK_WORKLOADS = ("W0", "W2", "95:1@0")
CELLS = ("95:1@0", "95:4@1", "80:4@0", "50:4@spread")


def arms(setup: Setup, shape: RoutingShape) -> dict[str, Callable[[], Planner]]:
    """A maker for the planner of every arm, with the settings of the benchmark."""
    return {
        HOME: lambda: planners.home_plan,
        "least_loaded": lambda: planners.LeastLoaded(
            min_rows=setup.topology.rows_worth_moving(BYTES_PER_PARAMETER)[0]
        ),
        "quota": lambda: planners.Quota(),
        "sticky": lambda: planners.Sticky(planners.Quota()),
        "materialize": lambda: planners.Materialize().for_widths(
            setup.hidden,
            setup.expert_parameters,
            bytes_per_value=VALUE_BYTES,
            bytes_per_parameter=BYTES_PER_PARAMETER,
        ),
        "replicated": lambda: planners.Replicated(slots=shape.experts_per_rank),
    }


def run(load: Workload, setup: Setup, arm_names: Sequence[str], stacks: list[Tensor]) -> list[Cell]:
    """All arms on one workload, on real ranks: one cell for every part of it."""
    makers = arms(setup, load.shape)
    chosen = {name: makers[name]() for name in arm_names}
    ranks = run_ranks(measure, setup.ranks, load, setup, chosen, stacks, timeout_s=1200)
    return summarize(load.name, load.part, ranks)


def weights(setup: Setup, num_experts: int) -> list[Tensor]:
    """Stacks of gate and up, and of down projections, for all experts."""
    generator = torch.Generator().manual_seed(setup.seed)
    sizes = [(2 * setup.width, setup.hidden), (setup.hidden, setup.width)]
    return [torch.randn(num_experts, *size, generator=generator) * 0.02 for size in sizes]


def machine() -> dict[str, Any]:
    """What the figures depend on besides the options."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads_per_rank": 1,
        "dtype": "float32",
    }


def chosen_workloads(options: argparse.Namespace, shape: RoutingShape) -> list[Workload]:
    """The workloads of the command line, in order."""
    if options.routing is not None:
        return [recording(options.routing, shape.num_ranks, shape.num_experts, shape.tokens)]
    public = list(public_workloads(shape))
    names: list[str] = []
    for name in options.workloads:
        groups = {"grid": grid_names(shape), "all": [*public, *grid_names(shape)]}
        names += groups.get(name, [name])
    return [workload(name, shape) for name in dict.fromkeys(names)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--ranks-per-node", type=int, help="default: two nodes")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="W0..W7, cells, grid, all")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: all")
    parser.add_argument("--routing", type=Path, help="replay a recording instead")
    for name, value in DEFAULTS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, help=f"default: {value}")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clocks run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three workloads")
    parser.add_argument("--full", action="store_true", help="the same as --workloads all")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.workloads is None:
        short = QUICK_WORKLOADS if options.quick else (*(f"W{n}" for n in range(8)), *CELLS)
        options.workloads = ["all"] if options.full else short
    if options.ranks_per_node is None:
        options.ranks_per_node = max(1, options.ranks // 2)
    for name in ("warmup", "steps", "repeats", "ranks_per_node"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be >= 1")
    return options


def main(arguments: Sequence[str] | None = None) -> list[Cell]:
    """The command; returns what it found."""
    options = parse(arguments)
    shape = RoutingShape(options.ranks, options.experts, options.top_k, options.tokens)
    setup = Setup(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Setup)})
    known = list(arms(setup, shape))
    arm_names = list(dict.fromkeys([HOME, *(options.arms or known)]))
    unknown = sorted(set(arm_names) - set(known))
    if unknown:
        raise ValueError(f"--arms ({', '.join(unknown)}) must be among {', '.join(known)}")
    console, about, stacks = Console(width=120), machine(), weights(setup, options.experts)
    console.print(f"{about}\n{setup}\n{shape}", highlight=False)
    console.print(
        f"{setup.ranks} ranks share {about['cores']} cores: wall time says nothing about planners "
        f"here; read f+b x (critical path over CPU time of ranks)."
    )
    if options.quick:
        console.print(
            "--quick: sizes so small that overheads rule; look at what runs, not how fast."
        )
    cells: list[Cell] = []
    for load in chosen_workloads(options, shape):
        found = run(load, setup, arm_names, stacks)
        for cell in found:
            print_cell(cell, console)
        cells += found
    results = verdicts(cells)
    print_verdicts(results, console)
    if options.json is not None:
        everything = {
            "machine": about,
            "setup": dataclasses.asdict(setup),
            "shape": dataclasses.asdict(shape),
            "cells": [dataclasses.asdict(cell) for cell in cells],
            "targets": [dataclasses.asdict(verdict) for verdict in results],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    if options.plot is not None:
        plot(cells, options.plot)
    return cells


if __name__ == "__main__":
    main()
