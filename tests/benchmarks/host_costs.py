"""What the host does in every MoE layer: plans, statistics, and collectives of counts.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.host_costs [--json FILE] [--ranks 2,4,8,16,64]

Planners run on every rank alike, so one process tells: on counts of made-up routing for 64 and 256
ranks. Collectives run on so many real processes over gloo, which share the cores of this machine:
processor time of a rank is what counts there, wall time is not that of a network. Simulated ranks
exchange nothing: what remains is what a rank does before and after.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.compose import load_sizing
from configs.sizing_schema import check_sizing
from launch.sizing.command import sizing_of
from launch.sizing.memory import Engine
from launch.sizing.meshes import Sizing
from launch.sizing.shapes import Mesh
from launch.sizing.step import LAYERS, step
from parallel.dispatch import Dispatcher
from parallel.planners import LeastLoaded, Materialize, Quota, Replicated, Sticky, home_plan
from placement.stats import RoutingStats
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from tests.ranks import run_ranks

SEQ_LEN, TOP_K, REPEATS = 4096, 8, 30
SIZES = [(64, 128), (64, 256), (256, 256), (256, 512)]  # ranks, experts
SEQUENCES = (1, 4)  # of a rank and micro-batch
MODELS = ["qwen3_30b_a3b", "gpt_oss_120b", "deepseek_v3"]  # whose experts divide by 64
PLANNERS: dict[str, Callable[[], Any]] = {
    "home": lambda: home_plan,
    "LeastLoaded": lambda: LeastLoaded(1.0, 1024, 1.3),
    "Quota": Quota,
    "Materialize": lambda: Materialize(rows_intra=64, rows_inter=512),
    "Sticky": lambda: Sticky(Quota()),
    "Replicated": lambda: Replicated(slots=1),
}


@cache
def routing(num_experts: int, skew: float) -> RoutingStats:
    router = SyntheticRouter(LAYERS, num_experts, skew=skew)
    return RoutingStats.of_trace(router.sample(16, 2048, TOP_K))


def counts_of(num_ranks: int, num_experts: int, skew: float) -> torch.Tensor:
    """Rows per source and expert, int64 [R, E], of SEQ_LEN tokens on every rank."""
    stats = routing(num_experts, skew)
    rows_LRE = stats.with_sources(num_ranks).source_LRE * (SEQ_LEN * num_ranks / stats.tokens)
    return torch.poisson(rows_LRE[0], torch.Generator().manual_seed(0)).long()


def planner_costs() -> list[dict[str, Any]]:
    """Median milliseconds of a plan, planners alternating."""
    found = []
    for (num_ranks, num_experts), skew in ((s, k) for s in SIZES for k in (0.3, 1.0)):
        counts_RE = counts_of(num_ranks, num_experts, skew)
        home_E = ExpertPlacement.contiguous(1, num_experts, num_ranks).home_LE[0]
        planners = {name: _of_a_layer(make(), counts_RE) for name, make in PLANNERS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in planners}
        for planner in planners.values():
            planner(counts_RE, home_E)
        for _ in range(REPEATS):
            for name, planner in planners.items():
                start = time.thread_time()
                planner(counts_RE, home_E)
                seconds[name].append(time.thread_time() - start)
        ms = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        found.append({"ranks": num_ranks, "experts": num_experts, "skew": skew, "ms": ms})
    return found


def _of_a_layer(planner: Any, counts_RE: torch.Tensor) -> Any:
    """One that remembers has seen a step."""
    if not hasattr(planner, "next_step"):
        return planner
    planner = planner.for_layer(0)
    planner.next_step([counts_RE])
    return planner


def layer_costs() -> list[dict[str, Any]]:
    """Seconds of a layer at EP 64 on 64 GPUs, and the planner's share of it."""
    found = []
    for name, sequences in ((name, number) for name in MODELS for number in SEQUENCES):
        batch = f"train.batch_size={64 * sequences}"
        config = load_sizing(f"model={name}", batch, "cluster=h100_8x8")
        check_sizing(config)
        sizing: Sizing = sizing_of(config)
        layer = sizing.layer(Mesh(64, 64, 8), sequences)
        seconds = step(
            sizing.model,
            Mesh(64, 64, 8),
            Engine.torch,
            layer,
            config.cluster,
            tokens=SEQ_LEN * sequences,
            micro_batches=1,
            value=2,
            recompute=False,
            refetch=False,
            compute_share=config.compute_share,
        )
        number = sizing.model.num_moe
        slowest, fastest = (
            (whole - seconds.plan) / number for whole in (seconds.slowest, seconds.fastest)
        )
        found.append(
            {
                "model": name,
                "experts": sizing.model.num_experts,
                "sequences": sequences,
                "plan_ms": layer.plan_s * 1e3,
                "layer_ms": [fastest * 1e3, slowest * 1e3],
                "share": [layer.plan_s / slowest, layer.plan_s / fastest],
            }
        )
    return found


def statistics_costs() -> list[dict[str, Any]]:
    """Milliseconds to record the choices of SEQ_LEN tokens in a layer."""
    found = []
    for num_experts in (128, 256):
        trace = SyntheticRouter(2, num_experts).sample(1, SEQ_LEN, TOP_K)
        stats = RoutingStats(2, num_experts)
        seconds = []
        for _ in range(REPEATS):
            start = time.thread_time()
            stats.observe_trace(trace.ids_TLK)
            seconds.append(time.thread_time() - start)
        found.append({"experts": num_experts, "ms": statistics.median(seconds) / 2 * 1e3})
    return found


def on_a_rank(num_experts: int) -> dict[str, float]:
    """Milliseconds of a layer's exchange of counts: of this rank's processor, and of the wall."""
    group = dist.group.WORLD
    assert group is not None
    dispatcher = Dispatcher(group, num_experts)
    ids_TK = torch.randint(0, num_experts, (SEQ_LEN, TOP_K))
    dispatcher.count(ids_TK)
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(REPEATS):
        dispatcher.count(ids_TK)
    found = {
        "cpu_ms": (time.process_time() - processor) / REPEATS * 1e3,
        "wall_ms": (time.perf_counter() - wall) / REPEATS * 1e3,
    }
    dist.barrier()
    return found


def collective_costs(ranks: list[int]) -> list[dict[str, Any]]:
    found = []
    for num_ranks in ranks:
        of_ranks = run_ranks(on_a_rank, num_ranks, 256, timeout_s=300)
        mean = {key: statistics.mean(one[key] for one in of_ranks) for key in of_ranks[0]}
        found.append({"ranks": num_ranks, "experts": 256, **mean, "bytes": received(num_ranks)})
    return found


def on_a_simulated_rank(num_ranks: int, num_experts: int) -> float:
    """Processor milliseconds of a layer's exchange of counts without the exchange itself."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    return on_a_rank(num_experts)["cpu_ms"]


def simulated_costs() -> list[dict[str, Any]]:
    return [
        {
            "ranks": num_ranks,
            "experts": 256,
            "cpu_ms": run_ranks(on_a_simulated_rank, 1, num_ranks, 256)[0],
        }
        for num_ranks in (64, 256)
    ]


def received(num_ranks: int, num_experts: int = 256) -> int:
    """Bytes that a rank receives in a layer's exchange of counts: int64 by expert, and a digest."""
    return (num_ranks - 1) * (num_experts + 1) * 8


def show(found: dict[str, Any]) -> None:
    print("\n| ranks, experts, skew | " + " | ".join(PLANNERS) + " |")
    print("|---" * (len(PLANNERS) + 1) + "|")
    for one in found["planners"]:
        cells = [f"{one['ms'][name]:.2f}" for name in PLANNERS]
        print(f"| {one['ranks']}, {one['experts']}, {one['skew']} | " + " | ".join(cells) + " |")
    print("\n| EP 64 | sequences | plan, ms | layer, ms: all overlaps / nothing | share of it |")
    print("|---|---|---|---|---|")
    for one in found["layers"]:
        fastest, slowest = one["layer_ms"]
        least, most = one["share"]
        print(
            f"| {one['model']}, {one['experts']} experts | {one['sequences']} | "
            f"{one['plan_ms']:.2f} | "
            f"{fastest:.1f} / {slowest:.1f} | {most:.2%} / {least:.2%} |"
        )
    print("\n| statistics: experts | ms per layer |")
    print("|---|---|")
    for one in found["statistics"]:
        print(f"| {one['experts']} | {one['ms']:.1f} |")
    print("\n| counts: ranks | processor of a rank, ms | wall, ms | KB received |")
    print("|---|---|---|---|")
    for one in found["collectives"]:
        print(
            f"| {one['ranks']} | {one['cpu_ms']:.2f} | {one['wall_ms']:.1f} | "
            f"{one['bytes'] / 1e3:.1f} |"
        )
    for one in found["simulated"]:
        print(
            f"| {one['ranks']}, simulated | {one['cpu_ms']:.2f} | | "
            f"{received(one['ranks']) / 1e3:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", default="2,4,8,16,64", help="processes of the collectives")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "machine": f"{platform.platform()}, torch {torch.__version__}, one thread",
        "collectives": collective_costs([int(n) for n in arguments.ranks.split(",")]),
        "simulated": simulated_costs(),
        "planners": planner_costs(),
        "layers": layer_costs(),
        "statistics": statistics_costs(),
    }
    print(found["machine"])
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
