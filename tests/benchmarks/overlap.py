"""The order of events in one MoE layer: what is in flight while what is computed.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.overlap --chunks 1 --ranks-per-node 2

On CPUs, whose cores the ranks share, overlap shows in the order of events, not in time. The layer
is a GLM-4 MoE block (with a shared expert) on 4 ranks; the plan spreads one expert over all of
them. `--trace FILE` writes rank 1's trace for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, parallelize
from parallel.plan import DispatchPlan
from parallel.planners import home_plan
from parallel.step import optimizer_step
from parallel.two_level import TwoLevelDispatcher
from tests.families import tiny_config
from tests.ranks import run_ranks

RANKS, SEEN_FROM = 4, 1


def one_expert_everywhere(counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
    """Rows of expert 0 are computed where their tokens are, all others at home."""
    plan = home_plan(counts_RE, home_E)
    rows = plan.rows.clone()
    rows[rows[:, 0] == 0, 2] = rows[rows[:, 0] == 0, 1]
    home = int(home_E[0])
    borrowed = [[0, home, rank] for rank in range(len(counts_RE)) if rank != home]
    return DispatchPlan(rows, torch.tensor(borrowed), plan.num_ranks, plan.num_experts)


def events_of_a_layer(
    num_chunks: int,
    ranks_per_node: int,
    two_level: bool,
    trace: str | None = None,
    keep: bool = False,
) -> tuple[list[str], list[str]]:
    """Names of the events of the forward and of the backward pass, in order, on this rank.

    Args:
        trace: where to write a trace. keep: whether borrowed experts stay for the optimizer step.
    """
    mesh = ParallelMesh.build(ep=RANKS, ranks_per_node=ranks_per_node, device_type="cpu")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny_config("glm4_moe"))
    dispatcher = TwoLevelDispatcher if two_level else None
    parallelize(
        model,
        mesh,
        planner=lambda counts, home: replace(one_expert_everywhere(counts, home), keep=keep),
        dispatcher=dispatcher,
        num_chunks=num_chunks,
    )
    _, block = moe_blocks(model)[0]
    x = torch.randn(1, 16, model.config.hidden_size, requires_grad=True)
    with optimizer_step() as step:
        with profile(activities=[ProfilerActivity.CPU]) as forward:
            out = block(x)
        step.start_last_micro_batch()
        with profile(activities=[ProfilerActivity.CPU]) as backward:
            out.sum().backward()
        step.finish([block.experts.experts], mesh.edp_group)
    if trace is not None and mesh.rank == SEEN_FROM:
        forward.export_chrome_trace(trace)
    return _names(forward), _names(backward)


def _names(taken: profile) -> list[str]:
    events = [event for event in taken.events() or [] if event.name.startswith("evenkeel.")]
    events.sort(key=lambda event: event.time_range.start)
    return [event.name.removeprefix("evenkeel.") for event in events]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, default=RANKS)
    parser.add_argument("--two-level", action="store_true")
    parser.add_argument("--trace")
    options = parser.parse_args()
    arguments = options.chunks, options.ranks_per_node, options.two_level, options.trace
    forward, backward = run_ranks(events_of_a_layer, RANKS, *arguments)[SEEN_FROM]
    for title, events in (("forward", forward), ("backward", backward)):
        print(f"{title} on rank {SEEN_FROM}:")
        for event in events:
            print(f"  {event}")


if __name__ == "__main__":
    main()
