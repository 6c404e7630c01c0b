"""The ways of borrowed experts: once to a node, gradients in rounds, once per optimizer step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.borrow import Hop, Layout, Loan, hops, rounds_home
from parallel.mesh import ParallelMesh
from parallel.step import optimizer_step
from tests.parallel.test_layer import make_layer, make_tokens, placement_row
from tests.ranks import run_ranks
from tests.trainer.test_engine_borrowed import KeepingPlanner


@settings(deadline=None, max_examples=200)
@given(
    num_ranks=st.integers(1, 9),
    per_node=st.integers(1, 4),
    num_experts=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
def test_an_expert_crosses_to_a_node_once(
    num_ranks: int, per_node: int, num_experts: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    nodes = [rank // per_node for rank in range(num_ranks)]
    home = torch.randint(0, num_ranks, (num_experts,), generator=generator).tolist()
    wants = torch.rand(num_experts, num_ranks, generator=generator) < share
    borrowed = [
        (e, home[e], r) for e in range(num_experts) for r in range(num_ranks)
        if wants[e, r] and r != home[e]
    ]  # fmt: skip
    first, second = hops(borrowed, nodes)
    arrived = Counter((hop.expert, hop.destination) for hop in first + second)
    assert arrived == Counter((expert, borrower) for expert, _, borrower in borrowed)
    assert all(hop.source == home[hop.expert] for hop in first)
    assert all((hop.expert, hop.source) in arrived for hop in second)
    assert all(nodes[hop.source] == nodes[hop.destination] for hop in second)
    crossings = Counter(
        (hop.expert, nodes[hop.destination])
        for hop in first
        if nodes[hop.destination] != nodes[hop.source]
    )
    assert not crossings or max(crossings.values()) == 1

    rounds = rounds_home(first, second)
    back = [Hop(hop.expert, hop.destination, hop.source) for hop in first + second]
    assert Counter(hop for one in rounds for hop in one) == Counter(back)
    for one in rounds:
        assert len({hop.destination for hop in one}) == len(one) > 0
    when = {hop: number for number, one in enumerate(rounds) for hop in one}
    for hop in second:  # a relay has all of its node before it sends home
        gathered = when[Hop(hop.expert, hop.destination, hop.source)]
        (home_hop,) = (h for h in when if h.expert == hop.expert and h.source == hop.source)
        assert gathered < when[home_hop]


def test_layout_is_one_message_with_every_parameter() -> None:
    stacks = {"up": torch.randn(3, 5, 4), "bias": torch.randn(3, 7), "down": torch.randn(3, 4, 2)}
    layout = Layout.of(stacks)
    messages = torch.stack([layout.pack(stacks, slot) for slot in (2, 0)])
    assert messages.shape == (2, layout.size) and messages[0].is_contiguous()
    for name, stack in stacks.items():
        assert torch.equal(layout.stack(messages, name), stack[[2, 0]])
        assert layout.starts[name] % 16 == 0


def journeys(num_micro_batches: int) -> tuple[list[int], list[int], int]:
    """How often each loan of a step fetched weights and returned gradients, over micro-batches."""
    mesh = ParallelMesh.build(ep=4, device_type="cpu")
    layer = make_layer(mesh, 8, placement_row("shuffled", 8, 4), KeepingPlanner(3))
    fetched, returned = Counter[int](), Counter[int]()
    fetch, give_back = Loan.start_fetch, Loan.return_gradients

    def counted_fetch(loan: Loan, stacks: Any) -> bool:
        new = fetch(loan, stacks)
        fetched[id(loan)] += new
        return new

    def counted_return(loan: Loan) -> None:
        returned[id(loan)] += 1
        give_back(loan)

    setattr(Loan, "start_fetch", counted_fetch)  # noqa: B010 (in this rank's own process)
    setattr(Loan, "return_gradients", counted_return)  # noqa: B010
    with optimizer_step() as step:
        for index in range(num_micro_batches):
            x, ids, weights = make_tokens(mesh.rank + 10 * index, 6, 8, 3, "skewed")
            out = layer(x.requires_grad_(), ids, weights)
            before_last = sum(returned.values())
            if index == num_micro_batches - 1:
                step.start_last_micro_batch()
            out.sum().backward()
        in_backward = sum(returned.values())
        step.finish([layer.experts], mesh.edp_group)
    assert before_last == 0 and in_backward == sum(returned.values())
    pairs = [row for loan in step.kept(layer.experts) for row in loan.borrowed]
    assert len(pairs) == len(set(pairs))  # nothing is borrowed twice
    return sorted(fetched.values()), sorted(returned.values()), len(pairs)


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_kept_experts_travel_once_per_step(num_micro_batches: int) -> None:
    for fetched, returned, number in run_ranks(journeys, 4, num_micro_batches):
        assert number > 0
        assert set(fetched) == set(returned) == {1}


def saved_bytes(width: int) -> tuple[int, int]:
    """Bytes that a layer keeps for its backward pass, rows' values and indices apart."""
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    layer = make_layer(mesh, 4, placement_row("contiguous", 4, 1), KeepingPlanner(0), width=width)
    x, ids, weights = make_tokens(0, 50, 4, 2, "skewed")
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x.requires_grad_(), ids, weights)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    values = sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in kept.items()
        if pointer not in parameters and tensor.is_floating_point() and tensor.dim() == 2
    )
    return values, 100 * layer.experts.widths_kept() * 8


@pytest.mark.parametrize("width", [5, 64])
def test_activation_bytes_are_what_autograd_keeps(width: int) -> None:
    ((measured, said),) = run_ranks(saved_bytes, 1, width)
    assert measured == said
