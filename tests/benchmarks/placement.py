"""Placements: how good, how certain, how fast.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.placement [--only NAME] [--trace FILE ...]

Cost of an instance: the share of transitions between consecutive layers that change rank, where a
change of node counts 4. "held out" is the cost of the found placement on other sequences of the
same model. The gap is certified: no placement is better by more. Times are CPU seconds of one
process; `--trace` takes recorded routing (.npy or .npz) as one more instance on --nodes x
--ranks-per-node ranks. The last tables: load limits; moves after drift. ExFlow's own formulation
is beside ours in exflow_formulation.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from placement.bounds import lower_bound
from placement.exact import is_small, solve_exact
from placement.problem import Problem
from placement.search import search
from placement.stats import RoutingStats
from placement.synthetic import SyntheticRouter
from placement.trace import Trace, load_trace

NODE_CROSSING = 4.0  # of a transition to another node, in transitions to another rank
SEQ_LEN = 128


@dataclass(frozen=True)
class Instance:
    """L layers x E experts on nodes x ranks per node, from so many sequences."""

    name: str
    layers: int
    experts: int
    nodes: int
    ranks_per_node: int
    sequences: int = 400


INSTANCES = [
    Instance("4x8 on 4", 4, 8, 1, 4),
    Instance("32x8 on 4", 32, 8, 1, 4),
    Instance("12x16 on 4", 12, 16, 1, 4),
    Instance("12x16 on 2x2", 12, 16, 2, 2),
    Instance("24x32 on 8", 24, 32, 1, 8),
    Instance("32x64 on 2x4", 32, 64, 2, 4),
    Instance("58x256 on 8x8", 58, 256, 8, 8, 1600),
]


@dataclass(frozen=True)
class Found:
    """Costs as a share of transitions; CPU seconds; peak memory of the process in MB."""

    name: str
    contiguous: float
    cost: float
    held_out: float | None
    bound: float
    proven: bool
    search_s: float
    bound_s: float
    peak_mb: float

    @property
    def gap(self) -> float:
        return 0.0 if self.proven else (self.cost - self.bound) / self.cost


def problem_of_pairs(trace: Trace, nodes: int, ranks_per_node: int) -> Problem:
    """The instance's problem: first choices only, cost per transition."""
    first = replace(trace, ids_TLK=trace.ids_TLK[:, :, :1], source_T=None)
    stats = RoutingStats.of_trace(first)
    pair_LEE = stats.pair_LEE.numpy()
    ranks = nodes * ranks_per_node
    node_R = np.arange(ranks) // ranks_per_node
    distance_RR = np.where(node_R[:, None] == node_R, 1.0, NODE_CROSSING)
    np.fill_diagonal(distance_RR, 0)
    home_E = np.arange(trace.num_experts) // (trace.num_experts // ranks)
    return Problem(
        node_of_R=tuple(node_R.tolist()),
        distance_RR=distance_RR,
        pair_LEE=pair_LEE / pair_LEE.sum(),
        load_LE=stats.load_LE.numpy(),
        start_LE=np.tile(home_E, (trace.num_layers, 1)),
    )


def measure(name: str, problem: Problem, other: Problem | None, time_limit_s: float) -> Found:
    """Solve one instance."""
    start = time.process_time()
    home_LE = search(problem, time_limit_s=time_limit_s)
    searched = time.process_time()
    if is_small(problem):
        result = solve_exact(problem, start_LE=home_LE, time_limit_s=time_limit_s)
        home_LE, bound, proven = result.home_LE, result.lower_bound, result.proven
    else:
        bound, proven = lower_bound(problem, time_limit_s=time_limit_s), False
    return Found(
        name,
        problem.value(problem.start_LE),
        problem.value(home_LE),
        other.value(home_LE) if other else None,
        bound,
        proven,
        searched - start,
        time.process_time() - searched,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def instances(args: argparse.Namespace) -> list[Found]:
    found = []
    for instance in INSTANCES:
        if args.only and args.only != instance.name:
            continue
        router = SyntheticRouter(instance.layers, instance.experts, args.strength)
        problem, other = (
            problem_of_pairs(
                router.sample(instance.sequences, SEQ_LEN, 1, seed=seed),
                instance.nodes,
                instance.ranks_per_node,
            )
            for seed in (1, 2)
        )
        found.append(measure(instance.name, problem, other, args.time_limit_s))
    for path in args.trace:
        problem = problem_of_pairs(load_trace(path), args.nodes, args.ranks_per_node)
        found.append(measure(Path(path).stem, problem, None, args.time_limit_s))
    return found


def table_of(found: list[Found]) -> Table:
    table = Table(title="cost per transition", caption="times in CPU seconds")
    for column in [
        "instance",
        "contiguous",
        "found",
        "held out",
        "bound",
        "gap",
        "search",
        "bound s",
        "peak MB",
    ]:
        table.add_column(column, justify="left" if column == "instance" else "right")
    for row in found:
        table.add_row(
            row.name,
            f"{row.contiguous:.4f}",
            f"{row.cost:.4f}",
            "" if row.held_out is None else f"{row.held_out:.4f}",
            f"{row.bound:.4f}",
            "optimal" if row.proven else f"{row.gap:.1%}",
            f"{row.search_s:.2f}",
            f"{row.bound_s:.1f}",
            f"{row.peak_mb:.0f}",
        )
    return table


def limits(args: argparse.Namespace) -> Table:
    """What a bound on the load ratio of every layer costs, 32x64 on 2x4."""
    router = SyntheticRouter(32, 64, args.strength)
    problem = problem_of_pairs(router.sample(400, SEQ_LEN, 1), 2, 4)
    table = Table(title="load limits, 32x64 on 2x4")
    for column in ("max load ratio", "found", "mean load ratio", "CPU s"):
        table.add_column(column, justify="right")
    for limit in (None, 1.2, 1.1, 1.05):
        start = time.process_time()
        limited = replace(problem, max_load_ratio=limit)
        home_LE = search(limited, time_limit_s=args.time_limit_s)
        load_LR = limited.rank_load(home_LE)
        table.add_row(
            str(limit or "none"),
            f"{limited.value(home_LE):.4f}",
            f"{(load_LR.max(1) / load_LR.mean(1)).mean():.3f}",
            f"{time.process_time() - start:.1f}",
        )
    return table


def drift(args: argparse.Namespace) -> Table:
    """Half of the tokens from another model: gain kept under a bound on moves, 32x64 on 2x4."""
    before = SyntheticRouter(32, 64, args.strength).sample(400, SEQ_LEN, 1)
    other = SyntheticRouter(32, 64, args.strength, seed=9).sample(200, SEQ_LEN, 1)
    mixed_ids = np.concatenate([before.ids_TLK[: 200 * SEQ_LEN], other.ids_TLK])
    current_LE = search(problem_of_pairs(before, 2, 4), time_limit_s=args.time_limit_s)
    drifted = replace(problem_of_pairs(Trace(mixed_ids, 64), 2, 4), start_LE=current_LE)
    fresh = drifted.value(search(drifted, time_limit_s=args.time_limit_s))
    stale = drifted.value(current_LE)
    table = Table(title="after drift, 32x64 on 2x4")
    for column in ("most moves", "moves", "found", "gain kept", "CPU s"):
        table.add_column(column, justify="right")
    for most in (0, 64, 128, 205, 410, 2048):
        start = time.process_time()
        home_LE = search(replace(drifted, max_moves=most), time_limit_s=args.time_limit_s)
        value = drifted.value(home_LE)
        table.add_row(
            str(most),
            str(int((home_LE != current_LE).sum())),
            f"{value:.4f}",
            f"{(stale - value) / max(stale - fresh, 1e-12):.0%}",
            f"{time.process_time() - start:.1f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", help="one instance, such as '32x8 on 4'")
    parser.add_argument("--strength", default="medium")
    parser.add_argument("--trace", nargs="*", default=[])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, default=4)
    parser.add_argument("--time-limit-s", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(width=110)
    console.print(f"{platform.machine()}, {platform.processor() or 'CPU'}, one process")
    found = instances(args)
    console.print(table_of(found))
    records: dict[str, object] = {"instances": [asdict(row) for row in found]}
    if not args.only:
        console.print(limits(args), drift(args))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
