"""Assigned sequences on real ranks: the same training, and fewer bytes on the way."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from parallel.decisions import collect_routing
from placement.objective import Objective
from placement.solve import solve
from placement.stats import RoutingStats
from placement.table import ExpertPlacement
from placement.topology import Topology
from tests.ranks import run_ranks
from tests.trainer.data_corpus import stream
from tests.trainer.relocation_runs import make_engine
from trainer.assign import SequenceAssigner
from trainer.data.batches import GlobalBatches, split_batch
from trainer.data.packing import PackedDataset
from trainer.engine import TorchEngine
from trainer.state import model_state

LENGTH, BATCH, STEPS, EOS = 12, 16, 3, 2
DOMAINS = (range(3, 7), range(40, 44))  # token ids of two languages that share no word
EXPERTS = 8


def corpus() -> PackedDataset:
    """Sequences of two domains, as many of each, with documents that end inside them."""
    generator = np.random.default_rng(0)
    streams = []
    for name, words in zip("ab", DOMAINS, strict=True):
        documents = [generator.choice(list(words), 59).tolist() for _ in range(8)]
        streams.append(stream(documents, name, eos=EOS))
    return PackedDataset(streams, LENGTH, token_lengths=np.ones(64, dtype=np.int64), eos_id=EOS)


def batches(dataset: PackedDataset) -> list[list[int]]:
    """Global batches that mix the domains."""
    source = GlobalBatches(len(dataset), BATCH, seed=1)
    return [source.next() for _ in range(STEPS)]


def some_mesh(ep: int, edp: int, ranks_per_node: int) -> Any:
    return SimpleNamespace(ep_size=ep, edp_size=edp, ranks_per_node=ranks_per_node)


def topology(ep: int, ranks_per_node: int) -> Topology:
    node_of_R = tuple(rank // ranks_per_node for rank in range(ep))
    return Topology(node_of_R, intra_gbps=400.0, inter_gbps=100.0, flops=1e12)


def domain_rows(ranks: int) -> np.ndarray:
    """A table in which the first domain's rows are on the first half of the ranks."""
    rows_VR = np.zeros((64, ranks))
    rows_VR[list(DOMAINS[0]), : ranks // 2] = 1.5
    rows_VR[list(DOMAINS[1]), ranks // 2 :] = 1.5
    return rows_VR


@pytest.mark.parametrize(("ep", "edp"), [(2, 1), (4, 1), (2, 2), (2, 4), (1, 2)])
def test_every_position_of_the_group_gets_its_sequences(ep: int, edp: int) -> None:
    """The first half of every EP group trains on the first domain, the rest on the second."""
    dataset = corpus()
    half = len(dataset) // 2
    ids = [*range(half, half + 8), *range(8)]  # the second domain first
    assigner = SequenceAssigner(dataset, some_mesh(ep, edp, ep), topology(ep, ep))
    assert assigner.order(ids) == ids
    assigner.update(domain_rows(ep))
    ordered = assigner.order(ids)
    assert sorted(ordered) == sorted(ids)
    if ep == 1:
        return
    seen: list[int] = []
    for position in range(ep):
        of_groups = [
            [i for part in split_batch(ordered, g * ep + position, ep * edp, 1) for i in part]
            for g in range(edp)
        ]
        together = [i for part in of_groups for i in part]
        assert all((i < half) == (position < ep // 2) for i in together)
        assert [ids.index(i) for i in together] == sorted(ids.index(i) for i in together)
        seen += together
    assert Counter(seen) == Counter(ids)


def test_the_order_is_a_function_of_batch_and_table() -> None:
    """The same on every rank, whatever it was asked before; updates replace the table."""
    dataset = corpus()
    generator = np.random.default_rng(3)
    first, second = generator.random((2, 64, 4))
    one, other = (SequenceAssigner(dataset, some_mesh(4, 1, 2), topology(4, 2)) for _ in range(2))
    one.update(first)
    other.update(second)
    ids = batches(dataset)
    assert one.order(ids[0]) != other.order(ids[0])
    other.update(first)
    for batch in ids:
        assert one.order(batch) == other.order(batch) == one.order(batch)


def test_what_does_not_fit_is_refused() -> None:
    assigner = SequenceAssigner(corpus(), some_mesh(2, 2, 2), topology(2, 2))
    with pytest.raises(ValueError, match=r"must be \[token ids, 2\].* got \(64, 4\)"):
        assigner.update(np.ones((64, 4)))
    with pytest.raises(ValueError, match=r"not empty, got \(0, 2\)"):
        assigner.update(np.ones((0, 2)))
    assigner.update(domain_rows(2))
    with pytest.raises(ValueError, match=r"batch_size \(6\) must be a multiple of ranks \(4\)"):
        assigner.order(list(range(6)))


def tell_apart(engine: TorchEngine) -> None:
    """Embed the words of a domain alike, so that routers send them to the same experts."""
    table: Any = engine.model.get_input_embeddings().weight
    rows_VD = table.detach().full_tensor()
    for words in DOMAINS:
        rows_VD[list(words)] = rows_VD[words[0]] + 0.2 * rows_VD[list(words)]
    with torch.no_grad():
        table.copy_(distribute_tensor(rows_VD, table.device_mesh, table.placements))


def statistics(engine: TorchEngine, dataset: PackedDataset) -> RoutingStats:
    """What the untrained model chooses on all sequences; every rank looks at all of them."""
    stats = RoutingStats(2, EXPERTS, engine.mesh.ep_size)
    batch = dataset.batch(range(len(dataset)))
    domain_T = np.repeat(dataset.sources_of(batch["sequence_ids"]), LENGTH)
    with collect_routing() as routing:
        engine.eval_step(batch)
    for layer, ids_TK in routing:
        token_T = batch["input_ids"].flatten()
        stats.observe(layer, ids_TK, token_T=token_T, domain_T=domain_T)
    return stats.with_sources(engine.mesh.ep_size)


def run(ep: int, ranks_per_node: int, place: bool, assign: bool) -> dict[str, Any]:
    """Train, with experts placed for assigned sequences; losses, bytes and parameters by key."""
    engine = make_engine(ep, dtype=torch.float64)
    tell_apart(engine)
    dataset, mesh = corpus(), engine.mesh
    links = topology(ep, ranks_per_node)
    stats = statistics(engine, dataset)
    start = ExpertPlacement.contiguous(2, EXPERTS, ep)
    batched = Objective(mode="batched", load_weight=0)
    found = solve(stats, links, start, objective=batched, method="search")
    placement = found.placement if place else start
    engine.relocate(placement)
    size: Any = SimpleNamespace(ep_size=ep, edp_size=mesh.edp_size, ranks_per_node=ranks_per_node)
    assigner = SequenceAssigner(dataset, size, links)
    if assign:
        assigner.update(stats.by_token.rows_per_rank(placement.home_LE.numpy(), ep))
    losses, sent = [], []
    for ids in batches(dataset):
        ordered = assigner.order(ids)
        micro_batches = dataset.micro_batches(ordered, mesh.rank, mesh.world_size, 2)
        metrics = engine.train_step(micro_batches).metrics
        losses += [metrics["train/loss"], metrics["train/grad_norm"]]
        sent.append(metrics["moe/bytes_within_nodes"] + metrics["moe/bytes_across_nodes"])
    state = {}
    for key, value in model_state(engine.model).items():
        state[key] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return {"losses": losses, "sent": sent, "state": state}


@pytest.mark.parametrize(
    ("world", "ep", "placing", "assigning"),
    [(2, 2, 0.67, 1.0), (4, 4, 0.88, 0.95), (4, 2, 0.67, 1.0)],
)
def test_training_is_the_same_and_sends_less(
    world: int, ep: int, placing: float, assigning: float
) -> None:
    """Bytes are compared of the first step, whose routing the experts were placed for. At EP 2
    the placement found is as good wherever the sequences are."""
    plain, placed, assigned = (
        run_ranks(run, world, ep, ep, place, assign)
        for place, assign in ((False, False), (True, False), (True, True))
    )
    for start, before, after in zip(plain, placed, assigned, strict=True):
        assert before["losses"] == pytest.approx(start["losses"], rel=1e-9)
        assert after["losses"] == pytest.approx(before["losses"], rel=1e-9)
        assert before["state"].keys() == after["state"].keys()
        for key, value in before["state"].items():
            torch.testing.assert_close(after["state"][key], value, rtol=1e-9, atol=1e-9, msg=key)
        assert before["sent"][0] <= placing * start["sent"][0]
        assert after["sent"][0] <= assigning * before["sent"][0]
