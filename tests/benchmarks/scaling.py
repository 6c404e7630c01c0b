"""The tables of docs/scaling.md: four models on 8 to 4096 GPUs, from nominal figures.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.scaling [--json FILE]

Nothing runs on a GPU: `launch.sizing` counts memory and adds up seconds. H100 nodes of eight, bf16,
4096 sequences of 4096 tokens in a step, Quota.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.compose import load_sizing
from configs.sizing_schema import check_sizing
from launch.sizing.command import sizing_of
from launch.sizing.memory import Engine
from launch.sizing.meshes import GIB, Choice, Sizing
from launch.sizing.table import record

MODELS = ["qwen3_30b_a3b", "gpt_oss_120b", "glm_4_5", "deepseek_v3"]
GPUS = [8, 64, 512, 4096]
ENGINES = [engine for engine in Engine if engine is not Engine.zero1]


def planned(model: str, gpus: int) -> tuple[Sizing, list[Choice]]:
    overrides = [f"model={model}", "cluster=h100_8x8", f"cluster.num_nodes={gpus // 8}"]
    config = load_sizing(*overrides)
    check_sizing(config)
    sizing = sizing_of(config)
    return sizing, sizing.choices()


def best_row(model: str, gpus: int, choices: list[Choice]) -> str:
    best = choices[0]
    if best.step is None:
        return (
            f"| {model} | {gpus} | nothing fits: {best.engine.value} EP {best.mesh.ep} needs "
            f"{best.memory.total / GIB:.0f} GiB, most of it {best.memory.largest} | | | | |"
        )
    share = " / ".join(f"{one:.2f}" for one in best.utilisation)
    how = "full" if best.recompute else "none"
    return (
        f"| {model} | {gpus} | {best.engine.value} | {best.mesh.ep} x {best.mesh.edp} | "
        f"{best.sequences} x {best.micro_batches}, {how} | {best.memory.total / GIB:.1f} | "
        f"{best.step.slowest:.1f} / {best.step.fastest:.1f}, {share} |"
    )


def parts_row(model: str, gpus: int, best: Choice, sizing: Sizing) -> str:
    assert best.step is not None
    sizes = " | ".join(f"{size / GIB:.1f}" for size in asdict(best.memory).values())
    parts = asdict(best.step)
    seconds = " | ".join(f"{parts[name]:.2f}" for name in parts)
    times = best.micro_batches * sizing.model.num_moe
    links = [times * size / 1e9 for size in (best.layer.bytes_intra, best.layer.bytes_inter)]
    sent = " / ".join(f"{size:.0f}" for size in links)
    return f"| {model} | {gpus} | {sizes} | {seconds} | {sent} |"


def fits_row(model: str, choices: dict[int, list[Choice]]) -> str:
    """Of every engine: the fewest of the GPUs with which some mesh fits."""
    cells = []
    for engine in ENGINES:
        fitting = [g for g, of in choices.items() if any(c.fits and c.engine is engine for c in of)]
        if fitting:
            cells.append(str(min(fitting)))
        else:
            tried = [c for of in choices.values() for c in of if c.engine is engine]
            least = min(tried, key=lambda c: c.memory.total)
            cells.append(f"none ({least.memory.total / GIB:.0f} GiB: {least.memory.largest})")
    return f"| {model} | {' | '.join(cells)} |"


def by_ep(sizing: Sizing, choices: list[Choice]) -> list[str]:
    """How the cost of a layer grows with EP, at one sequence."""
    lines = []
    for ep in sizing.fitting_ep():
        mesh = next(c.mesh for c in choices if c.mesh.ep == ep)
        layer = sizing.layer(mesh, 1)
        lines.append(
            f"| {ep} | {layer.products_s * 1e3:.2f} | {layer.exchange_s * 1e3:.2f} | "
            f"{layer.borrow_s * 1e3:.2f} | {layer.plan_s * 1e3:.2f} | {layer.borrowed} | "
            f"{layer.bytes_intra / 1e6:.0f} / {layer.bytes_inter / 1e6:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write every choice to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[int, tuple[Sizing, list[Choice]]]] = {
        model: {gpus: planned(model, gpus) for gpus in GPUS} for model in MODELS
    }
    print("| model | GPUs | engine | EP x EDP | micro-batch, recompute | GiB | step, s; use |")
    print("|---" * 7 + "|")
    for model, of in found.items():
        for gpus, (_, choices) in of.items():
            print(best_row(model, gpus, choices))
    best = next(of[gpus] for of in found.values() for gpus in GPUS if of[gpus][1][0].fits)[1][0]
    assert best.step is not None
    names = [*asdict(best.memory), *asdict(best.step)]
    print(f"\n| model | GPUs | {' | '.join(names)} | GB sent: in nodes / across |")
    print("|---" * (len(names) + 3) + "|")
    for model, of in found.items():
        for gpus, (sizing, choices) in of.items():
            if choices[0].fits:
                print(parts_row(model, gpus, choices[0], sizing))
    print(f"\n| fewest GPUs | {' | '.join(engine.value for engine in ENGINES)} |")
    print("|---" * (len(ENGINES) + 1) + "|")
    for model, of in found.items():
        print(fits_row(model, {gpus: choices for gpus, (_, choices) in of.items()}))
    for model in ("qwen3_30b_a3b", "deepseek_v3"):
        print(f"\n| {model}: EP | products, ms | exchange | borrow | plan | borrowed | MB sent |")
        print("|---" * 7 + "|")
        print("\n".join(by_ep(*found[model][512])))
    if arguments.json:
        content: dict[str, Any] = {
            model: {gpus: [record(c) for c in choices] for gpus, (_, choices) in of.items()}
            for model, of in found.items()
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
