"""Relocation: every expert arrives, bit for bit, in bounded memory, and no more bytes than that.

The oracle knows experts by their logical keys alone: what the ranks hold together under one table
must be what they hold together under any other.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.sizing.live import LiveBytes
from parallel.model import moe_layers
from parallel.relocate import Relocation, Trip, rounds_of
from parallel.step import optimizer_step
from placement.table import ExpertPlacement
from tests.ranks import run_ranks
from tests.trainer.checkpoint_runs import merge, whole
from tests.trainer.relocation_runs import LAYERS, make_engine, random_table, step
from trainer.engine import TorchEngine
from trainer.state import model_state, optimizer_state


def snapshot(engine: TorchEngine) -> dict[str, Tensor]:
    """Every tensor of experts that this rank holds, by logical key."""
    moments = optimizer_state(engine.model, engine.optimizer)
    tensors = {**model_state(engine.model), **{f"moment {k}": v for k, v in moments.items()}}
    return whole({key: tensor for key, tensor in tensors.items() if ".experts." in key})


def stacks_of(engine: TorchEngine) -> list[Any]:
    """Stacks of experts and their moments."""
    experts = [p for _, layer in moe_layers(engine.model) for p in layer.experts.parameters()]
    states = [engine.optimizer.state[p].values() for p in experts if p in engine.optimizer.state]
    return [*experts, *(value for values in states for value in values if value.dim())]


def local(stack: Any) -> Tensor:
    return stack.to_local() if isinstance(stack, DTensor) else stack.detach()


def move_around(case: dict[str, Any]) -> dict[str, Any]:
    """Relocate through several tables; what this rank holds under each, and the memory it took."""
    case = dict(case)
    ep, num_experts, trained = case.pop("ep"), case.pop("experts"), case.pop("trained")
    engine = make_engine(ep, model={"num_experts": num_experts}, **case)
    if trained:
        step(engine, 0)
    held, homes, moved, peaks = [snapshot(engine)], [], [], []
    pointers = [local(stack).data_ptr() for stack in stacks_of(engine)]
    for table in tables(num_experts, ep):
        with LiveBytes(map(local, stacks_of(engine))) as memory:
            moved.append(engine.relocate(table))
        peaks.append(memory.peak())
        held.append(snapshot(engine))
        homes.append([layer.local_experts for _, layer in moe_layers(engine.model)])
    assert pointers == [local(stack).data_ptr() for stack in stacks_of(engine)], "not in place"
    largest = max(local(stack)[0].nbytes for stack in stacks_of(engine))
    return {
        "held": held,
        "homes": homes,
        "moved": moved,
        "peaks": peaks,
        "largest": largest,
        "ep rank": engine.mesh.ep_rank,
    }


def tables(num_experts: int, ep: int) -> list[ExpertPlacement]:
    """Random ones, one twice, and back to where the run began."""
    contiguous = ExpertPlacement.contiguous(LAYERS, num_experts, ep)
    some = [random_table(seed, num_experts, ep) for seed in (1, 2, 2, 3)]
    return [*some, contiguous]


def bytes_between(
    old: ExpertPlacement, new: ExpertPlacement, edp: int, expert_bytes: int, by_expert: bool
) -> int:
    """Bytes of one expert's tensors for every expert and copy of it that another rank holds now."""
    total = 0
    for layer in range(LAYERS):
        for expert in range(old.num_experts):
            places = []
            for table in (old, new):
                home = int(table.home_LE[layer, expert])
                slot, slots = (
                    table.experts_of(layer, home).index(expert),
                    old.num_experts // old.num_ranks,
                )
                places.append((home, slot // (slots // edp) if by_expert else 0))
            total += expert_bytes * (places[0] != places[1])
    return total


CASES: dict[str, tuple[int, dict[str, Any]]] = {  # name: (ranks, run)
    "EP 2": (2, {"ep": 2, "experts": 8}),
    "EP 4": (4, {"ep": 4, "experts": 8}),
    "one expert each, no step yet": (4, {"ep": 4, "experts": 4, "trained": False}),
    "EP 2 x EDP 2, by experts": (4, {"ep": 2, "experts": 8}),
    "EP 2 x EDP 2, within": (4, {"ep": 2, "experts": 6}),
    "frozen stacks": (4, {"ep": 2, "experts": 8, "frozen": ("gate_up_proj",)}),
    "bf16": (4, {"ep": 2, "experts": 8, "bf16": True}),
    "biases": (2, {"ep": 2, "experts": 8, "family": "gpt_oss"}),
}


# where no expert changes its rank but those that change their home
BY_HAND = {"EP 2", "EP 4", "EP 2 x EDP 2, within"}
EXPERT_BYTES = 3 * (32 * 24) * 4 * 3  # three fp32 matrices 32 x 24, each with two moments


@pytest.mark.parametrize("name", CASES)
def test_every_expert_arrives_bit_for_bit(name: str) -> None:
    world, case = CASES[name]
    case = {"trained": True, **case}
    results = run_ranks(move_around, world, case)
    ep, num_experts = case["ep"], case["experts"]
    before = merge([result["held"][0] for result in results])
    route = [ExpertPlacement.contiguous(LAYERS, num_experts, ep), *tables(num_experts, ep)]
    for number, table in enumerate(route[1:]):
        after = merge([result["held"][number + 1] for result in results])
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(after[key], value), key
        for result in results:
            expected = [table.experts_of(layer, result["ep rank"]) for layer in range(LAYERS)]
            assert result["homes"][number] == expected
            moved: Relocation = result["moved"][number]
            assert moved == results[0]["moved"][number]
            assert moved.experts == int((table.home_LE != route[number].home_LE).sum())
            assert moved.bytes == expected_bytes(name, route[number], table, world // ep, before)
            if name in BY_HAND:
                assert moved.bytes == moved.experts * EXPERT_BYTES
            assert 0 < moved.seconds < 30
    small = 4096  # tables and indices
    for result in results:
        assert max(result["peaks"]) < result["largest"] + small


def expected_bytes(
    name: str, old: ExpertPlacement, new: ExpertPlacement, edp: int, tensors: dict[str, Tensor]
) -> int:
    """Bytes of the experts that changed ranks, from the sizes of their whole tensors."""
    by_expert = (old.num_experts // old.num_ranks) % edp == 0
    first = {k: v.nbytes for k, v in tensors.items() if "layers.0." in k and ".experts.0." in k}
    frozen = sum(size for key, size in first.items() if "gate_up" in key and "frozen" in name)
    trained = sum(first.values()) - frozen
    # what FSDP leaves whole, every EP group moves for itself
    return bytes_between(old, new, edp, trained, by_expert) + edp * bytes_between(
        old, new, edp, frozen, False
    )


@given(st.integers(1, 7), st.integers(0, 10**6), st.integers(1, 5))
def test_rounds_are_as_few_as_can_be(num_ranks: int, seed: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    home = [expert % num_ranks for expert in range(num_ranks * slots)]
    new = [home[place] for place in torch.randperm(len(home), generator=generator).tolist()]
    trips = [Trip(e, a, b) for e, (a, b) in enumerate(zip(home, new, strict=True)) if a != b]
    rounds = rounds_of(trips, num_ranks)
    assert sorted(trip for of_round in rounds for trip in of_round) == trips
    assert len(rounds) == max(Counter(trip.source for trip in trips).values(), default=0)
    for of_round in rounds:
        sources = [trip.source for trip in of_round]
        assert len(set(sources)) == len(sources)
        assert sorted(sources) == sorted(trip.destination for trip in of_round)


# Bad input

SAID = {
    "layers": "cannot move from a placement of (2, 8) on 2 ranks to one of (3, 8) on 2",
    "experts": "cannot move from a placement of (2, 8) on 2 ranks to one of (2, 4) on 2",
    "ranks": "cannot move from a placement of (2, 8) on 2 ranks to one of (2, 8) on 4",
    "one rank has another": "placement: ranks [1] hold another table than rank 0",
    "one rank has another size": "placement: ranks [1] hold another table than rank 0",
    "in a step": "relocate: there are gradients of an optimizer step; relocate after it",
    "gradients": "relocate: there are gradients of an optimizer step; relocate after it",
}


def refusals() -> dict[str, str]:
    """What calls that must fail say on this rank; nothing moves by them."""
    engine, said = make_engine(2), {}
    rank, good = engine.mesh.rank, random_table(1, 8, 2)
    bad = {
        "layers": random_table(1, 8, 2, layers=3),
        "experts": random_table(1, 4, 2),
        "ranks": random_table(1, 8, 4),
        "one rank has another": random_table(rank, 8, 2),
        "one rank has another size": random_table(1, 8 if rank else 4, 2),
    }
    before = snapshot(engine)
    for case in SAID:
        in_step = optimizer_step() if case == "in a step" else nullcontext()
        with pytest.raises(ValueError) as error, in_step:
            if case == "gradients":
                engine.model(input_ids=torch.ones(1, 4).long()).logits.sum().backward()
            engine.relocate(bad.get(case, good))
        said[case] = str(error.value)
    after = snapshot(engine)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    engine.optimizer.zero_grad()
    assert engine.relocate(good).experts > 0  # the ranks are still in step
    return said


def test_bad_calls_are_refused_before_anything_moves() -> None:
    assert run_ranks(refusals, 2) == [SAID, SAID]


def one_rank_rehomed() -> str:
    """A rank that believes in another table than the others is found in the next step."""
    engine = make_engine(2)
    new = random_table(1, 8, 2)
    engine.relocate(new)
    if engine.mesh.rank == 1:
        _, layer = moe_layers(engine.model)[1]
        layer.path.rehome(random_table(2, 8, 2).home_LE[1])
    with pytest.raises(ValueError) as error:
        step(engine, 0)
    return str(error.value)


def test_digests_cover_the_new_table() -> None:
    for said in run_ranks(one_rank_rehomed, 2):
        assert said.startswith("MoE layer 1: ranks [1] of the expert-parallel group disagree")
