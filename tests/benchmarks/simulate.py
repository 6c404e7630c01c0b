"""The simulator against real ranks on two emulated nodes: predicted and measured times.

    python -m tests.benchmarks.simulate                        # as root; a few minutes
    python -m tests.benchmarks.simulate --inter 50mbit --tokens 256

Four gloo ranks, two to a node, dispatch their tokens with the project's own dispatchers and combine
what comes back, forward and backward, with nothing computed between; and they lend each other the
experts that Quota wants lent. The links are measured first; the simulator is then told their speeds
and the routing, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from placement.objective import ExpertShape
from placement.simulate import simulate_trace
from tests.benchmarks.emulated_nodes import emulated_nodes
from tests.benchmarks.simulate_ranks import (
    CASES,
    LENDING,
    NUM_NODES,
    PARAMETERS,
    RANKS_PER_NODE,
    VALUE_BYTES,
    topology_of,
)

TARGET = 0.15  # of the measured time


def measured(options: argparse.Namespace) -> tuple[dict, list[list[float]]]:
    """Links and seconds of all cases, from real ranks."""
    with (
        tempfile.TemporaryDirectory() as folder,
        emulated_nodes(
            NUM_NODES,
            RANKS_PER_NODE,
            intra=options.intra,
            inter=options.inter,
            node=options.node,
        ) as prefixes,
    ):
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        sizes = [folder, str(options.tokens), str(options.hidden)]
        ranks = [
            subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.benchmarks.simulate_ranks", str(r), *sizes],
                env=environment,
            )
            for r, prefix in enumerate(prefixes)
        ]
        codes = [rank.wait(timeout=600) for rank in ranks]
        if any(codes):
            raise RuntimeError(f"ranks ended with the exit codes {codes}")
        links, seconds = json.loads((Path(folder) / "rank0.json").read_text())
        return links, seconds


def main(arguments: Sequence[str] | None = None) -> float:
    """The command; returns the largest error of any case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--intra", default="200mbit", help="rate of a rank to its node")
    parser.add_argument("--inter", default="60mbit", help="rate of a rank to other nodes")
    parser.add_argument("--node", default="100mbit", help="rate of a node to others")
    parser.add_argument("--tokens", type=int, default=512, help="per rank")
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args(arguments)
    links, seconds = measured(options)
    topology, console = topology_of(links), Console(width=120)
    console.print(f"{options}\n{topology}", highlight=False)
    shape = ExpertShape(options.hidden, PARAMETERS, VALUE_BYTES)
    table = Table(title="Dispatch and combine, forward and backward; lending", box=SIMPLE_HEAD)
    for header in ("routing", "placement", "planner", "dispatcher"):
        table.add_column(header)
    for header in ("measured ms", "spread ms", "predicted ms", "error"):
        table.add_column(header, justify="right")
    errors = []
    for case, repeats in zip(CASES, seconds, strict=True):
        step = simulate_trace(
            case.home(),
            case.trace(options.tokens),
            topology,
            case.plan_with(),
            micro_batch=options.tokens,
            two_level=case.dispatcher == "two_level",
            shape=shape,
        )
        lending = case.dispatcher == LENDING
        predicted = step.borrow_s if lending else step.exchange_s + step.latency_s
        found = statistics.median(repeats)
        error = predicted / found - 1
        errors.append(abs(error))
        table.add_row(
            case.routing,
            case.placement,
            case.planner,
            case.dispatcher,
            f"{found * 1e3:.0f}",
            f"{min(repeats) * 1e3:.0f}-{max(repeats) * 1e3:.0f}",
            f"{predicted * 1e3:.0f}",
            f"{error:+.1%}",
        )
    console.print(table)
    mean, worst = statistics.mean(errors), max(errors)
    console.print(f"largest error {worst:.1%} (target {TARGET:.0%}), mean {mean:.1%}")
    return worst


if __name__ == "__main__":
    sys.exit(main() > TARGET)
