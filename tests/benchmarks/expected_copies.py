"""How near expected copies (`traffic.sends_of_stats`) come to the trace that they were counted of.

    python -m tests.benchmarks.expected_copies

Copies that leave their rank, expected / counted, over synthetic routing of 8,192 tokens and 4
layers: under a contiguous and a solved placement, with sequences dealt out evenly and assigned.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from placement.batches import assign
from placement.objective import Objective, cost, trace_cost
from placement.solve import solve
from placement.stats import RoutingStats
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace
from placement.traffic import sources_of

LAYERS, SEQUENCES, SEQ_LEN = 4, 128, 64
TRAFFIC = Objective(mode="batched", load_weight=0)


def assigned(trace: Trace, placement: ExpertPlacement, topology: Topology) -> Trace:
    """Every sequence on the rank where most of its rows are, equally many on each."""
    home_LE, ranks = placement.home_LE.numpy(), topology.num_ranks
    at_home_TLK = home_LE[np.arange(LAYERS)[:, None], trace.ids_TLK]
    rows_SR = np.stack([(at_home_TLK == rank).sum((1, 2)) for rank in range(ranks)], 1)
    rank_S = assign(rows_SR.reshape(SEQUENCES, SEQ_LEN, ranks).sum(1), topology.node_of_R)
    return replace(trace, source_T=np.repeat(rank_S, SEQ_LEN))


def ratio(placement: ExpertPlacement, trace: Trace, topology: Topology, mode: str) -> float:
    """Expected over counted."""
    stats = RoutingStats.of_trace(trace, topology.num_ranks)
    expected = cost(placement, stats, topology, mode=mode)
    counted = trace_cost(placement, trace, topology, mode=mode)
    leaving, counted_leaving = (c.rows_intra + c.rows_inter for c in (expected, counted))
    return leaving / counted_leaving


def main() -> None:
    table = Table("experts x ranks", "strength", "K", title="expected / counted copies")
    for column in ("contiguous", "contiguous, assigned", "solved", "solved, assigned"):
        table.add_column(column, justify="right")
    sizes = product(((16, 4), (64, 8)), ("medium", "high", "domain"), (2, 4, 8))
    for (experts, ranks), strength, top_k in track(list(sizes)):
        topology = Topology.even(2, ranks // 2, intra_gbps=400.0, inter_gbps=100.0, flops=1e12)
        router = SyntheticRouter(LAYERS, experts, strength)
        trace = router.sample(SEQUENCES, SEQ_LEN, top_k)
        start = ExpertPlacement.contiguous(LAYERS, experts, ranks)
        stats = RoutingStats.of_trace(replace(trace, source_T=sources_of(trace, ranks)), ranks)
        found = solve(stats, topology, start, objective=TRAFFIC, method="search").placement
        row = [f"{experts} x {ranks}", strength, str(top_k)]
        for placement in (start, found):
            even = replace(trace, source_T=sources_of(trace, ranks))
            row.append(f"{ratio(placement, even, topology, 'home'):.3f}")
            moved = assigned(trace, placement, topology)
            row.append(f"{ratio(placement, moved, topology, 'batched'):.3f}")
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
