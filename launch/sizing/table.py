"""What a plan found, as a table for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.sizing.meshes import GIB, Choice, Given, Sizing

COLUMNS = ("engine", "EP x EDP", "recompute", "micro-batch", "GiB", "step, s", "utilisation")


def show(sizing: Sizing, choices: Sequence[Choice], rows: int, console: Console) -> None:
    """Print the model, the best choices, the recommended one, and why others do not fit."""
    model, given = sizing.model, sizing.given
    fitting = [choice for choice in choices if choice.fits]
    tokens = given.batch_size * given.seq_len
    console.print(
        f"{model.parameters / 1e9:.1f}B parameters, {model.active / 1e9:.1f}B active; "
        f"{given.num_ranks} GPUs of {given.memory_gib:g} GiB, "
        f"{given.budget / GIB:.1f} of them to plan with; {tokens / 1e6:.2f}M tokens per step",
        highlight=False,
        soft_wrap=True,
    )
    if fitting:
        table = Table(*COLUMNS, title="what fits, fastest first")
        for choice in fitting[: rows or None]:
            table.add_row(*_cells(choice))
        console.print(table)
        best = fitting[0]
        for line in (
            "two figures: if nothing overlaps, and if all journeys and products do. Estimates from "
            f"nominal speeds; assumed, not measured: products at {given.compute_share:g} of the "
            f"peak, routing of skew {given.skew:g}. The planner is timed on this machine.",
            f"recommended: {best.overrides}",
            f"its memory, GiB: {memory_text(best)}",
            f"its step, s: {step_text(best)}",
            links_text(best, sizing),
        ):
            console.print(line, highlight=False, soft_wrap=True)
    else:
        console.print("nothing fits")
    refused = [choice for choice in choices if not choice.fits]
    if refused:
        console.print(why_not(refused, given), highlight=False, soft_wrap=True)


def _cells(choice: Choice) -> list[str]:
    assert choice.step is not None
    return [
        choice.engine.value,
        f"{choice.mesh.ep} x {choice.mesh.edp}",
        "full" if choice.recompute else "none",
        f"{choice.sequences} x {choice.micro_batches}",
        f"{choice.memory.total / GIB:.1f}",
        f"{choice.step.slowest:.2f} / {choice.step.fastest:.2f}",
        " / ".join(f"{share:.2f}" for share in choice.utilisation),
    ]


def step_text(choice: Choice) -> str:
    """The parts of a choice's step in seconds, and tokens per second."""
    assert choice.step is not None
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in asdict(choice.step).items())
    least, most = choice.tokens_per_s
    return f"{parts}; {least:.0f} / {most:.0f} tokens/s per GPU"


def memory_text(choice: Choice) -> str:
    """The parts of a choice's memory, in GiB."""
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in asdict(choice.memory).items())


def links_text(choice: Choice, sizing: Sizing) -> str:
    """Bytes that the mean rank sends for the MoE layers of a step, by link."""
    times = choice.micro_batches * sizing.model.num_moe
    intra, inter = (
        times * size / 1e9 for size in (choice.layer.bytes_intra, choice.layer.bytes_inter)
    )
    again = " (recomputed layers send their tokens once more)" if choice.recompute else ""
    return (
        f"sent per rank and step for tokens and experts: {intra:.1f} GB within nodes, {inter:.1f} "
        f"GB across{again}; load ratio {choice.layer.load_ratio:.2f}, at most "
        f"{choice.layer.borrowed} experts borrowed per rank and layer"
    )


def why_not(refused: Sequence[Choice], given: Given) -> str:
    """For every engine and kind of recomputation the choice nearest to fitting, and what is too
    much in it."""
    nearest: dict[tuple[str, bool], Choice] = {}
    for choice in sorted(refused, key=lambda c: c.memory.total):
        nearest.setdefault((choice.engine.value, choice.recompute), choice)
    lines = [f"does not fit into {given.budget / GIB:.1f} GiB even with one sequence at a time:"]
    for (engine, recompute), choice in nearest.items():
        how = "full" if recompute else "none"
        sizes = sorted(c.mesh.ep for c in refused if (c.engine, c.recompute) == key_of(choice))
        lines.append(
            f"  {engine}, recompute {how}: EP {', '.join(map(str, sizes))}; the least, EP "
            f"{choice.mesh.ep}, takes {choice.memory.total / GIB:.1f} GiB, most of it "
            f"{choice.memory.largest}"
        )
    return "\n".join(lines)


def key_of(choice: Choice) -> tuple[Any, bool]:
    return choice.engine, choice.recompute


def record(choice: Choice) -> dict[str, Any]:
    """All numbers of a choice: bytes and seconds."""
    return {
        **asdict(choice),
        "engine": choice.engine.value,
        "fits": choice.fits,
        "overrides": choice.overrides,
        "memory": {**asdict(choice.memory), "total": choice.memory.total},
    }


def write_json(path: Path, sizing: Sizing, choices: Sequence[Choice]) -> None:
    """Every choice, fastest first."""
    content = {
        "parameters": sizing.model.parameters,
        "active": sizing.model.active,
        "budget": sizing.given.budget,
        "choices": [record(choice) for choice in choices],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
