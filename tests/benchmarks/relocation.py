"""Bytes and seconds of relocations: 8 layers of 64 experts on 4 ranks, parameters and moments.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.relocation

Beside them the time that the same bytes take between the same ranks without anything around them:
every rank sends to the next one, in messages as large as a parameter of one expert.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from parallel.comm import Tag, post
from parallel.mesh import ParallelMesh
from parallel.planners import home_plan
from parallel.relocate import Relocation, relocate
from placement.table import ExpertPlacement
from tests.families import tiny_config
from tests.ranks import run_ranks
from trainer.engine import shard
from trainer.modeling import build_model
from trainer.training_state import create_optimizer_state

RANKS, HIDDEN, WIDTH = 4, 256, 512


@dataclass(frozen=True)
class Result:
    """One relocation and, in seconds, as many bytes sent plainly."""

    moved: Relocation
    plain_s: float


def random_swaps(table: ExpertPlacement, share: float, seed: int) -> ExpertPlacement:
    """A table in which about this share of the experts have another home."""
    generator = torch.Generator().manual_seed(seed)
    home_LE = table.home_LE.clone()
    for home_E in home_LE:
        some = torch.randperm(len(home_E), generator=generator)[: round(share * len(home_E))]
        home_E[some] = home_E[some.roll(1)]
    return ExpertPlacement(home_LE, table.num_ranks)


def measure(num_layers: int, num_experts: int, ep: int, shares: list[float]) -> list[Result]:
    """On one rank: relocations by which about these shares of the experts move."""
    mesh = ParallelMesh.build(ep=ep, device_type="cpu")
    config = tiny_config(
        "qwen3_moe",
        num_hidden_layers=num_layers,
        num_experts=num_experts,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
    )
    table = ExpertPlacement.contiguous(num_layers, num_experts, ep)
    model: Any = build_model(config, mesh, seed=0, placement=table, planner=home_plan)
    shard(model, mesh, bf16=False, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    create_optimizer_state(optimizer)
    results = []
    for number, share in enumerate(shares):
        new = random_swaps(table, share, number)
        moved = relocate(model, optimizer, mesh, new)
        results.append(Result(moved, plain_seconds(moved.bytes // mesh.world_size, mesh)))
        table = new
    return results


def plain_seconds(num_bytes: int, mesh: ParallelMesh) -> float:
    """Time in which every rank sends so many bytes to the next one."""
    message, inbox = torch.ones(2, 2 * HIDDEN * WIDTH)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(num_bytes // message.nbytes):
        sends = [((mesh.rank + 1) % mesh.world_size, message)]
        receives = [((mesh.rank - 1) % mesh.world_size, inbox)]
        for work in post(sends, receives, mesh.dp_group, Tag.WEIGHTS):
            work.wait()
    dist.barrier()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    options = parser.parse_args()
    shares = [0.05, 0.25, 1.0]
    expert_bytes = 3 * HIDDEN * WIDTH * 4 * 3  # three matrices, each with two moments, fp32
    table = Table(
        "EP x EDP", "moved experts", "MB", "MB of these experts", "s", "MB/s", "plain sends s"
    )
    for ep in (RANKS, RANKS // 2):
        results = run_ranks(
            measure, RANKS, options.layers, options.experts, ep, shares, timeout_s=300
        )[0]
        for result in results:
            moved = result.moved
            table.add_row(
                f"{ep} x {RANKS // ep}",
                str(moved.experts),
                f"{moved.bytes / 1e6:.1f}",
                f"{moved.experts * expert_bytes / 1e6:.1f}",
                f"{moved.seconds:.2f}",
                f"{moved.bytes / 1e6 / moved.seconds:.0f}",
                f"{result.plain_s:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
