"""One rank's part of the imbalance benchmark: the arms on a workload, timed, compared, weighed.

T tokens of this rank, K choices, D hidden width, E experts, R ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from launch.sizing.live import LiveBytes
from parallel.dispatch import Dispatcher
from parallel.layer import ExpertParallel
from parallel.memory import keep_freed_memory
from parallel.plan import DispatchPlan
from parallel.planners import home_plan
from placement.table import ExpertPlacement
from placement.topology import Topology
from tests.benchmarks.imbalance_figures import EVEN, HOME, PlanFacts, RankRecord, Sample
from tests.benchmarks.workloads import Ids, RoutingShape, Workload, balanced

TOLERANCE = 1e-5  # of the greatest value, fp32
VALUE_BYTES = 4  # fp32
BYTES_PER_PARAMETER = 2 * VALUE_BYTES  # of a borrowed expert: weights, then gradients
# What one core and gloo's loopback reach on the machines of docs/performance.md; planners that
# weigh transfers against rows read it.
GIGAFLOPS, GIGABITS = 50.0, 7.0


@dataclass(frozen=True)
class Setup:
    """Sizes of the layer and the measurement."""

    ranks: int
    ranks_per_node: int
    hidden: int
    width: int
    warmup: int
    steps: int
    repeats: int
    seed: int

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden * self.width

    @property
    def topology(self) -> Topology:
        nodes = tuple(rank // self.ranks_per_node for rank in range(self.ranks))
        return Topology(nodes, GIGABITS, GIGABITS, GIGAFLOPS * 1e9)


class Watched:
    """A planner and what it did last: its plan, the counts it was given, its CPU seconds."""

    def __init__(self, planner: Any, topology: Topology) -> None:
        if hasattr(planner, "for_topology"):
            planner = planner.for_topology(topology, BYTES_PER_PARAMETER)
        if hasattr(planner, "for_layer"):
            planner = planner.for_layer(0)
        self.planner = self.at_start = planner
        self.plan: DispatchPlan | None = None
        self.counts: list[Tensor] = []  # of this optimizer step
        self.seconds = 0.0

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        start = time.thread_time()
        self.plan = self.planner(counts_RE, home_E)
        self.seconds = time.thread_time() - start
        self.counts.append(counts_RE)
        return self.plan

    def next_step(self) -> None:
        """Begin an optimizer step."""
        if hasattr(self.planner, "next_step"):
            self.planner.next_step(self.counts)
        self.at_start = self.planner

    def repeat(self) -> None:
        """Begin the same optimizer step once more, knowing what was known the first time."""
        self.planner, self.counts = deepcopy(self.at_start), []


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step: inputs, routing and the incoming gradient."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    grad_TD: Tensor

    @classmethod
    def of(cls, routing: list[Ids], setup: Setup) -> Batch:
        rank = dist.get_rank()
        ids_TK = torch.from_numpy(routing[rank])
        generator = torch.Generator().manual_seed(setup.seed * setup.ranks + rank)
        x_TD = torch.randn(len(ids_TK), setup.hidden, generator=generator)
        weights_TK = torch.rand(ids_TK.shape, generator=generator)
        grad_TD = torch.randn(len(ids_TK), setup.hidden, generator=generator)
        return cls(x_TD, ids_TK, weights_TK / weights_TK.sum(1, keepdim=True), grad_TD)


class ArmOnRank:
    """One arm: a layer of its own with the weights that all arms share, and its planner."""

    def __init__(self, planner: Any, setup: Setup, shape: RoutingShape, stacks: list[Tensor]):
        topology, group = setup.topology, dist.group.WORLD
        assert group is not None
        self.planner = Watched(planner, topology)
        config = Qwen3MoeConfig(
            num_experts=shape.num_experts,
            hidden_size=setup.hidden,
            moe_intermediate_size=setup.width,
        )
        with torch.device("meta"):
            family = Qwen3MoeExperts(config)
        family.gate_up_proj, family.down_proj = map(torch.nn.Parameter, stacks)
        self.layer = ExpertParallel(
            family,
            layer_index=0,
            home_E=ExpertPlacement.contiguous(1, shape.num_experts, setup.ranks).home_LE[0],
            planner=self.planner,
            dispatcher=Dispatcher(group, shape.num_experts, topology.node_of_R),
        )
        self.parameters = list(self.layer.parameters())

    def step(self, batch: Batch) -> tuple[Sample, list[Tensor]]:
        """Forward and backward of the step that the planner is in; output and all gradients."""
        self.planner.repeat()
        x_TD, weights_TK = batch.x_TD.clone(), batch.weights_TK.clone()
        x_TD.requires_grad_()
        weights_TK.requires_grad_()
        dist.barrier()
        start = _clocks()
        out_TD = self.layer(x_TD, batch.ids_TK, weights_TK)
        middle = _clocks()
        out_TD.backward(batch.grad_TD)
        end = _clocks()
        sample = Sample(_between(start, middle), _between(start, end), self.planner.seconds)
        results = [out_TD.detach(), *(_gradient(t) for t in (x_TD, weights_TK, *self.parameters))]
        for parameter in self.parameters:
            parameter.grad = None
        return sample, results

    def peak_bytes(self, batch: Batch) -> int:
        """Peak of the memory taken in one more step, without parameters and their gradients."""
        self.planner.next_step()
        self.planner.repeat()
        x_TD, weights_TK = batch.x_TD.clone(), batch.weights_TK.clone()
        x_TD.requires_grad_()
        weights_TK.requires_grad_()
        before = [x_TD, weights_TK, batch.ids_TK, batch.grad_TD, *self.parameters]
        with LiveBytes(before) as memory:
            self.layer(x_TD, batch.ids_TK, weights_TK).backward(batch.grad_TD)
        peak = memory.peak(_gradient(parameter) for parameter in self.parameters)
        for parameter in self.parameters:
            parameter.grad = None
        return peak


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "every parameter and input gets a gradient in every step"
    return tensor.grad


def _clocks() -> dict[str, float]:
    return {
        "cpu": time.thread_time(),
        "process": time.process_time(),
        "wall": time.perf_counter(),
    }


def _between(start: dict[str, float], end: dict[str, float]) -> dict[str, float]:
    return {clock: end[clock] - start[clock] for clock in start}


def typical(repeats: Sequence[Sample]) -> Sample:
    """One step's times from repeats on the same routing.

    Ranks that share cores push each other off them and out of caches, which only ever adds CPU
    time and is no property of a planner: `cpu` and `process` are the fastest repeat's. The medians
    are kept beside them, the other clocks and the planner's time are medians.
    """

    def times(what: str) -> dict[str, float]:
        clocks = [getattr(sample, what) for sample in repeats]
        cpu = [clock["cpu"] for clock in clocks]
        return {
            "cpu": min(cpu),
            "cpu_median": statistics.median(cpu),
            "process": min(clock["process"] for clock in clocks),
            "wall": statistics.median(clock["wall"] for clock in clocks),
        }

    planner = statistics.median(sample.planner for sample in repeats)
    return Sample(times("forward"), times("both"), planner)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Greatest difference of the pairs, relative to the greatest value of what is expected."""
    errors = [
        (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    ]
    return float(torch.stack(errors).max())


def _check(error: dict[str, float], name: str) -> None:
    """Refuse results unlike the home plan's, on all ranks alike: none may wait for another."""
    is_wrong = torch.tensor([not value <= TOLERANCE for value in error.values()]).int()
    dist.all_reduce(is_wrong, op=dist.ReduceOp.MAX)
    assert not is_wrong.any(), f"{name}: unlike the home plan by more than {TOLERANCE}: {error}"


def measure(
    load: Workload, setup: Setup, planners: dict[str, Any], stacks: list[Tensor]
) -> RankRecord:
    """All arms on one workload, on this rank.

    Raises:
        AssertionError: if an arm's output or gradients are not the home plan's.
    """
    keep_freed_memory()  # as the trainer does on CPUs; for all arms alike
    node_of_R, shape = setup.topology.node_of_R, load.shape
    planners = {**planners, EVEN: home_plan}
    on_rank = {name: ArmOnRank(p, setup, shape, stacks) for name, p in planners.items()}
    names = list(on_rank)
    row_bytes, expert_bytes = setup.hidden * VALUE_BYTES, setup.expert_parameters * VALUE_BYTES
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    plans: dict[str, list[PlanFacts]] = {name: [] for name in names}
    error: dict[str, float] = {}
    end = setup.warmup + setup.steps
    for step in range(end):
        batches = _batches(load, step, names, setup)
        results: dict[str, list[Tensor]] = {}
        repeats: dict[str, list[Sample]] = {name: [] for name in names}
        for arm in on_rank.values():
            arm.planner.next_step()
        for repeat in range(setup.repeats if step >= setup.warmup else 1):
            for turn in range(len(names)):
                name = names[(turn + step + repeat) % len(names)]
                sample, results[name] = on_rank[name].step(batches[name])
                repeats[name].append(sample)
        if step == setup.warmup - 1:
            compared = [name for name in names if name != EVEN]
            error = {name: difference(results[name], results[HOME]) for name in compared}
            _check(error, load.name)
        if step < setup.warmup:
            continue
        for name, arm in on_rank.items():
            samples[name].append(typical(repeats[name]))
            assert arm.planner.plan is not None
            plans[name].append(PlanFacts.of(arm.planner.plan, node_of_R, row_bytes, expert_bytes))

    peak: dict[str, dict[str, int]] = {name: {} for name in names}
    for step in range(end, end + load.period):
        batches, part = _batches(load, step, names, setup), load.part(step)
        for name, arm in on_rank.items():
            peak[name][part] = max(peak[name].get(part, 0), arm.peak_bytes(batches[name]))
    return RankRecord(list(range(setup.warmup, end)), samples, plans, peak, error)


def _batches(load: Workload, step: int, names: list[str], setup: Setup) -> dict[str, Batch]:
    """The batch of every arm: the workload's, for EVEN as many tokens evenly routed."""
    routing = load.draw(setup.seed, step)
    batch = Batch.of(routing, setup)
    even = Batch.of(balanced(load.shape, sum(map(len, routing))), setup)
    return {name: even if name == EVEN else batch for name in names}
