"""What the executor must stand too: a thousand plans, disagreement, frozen weights, bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel import grouped
from parallel.decisions import collect_layers
from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.plan import DispatchPlan
from parallel.planners import home_plan
from parallel.step import optimizer_step
from tests.parallel.oracle import oracle_experts
from tests.parallel.test_layer import (
    D,
    RandomPlanner,
    make_layer,
    make_stacks,
    make_tokens,
    placement_row,
)
from tests.ranks import run_ranks

E, TOKENS = 8, [6, 0, 9, 4]


class Series:
    """Another random plan for every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        self.calls += 1
        return RandomPlanner(self.calls)(counts_RE, home_E)


def thousand_plans(number: int) -> tuple[float, float]:
    """Largest errors of outputs and input gradients over many plans, against the first one."""
    mesh = ParallelMesh.build(ep=4, device_type="cpu")
    home_E = placement_row("shuffled", E, 4)
    layer = make_layer(mesh, E, home_E, Series(), ranks_per_node=2, two_level=True)
    x, ids, weights = make_tokens(mesh.rank, TOKENS[mesh.rank], E, 3, "skewed")
    worst, first = [0.0, 0.0], None
    for index in range(number):
        layer.path.num_chunks, layer.path.refetch = 1 + index % 4, index % 3 == 0
        x_TD = x.clone().requires_grad_()
        out = layer(x_TD, ids, weights)
        out.backward(torch.ones_like(out))
        assert x_TD.grad is not None
        results = out.detach(), x_TD.grad
        first = first or results
        for place, (got, want) in enumerate(zip(results, first, strict=True)):
            if len(got):
                worst[place] = max(worst[place], float((got - want).abs().max()))
    return worst[0], worst[1]


def test_a_thousand_random_plans_end() -> None:
    for worst in run_ranks(thousand_plans, 4, 1000, timeout_s=240):
        assert max(worst) < 1e-11


def disagreement(mistaken_rank: int | None, what: str) -> str:
    """What this rank says when one rank's planner is not the pure function of the others."""
    mesh = ParallelMesh.build(ep=4, device_type="cpu")
    home_E = placement_row("contiguous", E, 4)
    if mesh.rank == mistaken_rank and what == "placement":
        home_E = placement_row("strided", E, 4)
    layer = make_layer(mesh, E, home_E, home_plan)
    if mesh.rank == mistaken_rank and what == "plan":
        plans = layer.path.planner

        def mistaken(counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
            plan = plans(counts_RE, home_E)
            return DispatchPlan(plan.rows, torch.tensor([[0, 0, 1]]), 4, E)

        layer.path.planner = mistaken
        layer.path._borrow = lambda plan, stacks: []  # type: ignore[method-assign]
    try:
        for _ in range(2):
            layer(*make_tokens(mesh.rank, 5, E, 2, "skewed"))
    except ValueError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize("what", ["placement", "plan"])
def test_ranks_that_disagree_are_named_on_every_rank(what: str) -> None:
    for said in run_ranks(disagreement, 4, 2, what):
        assert said.startswith("MoE layer 0: ranks [2] of the expert-parallel group disagree")
    assert run_ranks(disagreement, 4, None, what) == ["agreed"] * 4


def frozen(names: list[str], in_step: bool) -> dict[str, Tensor | None]:
    """Gradients of a layer some of whose stacks are frozen."""
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    layer = make_layer(mesh, E, placement_row("strided", E, 2), RandomPlanner(2))
    for name in names:
        getattr(layer.experts, name).requires_grad_(False)
    x, ids, weights = make_tokens(mesh.rank, 5, E, 2, "skewed")
    if in_step:
        with optimizer_step() as step:
            layer(x, ids, weights).sum().backward()
            step.finish([layer.experts], mesh.edp_group)
    else:
        layer(x.requires_grad_(), ids, weights).sum().backward()
    return {name: getattr(layer.experts, name).grad for name in layer.experts.names}


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("names", [["gate_up_proj"], ["down_proj"]])
def test_frozen_stacks(names: list[str], in_step: bool) -> None:
    """Also where nothing before the layer needs gradients (inside a step)."""
    whole = run_ranks(frozen, 2, [], in_step)
    for got, want in zip(run_ranks(frozen, 2, names, in_step), whole, strict=True):
        for name, gradient in got.items():
            expected = want[name]
            assert expected is not None
            if name in names:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def without_gradients(frozen_all: bool) -> Tensor:
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    layer = make_layer(mesh, E, placement_row("strided", E, 2), RandomPlanner(2), refetch=True)
    tokens = make_tokens(mesh.rank, 5, E, 2, "skewed")
    if frozen_all:
        layer.requires_grad_(False)
        x = tokens[0].requires_grad_()
        layer(x, *tokens[1:]).sum().backward()
        assert x.grad is not None
        return x.grad
    with torch.no_grad():
        return layer(*tokens)


def test_no_grad_and_all_frozen() -> None:
    gate_up, down = make_stacks(E)
    grads, outs = run_ranks(without_gradients, 2, True), run_ranks(without_gradients, 2, False)
    for rank, (grad, out) in enumerate(zip(grads, outs, strict=True)):
        x, ids, weights = make_tokens(rank, 5, E, 2, "skewed")
        want = oracle_experts(x.requires_grad_(), ids, weights, gate_up, down)
        torch.testing.assert_close(out, want.detach(), rtol=1e-11, atol=1e-11)
        want.sum().backward()
        torch.testing.assert_close(grad, x.grad, rtol=1e-11, atol=1e-11)


def spread_over(num_ranks: int) -> Any:
    """A planner that deals the rows of expert 0 out to the first ranks."""

    def planner(counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        plan = home_plan(counts_RE, home_E)
        rows, home = plan.rows.clone(), int(home_E[0])
        hot = rows[:, 0] == 0
        rows[hot, 2] = rows[hot, 1] % num_ranks
        used = sorted({int(r) for r in rows[hot, 2]} - {home})
        borrowed = torch.tensor([[0, home, r] for r in used], dtype=torch.int64).reshape(-1, 3)
        return DispatchPlan(rows, borrowed, plan.num_ranks, plan.num_experts)

    return planner


def bf16_layer(mesh: ParallelMesh, planner: Any) -> ExpertParallel:
    layer = make_layer(mesh, E, placement_row("contiguous", E, mesh.ep_size), planner)
    return layer.to(torch.bfloat16)


def bf16_weight_error(copies: int) -> float | None:
    """Relative L2 error of the hot expert's weight gradient at its home."""
    mesh = ParallelMesh.build(ep=8, device_type="cpu")
    layer = bf16_layer(mesh, spread_over(copies))
    tokens = [make_tokens(rank, 200, E, 1, "skewed") for rank in range(8)]
    x, _, weights = tokens[mesh.rank]
    ids = torch.zeros(200, 1, dtype=torch.int64)
    with optimizer_step() as step:
        out = layer(x.bfloat16(), ids, weights.bfloat16())
        out.backward(torch.cos(torch.arange(out.numel())).view_as(out).bfloat16())
        step.collect()
    if mesh.rank:
        return None
    gate_up, down = (stack.bfloat16().double().requires_grad_() for stack in make_stacks(E))
    for x_r, _, weights_r in tokens:
        want = oracle_experts(
            x_r.bfloat16().double(), ids, weights_r.bfloat16().double(), gate_up, down
        )
        want.backward(torch.cos(torch.arange(want.numel())).view_as(want).bfloat16().double())
    native: Any = layer.experts.gate_up_proj
    got = native.grad[0].float()  # as FSDP2 reduces it, before borrowed gradients join it
    for gradients in step._totals.get(layer.experts, {}).values():
        got = got + gradients["gate_up_proj"]
    assert gate_up.grad is not None
    exact = gate_up.grad[0]
    return float((got.double() - exact).norm() / exact.norm())


def test_splitting_an_expert_over_more_ranks_does_not_grow_the_error_in_bf16() -> None:
    errors = [run_ranks(bf16_weight_error, 8, copies)[0] for copies in (1, 2, 4, 8)]
    assert errors[0] is not None and errors[0] < 1e-2
    for error in errors[1:]:  # every part is rounded once, by its own product; sums are fp32
        assert error is not None and error <= 1.1 * errors[0]


def one_kernel(use_it: bool) -> dict[str, Tensor]:
    """A layer in bf16 with the products that GPUs use, or slot by slot."""
    if use_it:  # in this rank's own process
        grouped._in_one_kernel = lambda x: x.dtype == torch.bfloat16
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    layer = make_layer(
        mesh, E, placement_row("strided", E, 2), RandomPlanner(2), hidden=16, width=16
    )
    layer = layer.to(torch.bfloat16)
    x, ids, weights = make_tokens(mesh.rank, 9, E, 3, "skewed", hidden=16)
    x = x.bfloat16().requires_grad_()
    out = layer(x, ids, weights.bfloat16())
    out.sum().backward()
    gradients = {name: getattr(layer.experts, name).grad for name in layer.experts.names}
    return {"out": out.detach(), "x": x.grad, **gradients}


def test_gpu_products_on_a_cpu() -> None:
    for got, want in zip(
        run_ranks(one_kernel, 2, True), run_ranks(one_kernel, 2, False), strict=True
    ):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=3e-2, atol=3e-2, msg=name)


def traffic(options: dict[str, Any], top_k: int) -> tuple[int, int, list[list[int]]]:
    """Bytes of rows that this rank reports, and the ranks that each of its tokens needs."""
    mesh = ParallelMesh.build(ep=4, device_type="cpu")
    home_E = placement_row("shuffled", E, 4)
    layer = make_layer(mesh, E, home_E, home_plan, **options)
    x, ids, weights = make_tokens(mesh.rank, 7 + mesh.rank, E, top_k, "skewed")
    with collect_layers() as collected:
        layer(x, ids, weights)
    (sent,) = collected.traffic
    return sent.rows_within, sent.rows_across, home_E[ids].tolist()


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("two_level", [False, True])
def test_a_token_travels_once_per_rank_or_node(two_level: bool, num_chunks: int) -> None:
    options = {"ranks_per_node": 2, "two_level": two_level, "num_chunks": num_chunks}
    row_bytes = 2 * D * 8
    results = run_ranks(traffic, 4, options, 5)
    across = within = 0
    for rank, (_, _, ranks_of_tokens) in enumerate(results):
        for ranks in map(set, ranks_of_tokens):
            far = {r for r in ranks if r // 2 != rank // 2}
            near = ranks - far - {rank}
            if two_level:  # once to the relay at the same place, which hands it on
                relays = {r // 2 * 2 + rank % 2 for r in far}
                across += len(relays)
                within += len(near) + len(far - relays)
            else:
                across, within = across + len(far), within + len(near)
    assert sum(result[0] for result in results) == within * row_bytes
    assert sum(result[1] for result in results) == across * row_bytes
