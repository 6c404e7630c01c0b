"""Routers with parameters of their own: whole MoE blocks against loops over tokens."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from parallel.mesh import ParallelMesh
from parallel.model import find_experts, moe_blocks, parallelize
from tests.families import tiny_config
from tests.parallel.test_layer import RandomPlanner
from tests.ranks import run_ranks
from tests.trainer.test_routers import check_alike, engine_run, fitted
from trainer.routers.extra import NullExperts, ZeroExperts
from trainer.routers.learned import Cosine, Learned, Recurrent, Shared

ROUTERS: dict[str, Any] = {
    "cosine": Cosine,
    "cosine narrow": lambda: Cosine(width=3, temperature=0.1, seed=4),
    "shared": Shared,
    "shared by one": lambda: Shared(1),
    "recurrent": lambda: Recurrent(width=7),
    "null experts": NullExperts,
    "few null experts": lambda: NullExperts(3, null_experts=2, coefficient=0.1),
    "zero experts": ZeroExperts,
    "only copies": lambda: ZeroExperts(0, 2, 0, tau=0.5),
    "only constants": lambda: ZeroExperts(0, 0, 1),
}
TOKENS = 13


def dot(a: Tensor, b: Tensor) -> Tensor:
    return sum((x * y for x, y in zip(a, b, strict=True)), start=a.new_zeros(()))


def norm(a: Tensor) -> Tensor:
    return dot(a, a).sqrt()


def logits(
    router: Any, values: dict[str, Tensor], gate_LED: Tensor, layer: int, x: Tensor, carried: Any
) -> tuple[list[Tensor], Any]:
    """Of one token, by the definitions; and what the next layer gets."""
    own = [dot(row, x) for row in gate_LED[layer]]
    if isinstance(router, Cosine):
        narrow = [dot(row, x) for row in values["projection"][layer]]
        n = torch.stack(narrow)
        found = [
            dot(n, e) / (norm(n) * norm(e)) / values["temperature"][layer]
            for e in values["embedding"][layer]
        ]
        return found, None
    if isinstance(router, Shared):
        assert router.layers is not None
        return [dot(row, x) for row in values["weight"][layer // router.layers]], None
    if isinstance(router, Recurrent):
        width = router.width
        h = torch.zeros(width, dtype=x.dtype) if carried is None else carried
        p = torch.stack([dot(row, x) for row in values["projection"][layer]])
        a = values["input_gates"] @ p + values["gate_biases"][0]
        b = values["state_gates"] @ h + values["gate_biases"][1]
        reset, update = ((a + b)[i * width : (i + 1) * width].sigmoid() for i in (0, 1))
        new = (a[2 * width :] + reset * b[2 * width :]).tanh()
        h = (1 - update) * new + update * h
        return [dot(row, h) for row in values["output"][layer]], h
    own += [dot(row, x) for row in values["rows"][layer]]
    if isinstance(router, ZeroExperts) and carried is not None:
        own = [
            each + dot(row, torch.stack(carried))
            for each, row in zip(own, values["residual"][layer], strict=True)
        ]
    return own, own


def at_home(router: Any, values: dict[str, Tensor], layer: int, number: int, x: Tensor) -> Tensor:
    """Output of one choice beside the experts."""
    if isinstance(router, NullExperts) or number < router.zero:
        return torch.zeros_like(x)
    number -= router.zero
    if number < router.copy:
        return x
    number -= router.copy
    mixes = values["mixes"][layer, number]
    share = torch.stack([dot(row, x) for row in mixes]).softmax(0)
    return share[0] * x + share[1] * values["vectors"][layer, number]


def by_loops(
    router: Any, values: dict[str, Tensor], gate_LED: Tensor, experts: list[Any], x_TD: Tensor
) -> list[Tensor]:
    """Outputs [T, D] of all blocks for the same hidden states."""
    outs: list[list[Tensor]] = [[] for _ in experts]
    num_experts = gate_LED.shape[1]
    for x in x_TD:
        carried = None
        for layer, of_layer in enumerate(experts):
            found, carried = logits(router, values, gate_LED, layer, x, carried)
            exps = [each.exp() for each in found]
            chosen = sorted(range(len(exps)), key=lambda e: -float(exps[e]))
            chosen = chosen[: getattr(router, "num_choices", 2)]
            counted = chosen
            if isinstance(router, NullExperts):
                counted = [e for e in chosen if e < num_experts]
            total = sum((exps[e] for e in counted), start=x.new_zeros(()))
            out = torch.zeros_like(x)
            for e in counted:
                one = (
                    of_layer(x[None], torch.tensor([[e]]), torch.ones(1, 1, dtype=x.dtype))[0]
                    if e < num_experts
                    else at_home(router, values, layer, e - num_experts, x)
                )
                out = out + one * exps[e] / total
            outs[layer].append(out)
    return [torch.stack(out) for out in outs]


def block_outputs(name: str) -> None:
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")).double()
    experts = [copy.deepcopy(module) for _, module in find_experts(model)]
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    parallelize(model, mesh, planner=RandomPlanner(1))
    router = ROUTERS[name]()
    router.attach(model, mesh)
    router.before_step(TOKENS)
    router.coefficient = 0.0  # the loss has a test of its own
    with torch.no_grad():
        for value in model.routing.parameters():
            value += 0.1 * torch.randn_like(value)  # where gradients are not 0
    gates = [block.gate.weight for _, block in moe_blocks(model)]
    for gate in gates:
        gate.data *= 20
    router.values.update(model.routing())
    x_TD = torch.randn(TOKENS, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    got = [block(x_TD[None])[0] for _, block in moe_blocks(model)]
    values = dict(model.routing.named_parameters())
    want = by_loops(router, values, torch.stack(gates), experts, x_TD)
    factors = [torch.randn_like(x_TD) for _ in got]
    leaves = {"hidden": x_TD, **values}
    if not router.replaces_weights:
        leaves |= {f"gate {n}": gate for n, gate in enumerate(gates)}
    else:
        assert not any(gate.requires_grad for gate in gates)
    totals = [sum((o * f).sum() for o, f in zip(out, factors, strict=True)) for out in (got, want)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    grads = [torch.autograd.grad(t, list(leaves.values()), allow_unused=True) for t in totals]
    for key, one, other in zip(leaves, *grads, strict=True):
        if other is None:  # rows of choices that nothing came of
            other = torch.zeros_like(one)
        assert one is not None, key
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ROUTERS)
def test_blocks_against_loops(name: str) -> None:
    """Outputs of two layers and the gradients of hidden states, routers and parameters."""
    run_ranks(block_outputs, 1, name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["cosine", "shared", "recurrent", "null experts", "zero experts"])
def test_expert_parallelism_changes_nothing(name: str, recompute: bool) -> None:
    wide = run_ranks(engine_run, 4, ROUTERS[name], 2, "qwen3_moe", recompute)
    (alone,) = run_ranks(engine_run, 1, ROUTERS[name], 1, "qwen3_moe", False)
    check_alike(wide, alone)
    assert any("routing." in key for key in alone[1])


@pytest.mark.parametrize(
    "make", [lambda: NullExperts(3, null_experts=2), lambda: ZeroExperts(1, 0, 2, tau=0.6)]
)
def test_load_losses(make: Any) -> None:
    """Against a loop, with the gradient; 1 where loads are as wanted."""
    router = fitted(make())
    every = 8 + router.num_extra
    logits_TE = torch.randn(TOKENS, every, dtype=torch.float64, requires_grad=True)
    scores_TE = logits_TE.softmax(1)
    ids_TK = router.choose(0, scores_TE, scores_TE.detach(), True)
    rows = [float((ids_TK == e).sum()) for e in range(every)]
    wanted = [1.0] * every
    if isinstance(router, NullExperts):
        rows[8:] = [sum(rows[8:]) / router.num_extra] * router.num_extra
    else:
        wanted[8:] = [1 / 0.6] * router.num_extra
    want: Any = 0.0
    for e in range(every):
        mean = sum(scores_TE[t, e] for t in range(TOKENS)) / TOKENS
        want = want + rows[e] / sum(rows) * mean * sum(wanted) / wanted[e]
    got = router.of_layer(scores_TE, ids_TK)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    (one,), (other,) = (torch.autograd.grad(v, logits_TE, retain_graph=True) for v in (got, want))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    even = [w * 60 for w in wanted]
    ids = torch.tensor([[e] for e in range(every) for _ in range(round(even[e]))])
    even_TE = torch.tensor(wanted).double().expand(len(ids), -1)
    assert float(router.of_layer(even_TE, ids)) == pytest.approx(1.0, rel=1e-9)


def test_first_values_differ_by_seed_and_start_at_the_family() -> None:
    weight_LED = torch.randn(3, 8, 16)

    def first(router: Learned) -> dict[str, Tensor]:
        fitted(router)
        router.source = torch.Generator().manual_seed(router.seed)
        return router.first_values(weight_LED)

    one, again, other = (first(Cosine(seed=seed))["projection"] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(16**-0.5, rel=0.2)
    assert torch.equal(first(Shared(2))["weight"], weight_LED[[0, 2]])
    zero = first(ZeroExperts())
    assert not zero["residual"].any() and zero["rows"].shape == (3, 4, 16)
    assert float(zero["rows"].std()) == pytest.approx(float(weight_LED.std()), rel=0.3)
    assert math.isclose(float(first(Cosine(temperature=0.2))["temperature"][0]), 0.2, rel_tol=1e-6)


def test_null_experts_keep_the_mean() -> None:
    for choices, null_experts in ((4, 8), (3, 4), (2, 1)):
        router = fitted(NullExperts(choices))
        assert (router.num_choices, router.num_extra) == (choices, null_experts)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Cosine(width=0), r"router.width \(0\) must be > 0"),
        (lambda: Cosine(temperature=0.001), r"router.temperature \(0.001\) must be >= 0.01"),
        (lambda: Shared(0), r"router.layers \(0\) must be > 0"),
        (lambda: Recurrent(0), r"router.width \(0\) must be > 0"),
        (lambda: fitted(NullExperts(1)), r"router.choices \(1\) must be between the experts of a"),
        (lambda: fitted(NullExperts(11, null_experts=2)), r"router.choices \(11\) .* \(10\)"),
        (lambda: fitted(NullExperts(null_experts=0)), r"router.null_experts \(0\) must be > 0"),
        (lambda: ZeroExperts(0, 0, 0), r"\(0, 0, 0\) must be >= 0 and not all 0"),
        (lambda: ZeroExperts(tau=0), r"router.tau \(0\) must be > 0"),
        (lambda: ZeroExperts(coefficient=-1), r"router.coefficient \(-1\) must be >= 0"),
    ],
)
def test_refusals(make: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()
