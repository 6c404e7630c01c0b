"""One MoE layer against the bare matrix products and against transformers' own experts.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.layer                  # one rank
    OMP_NUM_THREADS=1 python -m tests.benchmarks.layer --ranks 2        # expert parallelism

Arms alternate in one process per rank; medians; one thread per rank. One rank: ratios of CPU
seconds to the limit, the same matrix products alone, per expert, on slices. Several ranks: CPU
milliseconds per rank (its busiest rank, gloo's threads included) beside transformers' own expert
parallelism by all-to-all.
Shapes: A is T 4096, D 512, F 1024, E 16, top-2; B is T 4096, D 512, F 256, E 64, top-8.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from parallel.dispatch import Dispatcher
from parallel.layer import ExpertParallel
from parallel.memory import keep_freed_memory
from parallel.mesh import ParallelMesh
from parallel.planners import home_plan
from placement.table import ExpertPlacement
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Shape:
    """One MoE layer: tokens, hidden width, expert width, experts, choices."""

    name: str
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int


SHAPES = [Shape("A", 4096, 512, 1024, 16, 2), Shape("B", 4096, 512, 256, 64, 8)]
Step = Callable[[bool], None]


def inputs(shape: Shape, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, ids, weights and an incoming gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.tokens, shape.hidden, generator=generator).to(dtype)
    logits = torch.randn(shape.tokens, shape.experts, generator=generator)
    weights, ids = torch.softmax(logits, -1).topk(shape.top_k)
    grad = torch.randn(shape.tokens, shape.hidden, generator=generator).to(dtype)
    return x.requires_grad_(), ids, (weights / weights.sum(-1, True)).to(dtype), grad


def stacks(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(shape.experts, 2 * shape.width, shape.hidden, generator=generator) * 0.02
    down = torch.randn(shape.experts, shape.hidden, shape.width, generator=generator) * 0.02
    return up.to(dtype), down.to(dtype)


def bare_products(shape: Shape, dtype: torch.dtype) -> Step:
    """The six products of every expert on contiguous slices, nothing else."""
    _, ids, _, _ = inputs(shape, dtype, 1)
    rows = torch.bincount(ids.flatten(), minlength=shape.experts).tolist()
    up, down = stacks(shape, dtype)
    x = torch.randn(sum(rows), shape.hidden).to(dtype)
    h = torch.randn(sum(rows), shape.width).to(dtype)
    g = torch.randn(sum(rows), 2 * shape.width).to(dtype)
    y = torch.empty_like(x)
    h_up = torch.empty_like(g)
    grad_h, grad_x = torch.empty_like(h), torch.empty_like(x)
    grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)
    ends = torch.tensor(rows).cumsum(0).tolist()
    parts = [slice(end - n, end) for end, n in zip(ends, rows, strict=True)]

    def step(backward: bool) -> None:
        for e, s in enumerate(parts):
            torch.mm(x[s], up[e].T, out=h_up[s])
        for e, s in enumerate(parts):
            torch.mm(h[s], down[e].T, out=y[s])
        if backward:
            for e, s in enumerate(parts):
                torch.mm(x[s], down[e], out=grad_h[s])
                torch.mm(x[s].T, h[s], out=grad_down[e])
            for e, s in enumerate(parts):
                torch.mm(g[s], up[e], out=grad_x[s])
                torch.mm(g[s].T, x[s], out=grad_up[e])

    return step


def family_experts(shape: Shape, dtype: torch.dtype, implementation: str) -> Any:
    config = Qwen3MoeConfig(
        num_experts=shape.experts, hidden_size=shape.hidden, moe_intermediate_size=shape.width
    )
    config._experts_implementation = implementation
    family = Qwen3MoeExperts(config)
    family.gate_up_proj.data, family.down_proj.data = stacks(shape, dtype)
    return family


def evenkeel(shape: Shape, dtype: torch.dtype, mesh: ParallelMesh) -> torch.nn.Module:
    return ExpertParallel(
        family_experts(shape, dtype, "eager"),
        layer_index=0,
        home_E=ExpertPlacement.contiguous(1, shape.experts, mesh.ep_size).home_LE[0],
        planner=home_plan,
        dispatcher=Dispatcher(mesh.ep_group, shape.experts),
    )


def layer_step(layer: torch.nn.Module, shape: Shape, dtype: torch.dtype, seed: int = 1) -> Step:
    x, ids, weights, grad = inputs(shape, dtype, seed)
    weights.requires_grad_()

    def step(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = layer(x, ids, weights)
        if backward:
            out.backward(grad)
            x.grad = weights.grad = None
            for parameter in layer.parameters():
                parameter.grad = None

    return step


def measure(
    arms: dict[str, Step], backward: bool, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of every arm, arms alternating."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, step in arms.items():
            start = clock()
            step(backward)
            if repeat:  # the first round warms up
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def one_rank(repeats: int) -> list[tuple[str, str, dict[str, float], dict[str, float]]]:
    """Forward and forward+backward seconds of every arm, shape and dtype on one rank."""
    keep_freed_memory()  # as the trainer does on CPUs; for all arms alike
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            arms = {
                "limit": bare_products(shape, dtype),
                "evenkeel": layer_step(evenkeel(shape, dtype, mesh), shape, dtype),
            }
            for implementation in ("eager", "grouped_mm"):
                family = family_experts(shape, dtype, implementation)
                arms[f"transformers {implementation}"] = layer_step(family, shape, dtype)
            forward = measure(arms, False, repeats, time.thread_time)
            both = measure(arms, True, repeats, time.thread_time)
            results.append((shape.name, str(dtype).removeprefix("torch."), forward, both))
    return results


def transformers_all_to_all(shape: Shape, dtype: torch.dtype, mesh: ParallelMesh) -> Any:
    """The library's own expert parallelism on this rank's contiguous experts."""
    from transformers.distributed.expert_parallel import AllToAllEP

    family = family_experts(shape, dtype, "grouped_mm")
    local = shape.experts // mesh.ep_size
    mine = slice(mesh.ep_rank * local, (mesh.ep_rank + 1) * local)
    family.gate_up_proj = torch.nn.Parameter(family.gate_up_proj.detach()[mine].clone())
    family.down_proj = torch.nn.Parameter(family.down_proj.detach()[mine].clone())
    family.num_experts, family._is_expert_parallel = local, True
    parallel = AllToAllEP(family, mesh.expert["ep"], mesh.expert["edp"])
    layer = torch.nn.Module()
    layer.experts = family
    layer.forward = parallel
    return layer


def several_ranks(num_ranks: int, repeats: int) -> list[tuple[str, str, dict[str, float]]]:
    """Forward+backward CPU seconds of this rank, both arms, after comparing their outputs."""
    keep_freed_memory()
    mesh = ParallelMesh.build(ep=num_ranks, device_type="cpu")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            shape = replace(shape, tokens=shape.tokens // num_ranks)
            layers = {
                "evenkeel": evenkeel(shape, dtype, mesh),
                "transformers all_to_all": transformers_all_to_all(shape, dtype, mesh),
            }
            x, ids, weights, _ = inputs(shape, dtype, 1 + mesh.rank)
            first, second = (layer(x, ids, weights) for layer in layers.values())
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
            arms = {
                name: layer_step(layer, shape, dtype, 1 + mesh.rank)
                for name, layer in layers.items()
            }
            both = measure(arms, True, repeats, time.process_time)
            results.append((shape.name, str(dtype).removeprefix("torch."), both))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    if options.ranks > 1:
        ranks = run_ranks(
            several_ranks, options.ranks, options.ranks, options.repeats, timeout_s=3600
        )
        for cells in zip(*ranks, strict=True):
            shape_name, dtype, _ = cells[0]
            for arm in cells[0][2]:
                busiest = max(cell[2][arm] for cell in cells)
                print(f"{shape_name} {dtype:9} EP {options.ranks} {arm:24} {busiest * 1e3:8.1f} ms")
        return
    (results,) = run_ranks(one_rank, 1, options.repeats, timeout_s=3600)
    for shape_name, dtype, forward, both in results:
        for arm in forward:
            print(
                f"{shape_name} {dtype:9} {arm:24} forward {forward[arm] / forward['limit']:.2f} "
                f"forward+backward {both[arm] / both['limit']:.2f}"
            )


if __name__ == "__main__":
    main()
