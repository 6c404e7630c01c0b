"""Sequences to ranks: the copies of tokens that placement and assignment save in training.

    export OMP_NUM_THREADS=1
    python -m tests.benchmarks.batches                       # all models, about an hour
    python -m tests.benchmarks.batches --models "16x64, k 1" --strengths medium
    python -m tests.benchmarks.batches --trace FILE ... --nodes 2 --ranks-per-node 4

Copies per token and MoE layer on their way to the experts (as many come back), counted exactly:
first one for every rank other than the source that has some of the token's experts, then copies
that cross nodes with two-level dispatch, one per node. Columns: contiguous homes with sequences
dealt out in order; experts placed for assigned sequences (`solve` in mode `batched`), the sequences
dealt out in order; those assigned by token id and, as a check of the prediction, by their true
routing; and by token id under a placement that also evens out load, with the max/mean rows of a
rank, mean over layers (the column before it: without). A saving below 2 % of the time on the links
is said to be none.

Links between nodes are four times slower than within. `--batch-size` assigns batch by batch instead
of all sequences at once; `--held-out` takes statistics of the first half of the sequences and
counts copies of the second. Traces are .npz files with `sequence` and `token` (`Trace.save`);
placing by domain needs `domain` too. Seconds are CPU seconds of one process.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from placement.batches import assign, assigned, expected_saving
from placement.objective import Objective, trace_cost
from placement.solve import solve
from placement.stats import RoutingStats
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace, load_trace

SEQ_LEN = 128
INTRA_GBPS, INTER_GBPS, FLOPS = 1600.0, 400.0, 4e14
SIZES = ((256, 8), (1024, 16), (4096, 64))  # sequences and ranks of timed assignments


@dataclass(frozen=True)
class Model:
    """L layers x E experts with so many choices, on so many nodes of so many ranks."""

    layers: int
    experts: int
    top_k: int
    nodes: int
    ranks_per_node: int
    sequences: int
    strengths: tuple[str, ...] = ("medium", "high", "domain")

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.experts}, k {self.top_k}"


MODELS = (
    Model(16, 64, 1, 2, 4, 400),
    Model(32, 8, 2, 2, 4, 400),
    Model(16, 64, 8, 2, 4, 400),
    Model(12, 256, 8, 8, 8, 1600, ("low", "medium", "high", "domain")),
)


@dataclass(frozen=True)
class Copies:
    """Per token and layer: `ranks` with one copy per rank, `nodes` with one per node."""

    ranks: float
    nodes: float
    load_ratio: float

    def __str__(self) -> str:
        return f"{self.ranks:.3f} / {self.nodes:.3f}"


@dataclass(frozen=True)
class Row:
    """What the copies of one trace come to."""

    contiguous: Copies
    placed: Copies
    by_token: Copies
    by_routing: Copies
    balanced: Copies
    verdict: str
    seconds: float

    @property
    def misprediction(self) -> float:
        """Copies too many by predicting, as a share."""
        return self.by_token.ranks / self.by_routing.ranks - 1


def copies(placement: ExpertPlacement, trace: Trace, topology: Topology) -> Copies:
    """Count the copies of a trace whose sources are set."""
    flat, two = (
        trace_cost(placement, trace, topology, mode="batched", two_level=level)
        for level in (False, True)
    )
    times = trace.num_tokens * trace.num_layers
    return Copies(
        (flat.rows_intra + flat.rows_inter) / times,
        two.rows_inter / times,
        float(flat.load_ratio_L.mean()),
    )


def placed(
    stats: RoutingStats, topology: Topology, load_weight: float, time_limit_s: float
) -> ExpertPlacement:
    """Experts placed for assigned sequences."""
    objective = Objective(mode="batched", two_level=True, load_weight=load_weight)
    start = ExpertPlacement.contiguous(stats.num_layers, stats.num_experts, topology.num_ranks)
    found = solve(
        stats,
        topology,
        start,
        method="search",
        objective=objective,
        time_limit_s=time_limit_s,
    )
    return found.placement


def measure(seen: Trace, trace: Trace, topology: Topology, args: argparse.Namespace) -> Row:
    """Place by the statistics of one trace, count the copies of another."""
    begun = time.process_time()
    stats = RoutingStats.of_trace(seen)
    size = args.batch_size or None
    dealt = dealt_out(trace, topology.num_ranks, size)
    start = ExpertPlacement.contiguous(trace.num_layers, trace.num_experts, topology.num_ranks)
    found = placed(stats, topology, 0.0, args.time_limit)
    even = placed(stats, topology, 1.0, args.time_limit)
    known = stats.by_token

    def together(placement: ExpertPlacement, predicted: bool) -> Copies:
        table = known if predicted else None
        by_rank = assigned(trace, placement, topology, preferences=table, batch_size=size)
        return copies(placement, by_rank, topology)

    return Row(
        contiguous=copies(start, dealt, topology),
        placed=copies(found, dealt, topology),
        by_token=together(found, True),
        by_routing=together(found, False),
        balanced=together(even, True),
        verdict=expected_saving(
            dealt, found, topology, preferences=known, batch_size=size
        ).verdict(),
        seconds=time.process_time() - begun,
    )


def dealt_out(trace: Trace, num_ranks: int, batch_size: int | None) -> Trace:
    """The trace with whole sequences dealt out in order, batch by batch."""
    assert trace.sequence_T is not None
    names, order_T = np.unique(trace.sequence_T, return_inverse=True)
    size = batch_size or len(names)
    return replace(trace, source_T=order_T % size * num_ranks // size)


def halves(trace: Trace, num_ranks: int) -> tuple[Trace, Trace]:
    """The first and the second half of the sequences, each a multiple of the ranks."""
    assert trace.sequence_T is not None
    names, order_T = np.unique(trace.sequence_T, return_inverse=True)
    half = len(names) // 2 // num_ranks * num_ranks
    return trace.take(order_T < half), trace.take((order_T >= half) & (order_T < 2 * half))


def cases(args: argparse.Namespace) -> list[tuple[str, Trace, Topology]]:
    """Name, trace and ranks of every row."""
    if args.trace:
        topology = links(args.nodes, args.ranks_per_node)
        return [(Path(path).stem, load_trace(path), topology) for path in args.trace]
    found = []
    for model in MODELS:
        if args.models and model.name not in args.models:
            continue
        for strength in model.strengths:
            if args.strengths and strength not in args.strengths:
                continue
            router = SyntheticRouter(model.layers, model.experts, strength)
            trace = router.sample(model.sequences, SEQ_LEN, model.top_k)
            where = f"{model.name}, {model.nodes}x{model.ranks_per_node}"
            found.append((f"{where} {strength}", trace, links(model.nodes, model.ranks_per_node)))
    return found


def links(nodes: int, ranks_per_node: int) -> Topology:
    return Topology.even(
        nodes, ranks_per_node, intra_gbps=INTRA_GBPS, inter_gbps=INTER_GBPS, flops=FLOPS
    )


def timed_assignments() -> Table:
    """CPU seconds of an assignment where sequences are all different, and where they are of few
    kinds that want the same ranks."""
    table = Table("sequences", "ranks", "all different, s", "eight kinds, s", title="assign")
    rng = np.random.default_rng(0)
    for sequences, ranks in SIZES:
        kinds_SR = rng.random((8, ranks))[rng.integers(0, 8, sequences)]
        seconds = []
        for share in (1.0, 0.05):
            rows_SR = kinds_SR * (1 - share) + rng.random((sequences, ranks)) * share
            begun = time.process_time()
            assign(rows_SR, [rank // min(8, ranks) for rank in range(ranks)])
            seconds.append(f"{time.process_time() - begun:.3f}")
        table.add_row(f"{sequences:,}", str(ranks), *seconds)
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(model.name for model in MODELS)
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"of {names}")
    parser.add_argument("--strengths", nargs="+", metavar="NAME")
    parser.add_argument("--trace", nargs="+", metavar="FILE", help="recorded routing instead")
    parser.add_argument("--nodes", type=int, default=2, help="for --trace")
    parser.add_argument("--ranks-per-node", type=int, default=4, help="for --trace")
    parser.add_argument("--batch-size", type=int, default=0, help="sequences; 0: all at once")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--time-limit", type=float, default=60.0, help="of a solution, seconds")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """The command; returns what it found."""
    args, console = parse(arguments), Console(width=150)
    console.print(f"{platform.processor() or platform.machine()}, one process", highlight=False)
    console.print(timed_assignments())
    table = Table(
        *("model, ranks, strength", "contiguous", "placed", "+ by token id", "+ by routing"),
        *("ratio", "+ even load", "ratio", "s"),
        title="copies per token and layer: ranks / nodes",
    )
    rows = []
    for name, trace, topology in cases(args):
        both = halves(trace, topology.num_ranks) if args.held_out else (trace, trace)
        row = measure(*both, topology, args)
        rows.append(row)
        console.print(f"{name}: {row.verdict}; predicted {row.misprediction:+.2%}", highlight=False)
        table.add_row(
            *(name, str(row.contiguous), str(row.placed), str(row.by_token), str(row.by_routing)),
            *(f"{row.placed.load_ratio:.2f}", str(row.balanced)),
            *(f"{row.balanced.load_ratio:.2f}", f"{row.seconds:.0f}"),
        )
    console.print(table)
    return rows


if __name__ == "__main__":
    main()
