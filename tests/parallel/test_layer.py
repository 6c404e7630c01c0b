"""Expert parallelism never changes the mathematics: output and every gradient, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from parallel import bags as bags_module
from parallel import dispatch as dispatch_module
from parallel import experts as experts_module
from parallel.bags import Bags
from parallel.borrow import Loan
from parallel.dispatch import Dispatcher
from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.plan import DispatchPlan, Planner
from parallel.planners import home_plan
from parallel.two_level import TwoLevelDispatcher
from tests.parallel.oracle import oracle_experts, random_plan
from tests.ranks import run_ranks

D, F = 12, 10


class RandomPlanner:
    """Any valid plan: rows anywhere, experts borrowed as needed, a few for nothing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        rows = random_plan(counts_RE, home_E, self.seed)
        used = rows[rows[:, 2] != home_E[rows[:, 0]]]
        pairs = {(e, int(home_E[e]), r) for e, r in used[:, [0, 2]].tolist()}
        num_ranks, num_experts = counts_RE.shape
        if num_ranks > 1:
            home = int(home_E[self.seed % num_experts])
            pairs.add((self.seed % num_experts, home, (home + 1) % num_ranks))
        borrowed = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 3)
        plan = DispatchPlan(rows, borrowed, num_ranks, num_experts)
        plan.check(counts_RE, home_E)
        return plan


def make_stacks(
    num_experts: int, hidden: int = D, width: int = F, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(num_experts, 2 * width, hidden, generator=generator, dtype=torch.float64)
    down = torch.randn(num_experts, hidden, width, generator=generator, dtype=torch.float64)
    return gate_up, down


def make_tokens(
    rank: int, num_tokens: int, num_experts: int, top_k: int, hot: str, hidden: int = D
) -> Any:
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if hot == "skewed":
        scores[:, -1] += 1
    if hot == "holes":  # half of the experts get no rows
        scores[:, ::2] -= 2
    ids = scores.topk(top_k).indices
    if hot == "sentinel":
        drop = torch.rand(ids.shape, generator=generator) < 0.3
        ids = ids.masked_fill(drop, num_experts)
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64)
    return x, ids, weights


def make_layer(
    mesh: ParallelMesh,
    num_experts: int,
    home_E: Tensor,
    planner: Planner,
    *,
    hidden: int = D,
    width: int = F,
    ranks_per_node: int = 99,
    two_level: bool = False,
    **options: Any,
) -> ExpertParallel:
    config = Qwen3MoeConfig(
        num_experts=num_experts,
        hidden_size=hidden,
        moe_intermediate_size=width,
        hidden_act="silu",
    )
    family = Qwen3MoeExperts(config).double()
    gate_up, down = make_stacks(num_experts, hidden, width)
    family.gate_up_proj.data, family.down_proj.data = gate_up, down
    nodes = [rank // ranks_per_node for rank in range(mesh.ep_size)]
    dispatcher = (TwoLevelDispatcher if two_level else Dispatcher)(
        mesh.ep_group, num_experts, nodes
    )
    return ExpertParallel(
        family, layer_index=0, home_E=home_E, planner=planner, dispatcher=dispatcher, **options
    )


def run_layer(case: dict[str, Any]) -> dict[str, Any]:
    """One rank's part: outputs and gradients of inputs, weights and native experts."""
    mesh = ParallelMesh.build(ep=case["ep"], device_type="cpu")
    num_experts = case["num_experts"]
    options = case.get("options", {})
    layer = make_layer(mesh, num_experts, case["home_E"], case["planner"], **options)
    tokens = case["tokens"][mesh.rank]
    x, ids, weights = make_tokens(mesh.rank, tokens, num_experts, case["top_k"], case["hot"])
    x.requires_grad_()
    weights.requires_grad_()
    out = layer(x, ids, weights)
    out.backward(torch.cos(out.detach()))
    stacks = {name: getattr(layer.experts, name) for name in layer.experts.names}
    for stack in stacks.values():
        dist.all_reduce(stack.grad, group=mesh.edp_group)
    grads = {name: stack.grad for name, stack in stacks.items()}
    return {
        "out": out.detach(),
        "x": x.grad,
        "weights": weights.grad,
        "experts": layer.local_experts,
        **grads,
    }


def expect(case: dict[str, Any]) -> dict[str, Any]:
    """The same on one process, by the oracle."""
    stacks = make_stacks(case["num_experts"])
    gate_up, down = (stack.requires_grad_() for stack in stacks)
    expected: dict[str, Any] = {"out": [], "x": [], "weights": []}
    for rank, tokens in enumerate(case["tokens"]):
        x, ids, weights = make_tokens(rank, tokens, case["num_experts"], case["top_k"], case["hot"])
        x.requires_grad_()
        weights.requires_grad_()
        out = oracle_experts(x, ids, weights, gate_up, down)
        out.backward(torch.cos(out.detach()))
        expected["out"].append(out.detach())
        expected["x"].append(x.grad)
        expected["weights"].append(weights.grad)
    zero = torch.zeros_like(gate_up), torch.zeros_like(down)
    expected["gate_up_proj"] = gate_up.grad if gate_up.grad is not None else zero[0]
    expected["down_proj"] = down.grad if down.grad is not None else zero[1]
    return expected


def check_case(case: dict[str, Any]) -> None:
    """Every tensor of every rank against the oracle."""
    results, expected = run_ranks(run_layer, len(case["tokens"]), case), expect(case)
    for rank, result in enumerate(results):
        for name in ("out", "x", "weights"):
            want = expected[name][rank]
            if want is None:  # no tokens
                want = torch.zeros_like(result[name])
            close(result[name], want, f"{name} of rank {rank}")
        for name in ("gate_up_proj", "down_proj"):
            close(result[name], expected[name][result["experts"]], f"{name} of rank {rank}")


def close(got: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=lambda m: f"{what}: {m}")


def placement_row(name: str, num_experts: int, ep: int) -> Tensor:
    contiguous = torch.arange(num_experts) // (num_experts // ep)
    if name == "contiguous":
        return contiguous
    if name == "strided":
        return torch.arange(num_experts) % ep
    generator = torch.Generator().manual_seed(7)
    return contiguous[torch.randperm(num_experts, generator=generator)]


TOKENS = {1: [9], 2: [7, 4], 4: [5, 0, 8, 3], 8: [5, 0, 8, 3, 1, 2, 6, 4]}
MESHES = [(1, 1), (2, 2), (2, 1), (4, 4), (4, 2), (8, 4)]


@pytest.mark.parametrize("planner", [home_plan, RandomPlanner(3), RandomPlanner(4)])
@pytest.mark.parametrize("placement", ["contiguous", "strided", "shuffled"])
@pytest.mark.parametrize(("world", "ep"), MESHES)
def test_layer_equals_oracle(world: int, ep: int, placement: str, planner: Planner) -> None:
    home_E = placement_row(placement, 8, ep)
    case = {
        "ep": ep,
        "num_experts": 8,
        "top_k": 3,
        "home_E": home_E,
        "planner": planner,
        "tokens": TOKENS[world],
        "hot": "skewed",
    }
    check_case(case)


@pytest.mark.parametrize("planner", [home_plan, RandomPlanner(5)])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hot", "tokens"),
    [
        (4, 1, "skewed", [6, 5, 0, 1]),  # one expert per rank
        (4, 4, "skewed", [3, 3, 3, 3]),  # every expert for every token
        (12, 2, "holes", [6, 1, 4, 2]),  # experts without rows
        (8, 2, "sentinel", [6, 5, 2, 1]),  # choices of no expert
        (8, 2, "skewed", [0, 0, 0, 0]),  # no tokens anywhere
    ],
)
def test_layer_odd_cases(
    num_experts: int, top_k: int, hot: str, tokens: list[int], planner: Planner
) -> None:
    case = {
        "ep": 4,
        "num_experts": num_experts,
        "top_k": top_k,
        "home_E": placement_row("shuffled", num_experts, 4),
        "planner": planner,
        "tokens": tokens,
        "hot": hot,
    }
    check_case(case)


def test_one_expert_is_a_dense_layer() -> None:
    case = {
        "ep": 1,
        "num_experts": 1,
        "top_k": 1,
        "home_E": torch.zeros(1, dtype=torch.int64),
        "planner": home_plan,
        "tokens": [5],
        "hot": "skewed",
    }
    check_case(case)


def test_two_runs_are_bitwise_equal() -> None:
    case = {
        "ep": 2,
        "num_experts": 8,
        "top_k": 3,
        "home_E": placement_row("shuffled", 8, 2),
        "planner": RandomPlanner(1),
        "tokens": [7, 9],
        "hot": "skewed",
    }
    first, second = run_ranks(run_layer, 2, case), run_ranks(run_layer, 2, case)
    for a, b in zip(first, second, strict=True):
        for name in ("out", "x", "weights", "gate_up_proj", "down_proj"):
            assert torch.equal(a[name], b[name]), name


def weights_not_applied(patch: pytest.MonkeyPatch) -> None:
    total = Bags.total
    patch.setattr(Bags, "total", lambda bags, y, weight=None: total(bags, y))


def gradient_rows_in_another_order(patch: pytest.MonkeyPatch) -> None:
    gather = Bags.gather

    def broken(bags: Bags, x: Tensor) -> Tensor:
        rows = gather(bags, x)
        return rows if torch.is_grad_enabled() else rows.flip(0)

    patch.setattr(Bags, "gather", broken)


def gradients_of_a_token_not_summed(patch: pytest.MonkeyPatch) -> None:
    def broken(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        bags = Bags(*ctx.saved_tensors)
        out = grad.new_zeros(len(bags.start_U), grad.shape[1])
        out[bags.copy_M] = grad
        return out, None

    patch.setattr(bags_module._Expand, "backward", staticmethod(broken))


def borrowed_gradients_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Loan, "collect", lambda loan: {})


def activation_on_the_other_half(patch: pytest.MonkeyPatch) -> None:
    forward = experts_module._SwiGLU.forward

    def broken(ctx: Any, h: Tensor) -> Tensor:
        return forward(ctx, h.roll(h.shape[1] // 2, 1))

    patch.setattr(experts_module._SwiGLU, "forward", staticmethod(broken))


def rows_sent_in_another_order(patch: pytest.MonkeyPatch) -> None:
    ranges = dispatch_module._ranges
    patch.setattr(dispatch_module, "_ranges", lambda sizes, order: ranges(sizes, order).flip(0))


@pytest.mark.parametrize(
    "break_it",
    [
        weights_not_applied,
        gradient_rows_in_another_order,
        gradients_of_a_token_not_summed,
        borrowed_gradients_lost,
        activation_on_the_other_half,
        rows_sent_in_another_order,
    ],
)
def test_the_suite_fails_when_the_code_is_broken(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {
        "ep": 2,
        "num_experts": 8,
        "top_k": 3,
        "home_E": placement_row("strided", 8, 2),
        "planner": RandomPlanner(2),
        "tokens": [7, 4],
        "hot": "skewed",
    }
    check_case(case)
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check_case(case)
