"""What is in flight while what is computed, by the order of events in a profiler's trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from parallel.layer import DataPath
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, parallelize
from tests.benchmarks.overlap import RANKS, SEEN_FROM, events_of_a_layer
from tests.parallel.test_families import full_model
from tests.ranks import run_ranks


def events(num_chunks: int = 1, **more: Any) -> tuple[list[str], list[str]]:
    """Forward and backward events on a rank that borrows."""
    return run_ranks(events_of_a_layer, RANKS, num_chunks, RANKS, False, None, *more.values())[
        SEEN_FROM
    ]


def assert_in_order(names: list[str], *wanted: str) -> None:
    """Each name after the one before, others in between allowed."""
    place = 0
    for name in wanted:
        assert name in names[place:], f"{name} is not after {names[:place]} in {names}"
        place = names.index(name, place) + 1


def last(names: list[str], name: str) -> int:
    return len(names) - 1 - names[::-1].index(name)


@pytest.mark.parametrize("keep", [False, True])
def test_weights_and_gradients_travel_during_products(keep: bool) -> None:
    forward, backward = events(keep=keep)
    assert_in_order(forward, "lend", "set out rows", "shared expert", "wait for rows")
    assert_in_order(forward, "lend", "native products", "wait for borrowed weights")
    assert_in_order(forward, "wait for borrowed weights", "borrowed products")
    assert_in_order(backward, "borrowed gradients", "return gradients", "native gradients")
    assert last(backward, "borrowed gradients") < backward.index("return gradients")


def test_own_rows_are_computed_while_the_others_travel() -> None:
    forward, backward = events(num_chunks=3)
    assert_in_order(forward, "set out rows", "set out rows", "native products", "wait for rows")
    assert forward.index("native products") < forward.index("wait for rows")
    back = [place for place, name in enumerate(forward) if name == "set out rows"][2]
    assert back < last(forward, "native products")  # the first chunk goes home during the last
    first_wait = backward.index("wait for rows")
    assert backward[:first_wait].count("set out rows") == 2
    assert last(backward, "set out rows") < last(backward, "native gradients")


def shared_order(family: str) -> list[str]:
    """When the shared expert's products run, beside the end of the dispatch."""
    model: Any = full_model(family)
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    parallelize(model, mesh)
    _, block = moe_blocks(model)[0]
    shared = getattr(block, "shared_experts", None) or block.shared_expert
    order: list[str] = []
    shared.gate_proj.register_forward_hook(lambda *_: order.append("shared"))
    experts: nn.Module = block.experts
    experts.register_forward_pre_hook(lambda *_: order.append("experts"))
    experts.register_forward_hook(lambda *_: order.append("combined"))
    x = torch.randn(1, 4, model.config.hidden_size, dtype=torch.float64)
    block(x)
    return order


@pytest.mark.parametrize(
    ("family", "order"),
    [
        ("glm4_moe", ["experts", "shared", "combined"]),
        ("deepseek_v3", ["experts", "shared", "combined"]),
        ("qwen2_moe", ["shared", "experts", "combined"]),  # called before: left as it is
    ],
)
def test_shared_experts_run_once_and_early_where_they_can(family: str, order: list[str]) -> None:
    assert run_ranks(shared_order, 2, family) == [order, order]


def test_the_early_result_is_only_for_its_own_input() -> None:
    """A block that changes its input first gets the shared expert's output for what it passes."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared_experts = nn.Linear(3, 3)
            self.experts = nn.Identity()

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            residuals = hidden_states
            hidden_states = self.experts(hidden_states)
            return hidden_states + self.shared_experts(residuals)

    from parallel.shared import compute_shared_meanwhile

    block, path = Block(), DataPath.__new__(DataPath)
    want = block(torch.ones(2, 3))
    assert compute_shared_meanwhile(block, path)
    meanwhile = path.meanwhile
    assert meanwhile is not None
    block.experts.register_forward_hook(lambda *_: meanwhile())
    assert torch.equal(block(torch.ones(2, 3)), want)
    block.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert torch.equal(
        block(torch.ones(2, 3)), 2 * torch.ones(2, 3) + block.shared_experts(2 * torch.ones(2, 3))
    )
