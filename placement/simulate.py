"""How long the MoE layers of a training step take on a described cluster, part by part.

T tokens, N rows, L MoE layers, E experts, R ranks.

One layer of one micro-batch goes through what the executor does, one part after the other: rows
are counted and planned, borrowed experts come, labels and tokens travel to where their rows are
computed, the busiest rank computes, sums travel home; in the backward pass all of it once more the
other way. `step_time` says how long each part takes.

Not in it: planning itself, everything outside the MoE layers, and overlap of journeys with
products (train.dispatch_chunks), which makes a real step shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from placement.objective import ExpertShape, check_fit
from placement.stats import RoutingStats
from placement.step_time import Simulation, Tally
from placement.table import ExpertPlacement
from placement.topology import Topology
from placement.trace import Trace
from placement.traffic import check_mode, expected_sends, sends_of_tokens, sources_of

TOKENS_AT_ONCE = 65536
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Planner = Callable[[torch.Tensor, torch.Tensor], Any]  # counts_RE, home_E -> a dispatch plan


def simulate_trace(
    placement: ExpertPlacement,
    trace: Trace,
    topology: Topology,
    planner: Planner,
    *,
    micro_batch: int,
    micro_batches: int = 1,
    two_level: bool = False,
    shape: ExpertShape | None = None,
) -> Simulation:
    """Simulate training on a trace, exact to the row.

    Args:
        planner: as in training; one that remembers is asked layer by layer and step by step.
        micro_batch: tokens per rank and forward pass; each rank takes its own in order. The last
            ones of a rank may be fewer.
        micro_batches: per optimizer step; the last step may have fewer.
        two_level: tokens cross to a node once and are handed on there.
        shape: of an expert; default that of Qwen3-30B-A3B.

    Raises:
        ValueError: for a trace, placement and topology that do not fit each other, an empty
            trace, and sizes below 1.
    """
    _check(placement, topology, two_level, micro_batch, micro_batches)
    if (trace.num_layers, trace.num_experts) != (placement.num_layers, placement.num_experts):
        raise ValueError(
            f"the trace is of {trace.num_layers} MoE layers x {trace.num_experts} experts, the "
            f"placement has {placement.num_layers} x {placement.num_experts}"
        )
    if not trace.num_tokens:
        raise ValueError("the trace has no tokens; record at least one micro-batch")
    tally = Tally(placement.num_layers, topology, shape or ExpertShape(), two_level)
    planners = _by_layer(planner, placement.num_layers)
    sources = sources_of(trace, topology.num_ranks)
    for step in _grouped(_micro_batches(sources, micro_batch), micro_batches):
        counts_LRE: list[list[torch.Tensor]] = [[] for _ in planners]
        for tokens in step:
            for layer, plan_layer in enumerate(planners):
                ids_TK, home_E = trace.ids_TLK[tokens, layer], placement.home_LE[layer]
                counts_RE = _traced(tally, layer, plan_layer, ids_TK, sources[tokens], home_E)
                counts_LRE[layer].append(counts_RE)
        tally.end_step(sum(len(tokens) for tokens in step))
        _learn(planners, counts_LRE)
    return tally.mean()


def simulate_stats(
    placement: ExpertPlacement,
    stats: RoutingStats,
    topology: Topology,
    planner: Planner,
    *,
    micro_batch: int,
    micro_batches: int = 1,
    two_level: bool = False,
    shape: ExpertShape | None = None,
) -> Simulation:
    """Simulate one step whose micro-batches all have the mean counts of the statistics.

    Counts are planned rounded to whole rows; copies are expected as in `traffic.sends_of_stats`,
    where split experts give each rank its share of every pair. Fluctuation between micro-batches
    is not in it, so load ratios are lower than those of a trace. A planner that remembers has
    seen one step before. Arguments and errors as `simulate_trace`.
    """
    _check(placement, topology, two_level, micro_batch, micro_batches)
    stats.check_model(placement.num_layers, placement.num_experts)
    if not stats.tokens:
        raise ValueError("the statistics are of no tokens; record at least one micro-batch")
    num_ranks = topology.num_ranks
    tally = Tally(placement.num_layers, topology, shape or ExpertShape(), two_level)
    planners = _by_layer(planner, placement.num_layers)
    scale = micro_batch * num_ranks / stats.tokens
    if stats.num_ranks != num_ranks:
        stats = stats.with_sources(num_ranks)
    rows_LRE = stats.source_LRE.numpy() * scale
    counts_LRE = [torch.from_numpy(np.rint(rows_RE).astype(np.int64)) for rows_RE in rows_LRE]
    if hasattr(planner, "next_step"):
        for counts_RE, home_E, plan_layer in zip(
            counts_LRE, placement.home_LE, planners, strict=True
        ):
            plan_layer(counts_RE, home_E)
        _learn(planners, [[counts_RE] * micro_batches for counts_RE in counts_LRE])
    for _ in range(micro_batches):
        for layer, plan_layer in enumerate(planners):
            home_E = placement.home_LE[layer]
            plan = plan_layer(counts_LRE[layer], home_E)
            load_E = rows_LRE[layer].sum(0)
            rows_RR, rows_ER = expected_rows(plan, rows_LRE[layer], counts_LRE[layer], home_E)
            share_ER = rows_ER / np.maximum(load_E, 1e-300)[:, None]
            coactive_EE = stats.coactive_LEE[layer].numpy() * scale
            sends_RR = expected_sends(
                rows_RR,
                coactive_EE,
                share_ER,
                rows_LRE[layer].sum(1) / stats.rows_per_token_L[layer],
                max(1, stats.top_k),
                topology,
                two_level,
            )
            tally.add(layer, plan, rows_RR, sends_RR, _at_home(load_E, home_E, num_ranks))
    tally.end_step(micro_batch * micro_batches * num_ranks)
    return tally.mean()


def _check(
    placement: ExpertPlacement,
    topology: Topology,
    two_level: bool,
    micro_batch: int,
    micro_batches: int,
) -> None:
    check_mode("home", topology, two_level)
    check_fit(placement, topology)
    for name, size in (("micro_batch", micro_batch), ("micro_batches", micro_batches)):
        if size < 1:
            raise ValueError(f"{name} ({size}) must be >= 1")


def _by_layer(planner: Planner, num_layers: int) -> list[Planner]:
    """A planner for every layer: independent ones if it remembers."""
    if not hasattr(planner, "next_step"):
        return [planner] * num_layers
    planners = [planner.for_layer(layer) for layer in range(num_layers)]  # type: ignore[attr-defined]
    _learn(planners, [[] for _ in planners])
    return planners


def _learn(planners: Sequence[Any], counts_LRE: Sequence[Sequence[torch.Tensor]]) -> None:
    """A new step begins: planners that remember are told about the one before."""
    for planner, counts in zip(planners, counts_LRE, strict=True):
        if hasattr(planner, "next_step"):
            planner.next_step(counts)


def _micro_batches(source_T: Ints, size: int) -> list[Ints]:
    """Tokens of every micro-batch, ascending: of each rank its next `size` ones."""
    order_T = np.argsort(source_T, kind="stable")
    starts_R = np.searchsorted(source_T[order_T], np.arange(source_T.max() + 2))
    place_T = np.empty_like(order_T)
    place_T[order_T] = np.arange(len(order_T)) - np.repeat(starts_R[:-1], np.diff(starts_R))
    batch_T = place_T // size
    return [np.flatnonzero(batch_T == batch) for batch in range(batch_T.max() + 1)]


def _grouped(batches: list[Ints], number: int) -> Iterator[list[Ints]]:
    for start in range(0, len(batches), number):
        yield batches[start : start + number]


def _traced(
    tally: Tally,
    layer: int,
    planner: Planner,
    ids_TK: npt.NDArray[np.integer],
    source_T: Ints,
    home_E: torch.Tensor,
) -> torch.Tensor:
    """Plan one layer of one micro-batch and follow every row; returns the counts [R, E]."""
    num_experts, num_ranks = len(home_E), tally.topology.num_ranks
    token_N, choice_N = np.nonzero(ids_TK < num_experts)
    expert_N, source_N = ids_TK[token_N, choice_N].astype(np.int64), source_T[token_N]
    counts_RE = np.bincount(source_N * num_experts + expert_N, minlength=num_ranks * num_experts)
    counts = torch.from_numpy(counts_RE.reshape(num_ranks, num_experts))
    plan = planner(counts, home_E)
    # segments are sorted by expert and source, and take rows in token order
    in_plan_N = np.argsort(expert_N * num_ranks + source_N, kind="stable")
    computing_N = np.empty_like(expert_N)
    computing_N[in_plan_N] = np.repeat(plan.rows[:, 2].numpy(), plan.rows[:, 3].numpy())
    pairs = np.bincount(source_N * num_ranks + computing_N, minlength=num_ranks**2)
    sends_RR = np.zeros((num_ranks, num_ranks))
    for start in range(0, len(source_T), TOKENS_AT_ONCE):
        first, last = np.searchsorted(token_N, (start, start + TOKENS_AT_ONCE))
        at_T = source_T[start : start + TOKENS_AT_ONCE]
        present_TR = np.zeros((len(at_T), num_ranks), dtype=bool)
        present_TR[token_N[first:last] - start, computing_N[first:last]] = True
        sends_RR += sends_of_tokens(at_T, present_TR, tally.topology, tally.two_level)
    rows_RR = pairs.reshape(num_ranks, num_ranks).astype(np.float64)
    load_home_R = _at_home(counts.sum(0).numpy(), home_E, num_ranks)
    tally.add(layer, plan, rows_RR, sends_RR, load_home_R)
    return counts


def expected_rows(
    plan: Any, rows_RE: Floats, counts_RE: torch.Tensor, home_E: torch.Tensor
) -> tuple[Floats, Floats]:
    """Where expected rows are computed if a plan for their rounded counts is followed in parts.

    Args:
        plan: for `counts_RE`, which are `rows_RE` in whole rows.

    Returns:
        Rows by source and computing rank [R, R], and by expert and computing rank [E, R].
    """
    num_ranks, num_experts = rows_RE.shape
    counts = counts_RE.numpy()
    source_M, expert_M = np.nonzero(counts == 0)  # less than half a row stays at home
    computing_M = home_E.numpy()[expert_M]
    expert_N, source_N, computing_N, planned_N = plan.rows.numpy().T
    rows_N = rows_RE[source_N, expert_N] * planned_N / counts[source_N, expert_N]
    rows_N = np.concatenate([rows_N, rows_RE[source_M, expert_M]])
    expert_N, source_N = np.append(expert_N, expert_M), np.append(source_N, source_M)
    computing_N = np.append(computing_N, computing_M)
    rows_RR = np.bincount(source_N * num_ranks + computing_N, rows_N, num_ranks**2)
    rows_ER = np.bincount(expert_N * num_ranks + computing_N, rows_N, num_experts * num_ranks)
    return (
        rows_RR.reshape(num_ranks, -1).astype(np.float64),
        rows_ER.reshape(num_experts, -1).astype(np.float64),
    )


def _at_home(load_E: npt.NDArray, home_E: torch.Tensor, num_ranks: int) -> Floats:
    load_R = np.zeros(num_ranks)
    np.add.at(load_R, home_E.numpy(), load_E)
    return load_R
