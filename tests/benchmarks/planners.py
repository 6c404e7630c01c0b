"""Planners side by side: time on one core, level of the ranks, borrowed experts, rows sent.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.planners [--json FILE]

Calls alternate between planners, from counts to a finished plan; medians, and the fastest call of
Quota for machines that others use too. Least-loaded
runs with alpha 1, min_rows 1 and trigger 1, as published and corrected, so that it levels every
load; Quota with its defaults. "level" is least-loaded corrected at Quota's tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from parallel.plan import DispatchPlan, Planner
from parallel.planners import LeastLoaded, Quota, home_plan
from parallel.planners.inputs import row_limit
from tests.parallel import loads

SIZES = [(64, 8), (128, 8), (256, 64), (384, 64)]  # experts, ranks
PLANNERS: dict[str, Planner] = {
    "home": home_plan,
    "published": LeastLoaded(1.0, 1, 1.0, reference=True),
    "least": LeastLoaded(1.0, 1, 1.0),
    "level": LeastLoaded(1 + Quota().tolerance, 1, 1.0),
    "quota": Quota(),
}
ROWS = 32768  # of every source: 4096 tokens, 8 experts each


@dataclass(frozen=True)
class Result:
    """One load: by planner, microseconds (median and fastest), level, borrowed, rows sent."""

    experts: int
    ranks: int
    load: str
    microseconds: dict[str, float]
    fastest: dict[str, float]
    ratio: dict[str, float]
    borrowed: dict[str, int]
    sent: dict[str, float]
    within_tolerance: bool


def shapes(num_experts: int, num_ranks: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Name and counts of the loads of the table."""
    size = num_experts, num_ranks
    yield "even", loads.hot(*size, 1, 0, seed, ROWS)
    for concentration in (10.0, 1.0, 0.1):
        yield f"dirichlet {concentration:g}", loads.dirichlet(*size, concentration, seed, ROWS)
    for exponent in (0.5, 1.2):
        yield f"zipf {exponent:g}", loads.zipf(*size, exponent, seed, ROWS)
    for num_hot, percent in ((16, 50), (4, 80), (1, 95)):
        yield f"{num_hot} hot {percent} %", loads.hot(*size, num_hot, percent, seed, ROWS)
    yield "uneven sources", loads.uneven_sources(*size, seed, ROWS)


def many_loads(num_seeds: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, counts and homes of the loads of the summary."""
    sizes = [(e, r) for e, r in itertools.product((32, 64, 128, 256, 384), (4, 8, 16, 32, 64))]
    for (num_experts, num_ranks), seed in itertools.product(sizes, range(num_seeds)):
        if num_experts < num_ranks:
            continue
        size = num_experts, num_ranks
        home_E = torch.arange(num_experts) * num_ranks // num_experts
        if seed % 2:
            home_E = loads.random_home(*size, seed)
        for concentration in (0.1, 0.3, 1.0, 3.0, 10.0):
            yield "dirichlet", loads.dirichlet(*size, concentration, seed), home_E
        for exponent in (0.5, 0.8, 1.0, 1.2):
            yield "zipf", loads.zipf(*size, exponent, seed), home_E
        for num_hot, percent in itertools.product((1, 4, 16), (30, 50, 80, 95)):
            for spread in (False, True):
                counts_RE = loads.hot(*size, num_hot, percent, seed, spread=spread)
                yield f"{num_hot} hot {percent} %", counts_RE, home_E
        yield "uneven sources", loads.uneven_sources(*size, seed), home_E


def measure(name: str, counts_RE: Tensor, home_E: Tensor, repeats: int) -> Result:
    """All planners on one load; no times without repeats."""
    num_ranks, num_experts = counts_RE.shape
    total = int(counts_RE.sum())
    plans: dict[str, DispatchPlan] = {}
    times: dict[str, list[float]] = {planner: [] for planner in PLANNERS}
    for key, planner in PLANNERS.items():
        plans[key] = planner(counts_RE, home_E)
        plans[key].check(counts_RE, home_E)
    for _ in range(repeats):
        for key, planner in PLANNERS.items():
            start = time.perf_counter()
            planner(counts_RE, home_E)
            times[key].append(time.perf_counter() - start)
    sent = {
        key: int(plan.rows[plan.rows[:, 1] != plan.rows[:, 2], 3].sum()) / max(1, total)
        for key, plan in plans.items()
    }
    limit = row_limit(1 + Quota().tolerance, total, num_ranks)
    return Result(
        num_experts,
        num_ranks,
        name,
        {key: statistics.median(values) * 1e6 for key, values in times.items() if values},
        {key: min(values) * 1e6 for key, values in times.items() if values},
        {key: int(plan.load_R().max()) * num_ranks / total for key, plan in plans.items()},
        {key: len(plan.borrowed) for key, plan in plans.items()},
        sent,
        int(plans["quota"].load_R().max()) <= limit,
    )


def print_table(results: list[Result]) -> None:
    print(
        "                            microseconds                            load ratio     "
        "borrowed experts            rows sent\n"
        "experts ranks load            home publ. least level quota (min)    home   quota   "
        "publ. least level quota   home publ. least quota"
    )
    for one in results:
        us, ratio, borrowed, sent = one.microseconds, one.ratio, one.borrowed, one.sent
        print(
            f"{one.experts:7d} {one.ranks:5d} {one.load:15s}"
            + "".join(f"{us[key]:6.0f}" for key in PLANNERS)
            + f"{one.fastest['quota']:6.0f}"
            + f"  {ratio['home']:6.2f}  {ratio['quota']:6.3f}  "
            + "".join(f"{borrowed[key]:6d}" for key in ("published", "least", "level", "quota"))
            + " "
            + "".join(f"{sent[key]:6.3f}" for key in ("home", "published", "least", "quota"))
        )


def summary(results: list[Result]) -> dict[str, float]:
    """What the planner is held to, over many loads."""

    def fraction(one: Result, other: str) -> float:
        return one.borrowed["quota"] / max(1, one.borrowed[other])

    hot = [one for one in results if one.load.startswith("1 hot")]
    rest = [one for one in results if not one.load.startswith("1 hot")]
    return {
        "loads": len(results),
        "within the tolerance": sum(one.within_tolerance for one in results),
        "worst load ratio": max(one.ratio["quota"] for one in results),
        "borrowed / least, mean": statistics.mean(fraction(one, "least") for one in results),
        "borrowed / least, mean without 1 hot": statistics.mean(
            fraction(one, "least") for one in rest
        ),
        "borrowed / least, mean of 1 hot": statistics.mean(fraction(one, "least") for one in hot),
        "borrowed / least, max": max(fraction(one, "least") for one in results),
        "borrowed / level, mean": statistics.mean(fraction(one, "level") for one in results),
        "borrowed / level, max": max(fraction(one, "level") for one in results),
        "rows sent / published, mean": statistics.mean(
            one.sent["quota"] / one.sent["published"] for one in results
        ),
        "rows sent / least, mean": statistics.mean(
            one.sent["quota"] / one.sent["least"] for one in results
        ),
        "loads with more rows sent than published": sum(
            one.sent["quota"] > one.sent["published"] for one in results
        ),
        "loads with more rows sent than least": sum(
            one.sent["quota"] > one.sent["least"] for one in results
        ),
        "rows sent of 1 hot 95 %, max": max(
            one.sent["quota"] for one in hot if one.load.endswith("95 %")
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=100, help="calls per planner and load")
    parser.add_argument("--seeds", type=int, default=2, help="seeds per load of the summary")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = (
        f"{platform.platform()}, {platform.processor()}, torch {torch.__version__}, one thread"
    )
    print(machine)
    table = [
        measure(name, counts_RE, torch.arange(experts) * ranks // experts, arguments.repeats)
        for experts, ranks in SIZES
        for name, counts_RE in shapes(experts, ranks, seed=1)
    ]
    print_table(table)
    quality = summary([measure(*load, repeats=0) for load in many_loads(arguments.seeds)])
    print()
    for key, value in quality.items():
        print(f"{key:42s} {value:.3f}" if isinstance(value, float) else f"{key:42s} {value}")
    if arguments.json:
        content = {"machine": machine, "table": [asdict(one) for one in table], "quality": quality}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
