"""What one rank of the simulator's benchmark does: measure links, dispatch and combine, lend."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from parallel.borrow import Loan
from parallel.comm import Exchange, Ring
from parallel.dispatch import Dispatcher
from parallel.mesh import ParallelMesh
from parallel.planners import Quota, home_plan
from parallel.two_level import TwoLevelDispatcher
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace

NUM_NODES, RANKS_PER_NODE, EXPERTS = 2, 2, 16
RANKS = NUM_NODES * RANKS_PER_NODE
REPEATS, PROBE_BYTES = 5, 1 << 22
VALUE_BYTES = 4  # float32
PARAMETERS = 1 << 18  # of an expert
LENDING = "lending"  # in the place of a dispatcher


@dataclass(frozen=True)
class Case:
    """One routing under one placement, planner and dispatcher."""

    routing: str
    placement: str
    planner: str
    dispatcher: str

    def trace(self, tokens: int) -> Trace:
        """Choices of `tokens` tokens per rank."""
        source_T = np.arange(tokens * RANKS) // tokens
        rng = np.random.default_rng(7)
        node_T, per_node = source_T // RANKS_PER_NODE, EXPERTS // NUM_NODES
        weight_TE = np.ones((len(source_T), EXPERTS))
        if self.routing == "structured":
            router = SyntheticRouter(1, EXPERTS, "domain", seed=3)
            ids_TLK = router.sample(RANKS * 4, tokens // 4, 4).ids_TLK
            return Trace(ids_TLK, EXPERTS, source_T=source_T)
        if self.routing == "hot":  # one rank in four gets two rows in three
            weight_TE[:, : EXPERTS // RANKS] = 6
        elif self.routing == "near":  # most rows stay on their node
            weight_TE[node_T[:, None] == np.arange(EXPERTS) // per_node] = 20
        elif self.routing == "one way":  # node 1 sends to node 0, which keeps its own
            weight_TE[:, :per_node] = 40
        else:
            assert self.routing == "even"
        keys_TE = rng.exponential(size=weight_TE.shape) / weight_TE
        ids_TLK = np.argsort(keys_TE, 1)[:, None, :2]
        return Trace(ids_TLK, EXPERTS, source_T=source_T)

    def home(self) -> ExpertPlacement:
        contiguous = ExpertPlacement.contiguous(1, EXPERTS, RANKS)
        if self.placement == "contiguous":
            return contiguous
        assert self.placement == "random"
        order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(5))
        return ExpertPlacement(contiguous.home_LE[:, order].contiguous(), RANKS)

    def plan_with(self) -> Callable[..., Any]:
        return home_plan if self.planner == "home" else Quota(node_of_R=(0, 0, 1, 1))


CASES = [
    Case(routing, placement, planner, dispatcher)
    for routing, placement, planner in (
        ("even", "contiguous", "home"),
        ("hot", "contiguous", "home"),
        ("hot", "contiguous", "quota"),
        ("near", "contiguous", "home"),
        ("near", "random", "home"),
        ("one way", "contiguous", "home"),
        ("structured", "contiguous", "home"),
        ("structured", "random", "quota"),
    )
    for dispatcher in ("direct", "two_level", *([LENDING] if planner == "quota" else []))
]


def measure(
    rank: int, folder: Path, tokens: int, hidden: int
) -> tuple[dict[str, Any], list[list[float]]]:
    """The links' speeds, and seconds of every case's repeats: there and back, both passes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = ParallelMesh.build(ep=RANKS, ranks_per_node=RANKS_PER_NODE, device_type="cpu")
    links = probe(mesh)
    seconds = [
        lend(case, mesh, tokens) if case.dispatcher == LENDING else run(case, mesh, tokens, hidden)
        for case in CASES
    ]
    dist.barrier()
    return links, seconds


def probe(mesh: ParallelMesh) -> dict[str, Any]:
    """Arguments of a Topology: one rank to its node, one to another, all to another at once."""
    ring = Ring.of(mesh.ep_group, mesh.node_of_ep_ranks())
    alone = 8 * PROBE_BYTES / 1e9 / _message(ring, RANKS_PER_NODE, PROBE_BYTES, senders=1)
    all_s = _message(ring, RANKS_PER_NODE, PROBE_BYTES)
    return {
        "node_of_R": tuple(mesh.node_of_ep_ranks()),
        "intra_gbps": 8 * PROBE_BYTES / 1e9 / _message(ring, 1, PROBE_BYTES),
        "inter_gbps": alone,
        "node_gbps": 8 * PROBE_BYTES / 1e9 / all_s * RANKS_PER_NODE,
        "flops": 1.0,
        "latency_us": 1e6 * _message(ring, RANKS_PER_NODE, 8),
    }


def _message(ring: Ring, step: int, size: int, senders: int = RANKS) -> float:
    """Seconds of one message from each of the first ranks in a step of the ring, all at once."""
    send = size if ring.rank < senders else 0
    receive = size if ring.from_J[step] < senders else 0
    message = torch.ones(send, dtype=torch.uint8)
    return statistics.median(
        _timed(lambda: Exchange(ring, [step], [send], [receive]).now(message), 2 * REPEATS)
    )


def run(case: Case, mesh: ParallelMesh, tokens: int, hidden: int) -> list[float]:
    """Seconds of dispatch and combine, forward and backward, with nothing computed between."""
    kind = TwoLevelDispatcher if case.dispatcher == "two_level" else Dispatcher
    dispatcher = kind(mesh.ep_group, EXPERTS, mesh.node_of_ep_ranks())
    trace, home_E = case.trace(tokens), case.home().home_LE[0]
    mine = trace.source_T == mesh.ep_rank
    ids_TK = torch.from_numpy(trace.ids_TLK[mine, 0].astype(np.int64))
    x_TD = torch.ones(tokens, hidden, requires_grad=True)
    weights_TK = torch.full(ids_TK.shape, 0.5, requires_grad=True)
    planner = case.plan_with()

    def there_and_back() -> None:
        counts_RE = dispatcher.count(ids_TK)
        plan = planner(counts_RE, home_E)
        held = sorted({*(home_E == mesh.ep_rank).nonzero().flatten().tolist()})
        held += [e for e, _, borrower in plan.borrowed.tolist() if borrower == mesh.ep_rank]
        slot_E = torch.full((EXPERTS,), -1, dtype=torch.int64)
        slot_E[torch.tensor(held)] = torch.arange(len(held))
        sent = dispatcher.dispatch(x_TD, ids_TK, weights_TK, plan, slot_E)
        tickets = [chunk.send_back(chunk.receive()) for chunk in sent.chunks]
        sums = [c.finish(t) for c, t in zip(sent.chunks, tickets, strict=True)]
        torch.stack(sums).sum(0).backward(torch.ones(tokens, hidden))

    return _timed(there_and_back, REPEATS)


def lend(case: Case, mesh: ParallelMesh, tokens: int) -> list[float]:
    """Seconds of borrowed experts' journey there, and of their gradients' back."""
    trace, home_E, nodes = case.trace(tokens), case.home().home_LE[0], mesh.node_of_ep_ranks()
    assert trace.source_T is not None
    counts_RE = torch.zeros(RANKS, EXPERTS, dtype=torch.int64)
    for source, ids_K in zip(trace.source_T, trace.ids_TLK[:, 0], strict=True):
        counts_RE[source, ids_K.tolist()] += 1
    borrowed = [tuple(row) for row in case.plan_with()(counts_RE, home_E).borrowed.tolist()]
    mine = (home_E == mesh.ep_rank).nonzero().flatten().tolist()
    slots = {expert: slot for slot, expert in enumerate(mine)}
    stacks = {"weight": torch.ones(len(mine), PARAMETERS, requires_grad=True)}

    def there_and_back() -> None:
        loan = Loan(borrowed, slots, stacks, Ring.of(mesh.ep_group, nodes), nodes)
        loan.start_fetch(stacks)
        loan.stack("weight")
        loan.return_gradients()
        loan.collect()

    return _timed(there_and_back, REPEATS)


def _timed(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of the slowest rank, run by run, after one that is not counted."""
    seconds = []
    for _ in range(1 + repeats):
        dist.barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds[1:], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def topology_of(links: dict[str, Any]) -> Topology:
    return Topology(**{**links, "node_of_R": tuple(links["node_of_R"])})


if __name__ == "__main__":
    import sys

    place, tokens_per_rank, width = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    found = measure(int(sys.argv[1]), place, tokens_per_rank, width)
    (place / f"rank{sys.argv[1]}.json").write_text(json.dumps(found))
