"""Does upcycling pay? A dense model, then every way to go on from it at equal cost.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.upcycling --json FILE --plot docs/upcycling.png

For every seed a dense byte model is trained on the standard library, converted by every recipe, and
each way to go on gets as many operations as the dense training took, on the same text in the same
order: dense continuation, the recipes that take one dense model, an MoE of the size of `copy` from
scratch. All train by one plain loop around `transformers` models, learning rate back to its peak
and down again unless said otherwise. `--from FILE ...` prints the table of runs made before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from configs.compose import load, load_upcycle
from parallel.memory import keep_freed_memory
from trainer.data import build_data
from trainer.data.packing import IGNORED, PackedDataset
from trainer.metrics import model_flops_per_token, parameter_counts
from trainer.upcycle.convert import convert
from trainer.upcycle.plan import make_plan

SEQ_LEN, BATCH, EVAL_BATCHES, EVALS = 128, 16, 6, 10
PEAK_LR, MIN_RATIO, WARM_UP, WEIGHT_DECAY = 4e-3, 0.1, 20, 0.1
AUX = 0.01  # of the load-balancing loss
DENSE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
# name -> overrides of the conversion, and the first learning rate as a share of the peak
RECIPES: dict[str, tuple[list[str], float]] = {
    "copy": (["recipe=copy"], 1.0),
    "copy, learning rate goes on": (["recipe=copy"], MIN_RATIO),
    "split": (["recipe=split", "recipe.num_experts=32", "recipe.granularity=4"], 1.0),
    "drop": (["recipe=drop"], 1.0),
    "shared": (
        ["recipe=shared", "target=glm4_moe", "routing=sigmoid"], 1.0
    ),
    "carve": (["recipe=carve", "recipe.num_experts=8", "recipe.top_k=4"], 1.0),
}  # fmt: skip


@dataclass
class Arm:
    """One way to go on: sizes, and validation loss (nats per byte) by operations and tokens."""

    name: str
    seed: int
    parameters: int
    active: int
    flops: list[float]
    tokens: list[int]
    loss: list[float]
    seconds: float


def train(
    name: str, seed: int, model: Any, data: tuple[PackedDataset, PackedDataset], flops: float,
    *, first_lr: float = 1.0, skip: int = 0,
) -> Arm:  # fmt: skip
    """Train in place with so many operations; sequences in an order that the seed gives.

    Args:
        first_lr: share of the peak to begin at; below 1 it stays there. skip: batches of the order
            that were trained on before.
    """
    per_token = model_flops_per_token(model, SEQ_LEN)
    steps = max(1, round(flops / per_token / (BATCH * SEQ_LEN)))
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": WEIGHT_DECAY},
        {"params": others},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)
    total, active = parameter_counts(model)
    arm = Arm(name, seed, total, active, [], [], [], 0.0)
    started = time.process_time()
    batches = order(data[0], seed, skip)
    model.train()
    for step in range(steps):
        if step % max(1, steps // EVALS) == 0:
            note(arm, model, data[1], step, per_token)
        share = first_lr
        if first_lr == 1.0:
            cosine = 0.5 * (1 + np.cos(np.pi * step / steps))
            share = min(1.0, (step + 1) / WARM_UP) * (MIN_RATIO + (1 - MIN_RATIO) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * share
        batch = data[0].batch(next(batches))
        loss, aux = losses(model, batch)
        (loss + AUX * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    note(arm, model, data[1], steps, per_token)
    arm.seconds = time.process_time() - started
    return arm


def order(dataset: PackedDataset, seed: int, skip: int) -> Iterator[list[int]]:
    """Batches of sequence ids, epoch after epoch, from the one numbered `skip` on."""
    generator = np.random.default_rng(seed)
    number = 0
    while True:
        ids = generator.permutation(len(dataset)).tolist()
        for first in range(0, len(ids) - BATCH + 1, BATCH):
            if number >= skip:
                yield ids[first : first + BATCH]
            number += 1


def losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the next byte, and of balance."""
    routed = hasattr(model.config, "num_experts_per_tok")
    more = {"output_router_logits": True} if routed else {}
    made = model(batch["input_ids"], **more)
    loss = F.cross_entropy(
        made.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED
    )
    scores = getattr(made, "router_logits", None)
    return loss, balance(model, scores) if scores else loss.new_zeros(())


def balance(model: Any, scores: Any) -> torch.Tensor:
    """The load-balancing loss over all layers (arXiv:2101.03961), for any routing."""
    experts = scores[0].shape[-1]
    stacked = torch.cat([layer.reshape(-1, experts) for layer in scores]).float()
    chosen = stacked.topk(model.config.num_experts_per_tok).indices
    share = F.one_hot(chosen, experts).float().sum(1).mean(0) / chosen.shape[1]
    return experts * (share * stacked.softmax(-1).mean(0)).sum()


@torch.no_grad()
def note(arm: Arm, model: Any, validation: PackedDataset, step: int, per_token: float) -> None:
    """Validate and add a point."""
    model.eval()
    ids = np.random.default_rng(0).permutation(len(validation))[: EVAL_BATCHES * BATCH].tolist()
    parts = [ids[first : first + BATCH] for first in range(0, len(ids), BATCH)]
    arm.loss.append(mean(float(losses(model, validation.batch(part))[0]) for part in parts))
    arm.tokens.append(step * BATCH * SEQ_LEN)
    arm.flops.append(step * BATCH * SEQ_LEN * per_token)
    model.train()


def one_seed(seed: int, steps: int, folder: Path, progress: Progress) -> list[Arm]:
    """All ways to go on from one dense model."""
    config = load(
        "experiment=quickstart",
        f"train.seq_len={SEQ_LEN}",
        "data.pack.reset_positions=false",
        f"data.cache_dir={folder / 'data'}",
    )
    built = build_data(config.data, SEQ_LEN)
    assert built.validation is not None
    data = built.train, built.validation
    task = progress.add_task(f"seed {seed}", total=len(RECIPES) + 4)
    torch.manual_seed(seed)
    dense: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **DENSE))
    budget = model_flops_per_token(dense, SEQ_LEN) * steps * BATCH * SEQ_LEN
    arms = [train("dense", seed, dense, data, budget)]
    progress.advance(task)
    source = folder / f"dense-{seed}"
    dense.save_pretrained(source)
    goes_on: dict[str, Any] = {"first_lr": MIN_RATIO, "skip": steps}
    for name, options in (
        ("dense continued", {"skip": steps}),  # the rate back to its peak
        ("dense continued, learning rate goes on", goes_on),
    ):
        again = AutoModelForCausalLM.from_pretrained(source)
        arms.append(train(name, seed, again, data, budget, **options))
        progress.advance(task)
    for name, (overrides, first_lr) in RECIPES.items():
        target = folder / f"moe-{seed}-{len(arms)}"
        values = [f"source={source}", f"target_dir={target}", f"seed={seed}", *overrides]
        convert(make_plan(load_upcycle(*values)))
        moe: Any = AutoModelForCausalLM.from_pretrained(target)
        arms.append(train(name, seed, moe, data, budget, first_lr=first_lr, skip=steps))
        if name == "copy":
            torch.manual_seed(seed)
            scratch = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
            arms.append(train("MoE from scratch", seed, scratch, data, budget, skip=steps))
            progress.advance(task)
        progress.advance(task)
    return arms


def table_of(arms: list[Arm]) -> Table:
    """Means over seeds, and how soon every way is where dense continuation ends."""
    names = list(dict.fromkeys(arm.name for arm in arms))
    table = Table(title="validation loss, nats per byte; equal operations after `dense`")
    for column in ("", "parameters", "active", "tokens", "first", "last", "+-",
                   "of the cost of dense continued", "CPU s"):  # fmt: skip
        table.add_column(column, justify="left" if not column else "right")
    goal = {arm.seed: arm.loss[-1] for arm in arms if arm.name == "dense continued"}
    for name in names:
        own = [arm for arm in arms if arm.name == name]
        last = [arm.loss[-1] for arm in own]
        reached = [reach(arm, goal[arm.seed]) for arm in own] if name != "dense" else []
        known = [share for share in reached if share is not None]
        table.add_row(
            name,
            f"{own[0].parameters:,}",
            f"{own[0].active:,}",
            f"{own[0].tokens[-1]:,}",
            f"{mean(arm.loss[0] for arm in own):.4f}",
            f"{mean(last):.4f}",
            f"{stdev(last):.4f}" if len(last) > 1 else "",
            f"{mean(known):.0%}"
            if known and len(known) == len(own)
            else "never"
            if reached
            else "",
            f"{mean(arm.seconds for arm in own):.0f}",
        )
    return table


def reach(arm: Arm, goal: float) -> float | None:
    """The share of its operations after which a way is at a loss, between points by a line."""
    for number, loss in enumerate(arm.loss):
        if loss <= goal:
            if number == 0:
                return 0.0
            before, here = arm.flops[number - 1], arm.flops[number]
            part = (arm.loss[number - 1] - goal) / (arm.loss[number - 1] - loss)
            return (before + part * (here - before)) / arm.flops[-1]
    return None


def plot(arms: list[Arm], path: Path) -> None:
    """Validation loss against operations, means over seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    start = next(arm.flops[-1] for arm in arms if arm.name == "dense")
    for name in dict.fromkeys(arm.name for arm in arms):
        own = [arm for arm in arms if arm.name == name]
        offset = 0.0 if name == "dense" else start
        flops = [(value + offset) / 1e12 for value in own[0].flops]
        curve = np.mean([arm.loss for arm in own], axis=0)
        style = "--" if "goes on" in name else "-"
        axis.plot(flops, curve, style, label=name, color="black" if name == "dense" else None)
    axis.set_xlabel("operations (10^12)")
    axis.set_ylabel("validation loss (nats per byte)")
    axis.set_ylim(1.55, 2.6)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="of the dense model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from", dest="files", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    console = Console(width=130)
    arms = [Arm(**arm) for file in options.files for arm in json.loads(file.read_text())]
    if not options.files:
        keep_freed_memory()
        with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
            for seed in options.seeds:
                arms += one_seed(seed, options.steps, Path(folder), progress)
                if options.json:
                    options.json.write_text(json.dumps([asdict(arm) for arm in arms]) + "\n")
    console.print(table_of(arms))
    if options.plot:
        plot(arms, options.plot)


if __name__ == "__main__":
    main()
