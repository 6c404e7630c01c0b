"""Compare runs: `python -m trainer.compare [--json FILE] [--plot FILE] FOLDER ... | -m OVERRIDES`.

Of finished runs, or of a sweep that is trained first and goes on with what is missing when it is
started again:

    torchrun --nproc-per-node 2 -m trainer.compare --plot balancing.png -m experiment=quickstart \\
        model=tiny_sigmoid checkpoint.export=false balance=none,loss_free,aux_loss seed=0,1,2
    python -m trainer.compare runs/balancing runs/routers

Runs that differ in the seed alone are one choice: means, and the standard deviation of the
validation loss. Figures of training are means over the last fifth of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Column, Table

from trainer.page.history import NAME, read_history
from trainer.train import main as train

# keys that set no choice apart
APART = ("seed", "router.seed", "run", "logger", "data.cache_dir", "checkpoint.export_dir")
LAST = 5  # 1/5 of the steps
ALIKE = ("train.steps", "train.batch_size", "train.seq_len", "data", "model.source", "optim.lr")
COLUMNS = {
    "loss": ("loss", "{:.4f}"),
    "+-": ("spread", "{:.4f}"),
    "MaxVio": ("max_violation", "{:.3f}"),
    "trained": ("max_violation_trained", "{:.3f}"),
    "micro": ("max_violation_micro", "{:.3f}"),
    "ratio home": ("load_ratio_home", "{:.3f}"),
    "planned": ("load_ratio", "{:.3f}"),
    "dead": ("dead_experts", "{:.1f}"),
    "change": ("routing_change", "{:.1%}"),
    "affinity": ("affinity", "{:.3f}"),
    "rows/token": ("rows_per_token", "{:.2f}"),
    "dropped": ("dropped", "{:.1%}"),
    "MB sent": ("megabytes", "{:.1f}"),
    "tokens/s": ("tokens_per_s", "{:,.0f}"),
}


@dataclass(frozen=True)
class Figures:
    """Of one choice, means over its seeds.

    Attributes:
        loss, spread: validation loss in nats per token, and its deviation over the seeds.
        max_violation: max/mean - 1 rows per expert over the validation tokens;
            max_violation_trained: over all rows of the last logged steps of training, summed;
            max_violation_micro: over micro-batches of training, their mean.
        load_ratio_home, load_ratio: of ranks, before and after planning.
        routing_change: share of the validation tokens' choices that the last two validations do
            not have in common. affinity: share of validation pairs of experts in successive layers
            that the most frequent successors have; 1/E where layers tell nothing of each other.
        rows_per_token: of a layer, in training. dropped: share of choices without room, of routers
            with a capacity.
        megabytes: of tokens and their outputs between ranks per step, forward pass.
    """

    choice: str
    seeds: int
    loss: float
    spread: float | None
    max_violation: float | None
    max_violation_trained: float | None
    max_violation_micro: float
    load_ratio_home: float
    load_ratio: float
    dead_experts: float | None
    routing_change: float | None
    affinity: float | None
    rows_per_token: float
    dropped: float | None
    megabytes: float
    tokens_per_s: float


def main() -> None:
    arguments = sys.argv[1:]
    swept = arguments.index("-m") if "-m" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m trainer.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", type=Path, help="with runs at or below them")
    parser.add_argument("--json", type=Path, help="write the figures, a line per choice")
    parser.add_argument("--plot", type=Path, help="validation loss against MaxVio, as a picture")
    parser.add_argument(
        "-m",
        dest="sweep",
        metavar="OVERRIDES",
        help="train a sweep first, as trainer.train -m does",
    )
    options = parser.parse_args(arguments[:swept])
    folders = options.folders
    if swept < len(arguments):
        sys.argv = ["trainer.train", *arguments[swept:]]
        folders = [*folders, *train()]
        if int(os.environ.get("RANK", "0")):
            return
    elif not folders:
        parser.error("give folders of runs, or -m and the overrides of a sweep")
    try:
        figures = compare(folders)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    Console(width=max(200, Console().width)).print(table_of(figures))
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(one)) + "\n" for one in figures))
    if options.plot:
        plot(figures, options.plot)


def compare(folders: Sequence[Path]) -> list[Figures]:
    """The figures of all choices, best validation loss first.

    Raises:
        ValueError: for folders without finished runs, and for runs that cannot be compared.
    """
    runs: list[Path] = []
    for folder in folders:
        found = sorted(path.parent for path in folder.glob("**/summary.json"))
        if not found:
            raise ValueError(f"{folder} has no finished run (a folder with summary.json)")
        for started in folder.glob("**/metrics.jsonl"):
            if started.parent not in found:
                print(f"left out, not finished: {started.parent}", file=sys.stderr)
        runs += found
    for run in runs:
        _check_validated(run)
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    _check_alike(runs, configs)
    by_choice: dict[str, list[Path]] = defaultdict(list)
    for run, name in zip(runs, choices(configs), strict=True):
        by_choice[name].append(run)
    return sorted((of_choice(*each) for each in by_choice.items()), key=lambda one: one.loss)


def choices(configs: Sequence[dict[str, Any]]) -> list[str]:
    """What sets every configuration apart from the others, seed and folders aside.

    Of a slot that others have not, its name; of its values, those in which runs with that slot
    differ.
    """
    leaves = [dict(_leaves(config)) for config in configs]
    slots = [
        {key: value for key, value in of.items() if key.endswith("._target_")} for of in leaves
    ]
    names = []
    for own, targets in zip(leaves, slots, strict=True):
        parts = []
        for key, value in own.items():
            slot = _slot_of(key, targets)
            alike = [
                other
                for other, theirs in zip(leaves, slots, strict=True)
                if key.endswith("._target_") or slot is None or theirs.get(slot) == targets[slot]
            ]
            if any(other.get(key) != value for other in alike):
                parts.append(_named(key, value))
        names.append(", ".join(parts) or "all alike")
    return names


def _leaves(node: dict[str, Any], stem: str = "") -> Iterator[tuple[str, str]]:
    """Full key and value of all that may set runs apart."""
    for name, value in node.items():
        key = f"{stem}.{name}" if stem else name
        if key in APART:
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, key)
        else:
            yield key, str(value)


def _slot_of(key: str, targets: dict[str, str]) -> str | None:
    """The `_target_` key of the innermost slot that a key belongs to."""
    stem = key
    while stem:
        if f"{stem}._target_" in targets:
            return f"{stem}._target_"
        stem = stem.rpartition(".")[0]
    return None


def _named(key: str, value: str) -> str:
    """`balance=loss_free` of balance.loss_free._target_, `router=Switch` of router._target_."""
    if not key.endswith("._target_"):
        return f"{key}={'none' if value == '{}' else value}"
    slot = key.removesuffix("._target_")
    group, _, name = slot.rpartition(".")
    return f"{group}={name}" if group else f"{slot}={value.rpartition('.')[2]}"


def _check_validated(run: Path) -> None:
    """Refuse a run without validation.

    Raises:
        ValueError: naming it.
    """
    if "validation/loss" not in json.loads((run / "summary.json").read_text()).get(
        "validation", {}
    ):
        raise ValueError(
            f"{run} has no validation loss; train with data.validation_fraction > 0 and a version "
            f"that writes `validation` to summary.json"
        )


def _check_alike(runs: Sequence[Path], configs: Sequence[dict[str, Any]]) -> None:
    """Refuse runs on other data or of another length.

    Raises:
        ValueError: naming the key and two runs.
    """
    for key in ALIKE:
        values = [_value(config, key) for config in configs]
        for run, value in zip(runs, values, strict=True):
            if value != values[0]:
                raise ValueError(
                    f"{run} and {runs[0]} differ in {key} ({value} and {values[0]}) and cannot be "
                    f"compared; give folders of runs that are alike in it"
                )


def _value(config: dict[str, Any], key: str) -> Any:
    """A value of a configuration by its full key; of `data` all that decides what is read."""
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return {k: v for k, v in value.items() if k != "cache_dir"} if key == "data" else value


def of_choice(name: str, runs: Sequence[Path]) -> Figures:
    """Means over the runs of one choice, its seeds."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs]
    ends = [json.loads((run / "summary.json").read_text())["validation"] for run in runs]

    def last(key: str) -> float | None:
        """Of the last validation, mean over the runs that have it."""
        known = [end[key] for end in ends if key in end]
        return mean(known) if known else None

    def late(*keys: str) -> float:
        """Sum of some metrics over the last steps, mean over steps and runs."""
        newest = [own[-max(1, len(own) // LAST) :] for own in lines]
        return mean(mean(sum(line[key] for key in keys) for line in some) for some in newest)

    losses = [end["validation/loss"] for end in ends]
    trained = [trained_violation(run / NAME) for run in runs if (run / NAME).exists()]
    layers = sum(key.startswith("layer/") for key in lines[0][-1])
    return Figures(
        name,
        len(runs),
        mean(losses),
        stdev(losses) if len(losses) > 1 else None,
        last("validation/max_violation"),
        mean(trained) if trained else None,
        late("moe/max_violation"),
        late("moe/load_ratio_home"),
        late("moe/load_ratio"),
        last("validation/dead_experts"),
        last("validation/routing_change"),
        last("validation/affinity"),
        late("moe/rows") / layers / late("train/tokens"),
        late("router/dropped") if "router/dropped" in lines[0][-1] else None,
        late("moe/bytes_within_nodes", "moe/bytes_across_nodes") / 1e6,
        late("speed/tokens_per_s"),
    )


def trained_violation(history: Path) -> float:
    """max/mean - 1 rows per expert over the last logged steps together, mean over layers."""
    points = read_history(history).points
    newest = points[-max(1, len(points) // LAST) :]
    load_LE = np.sum([point.load_LE for point in newest], axis=0)
    return float(np.mean(load_LE.max(1) / load_LE.mean(1)) - 1)


def table_of(figures: Sequence[Figures]) -> Table:
    table = Table(Column("choice", no_wrap=True), "seeds")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for one in figures:
        values = [getattr(one, name) for name, _ in COLUMNS.values()]
        cells = [
            "" if value is None else form.format(value)
            for value, (_, form) in zip(values, COLUMNS.values(), strict=True)
        ]
        table.add_row(one.choice, str(one.seeds), *cells)
    return table


def plot(figures: Sequence[Figures], path: Path) -> None:
    """Validation loss with its spread against MaxVio on validation tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 6.5), layout="constrained")
    for one in figures:
        if one.max_violation is not None:
            axis.errorbar(one.max_violation, one.loss, one.spread, fmt="o", label=one.choice)
    axis.set_xlabel("MaxVio of experts over the validation tokens (max / mean - 1)")
    axis.set_ylabel("validation loss (nats per token)")
    figure.legend(fontsize=8, loc="outside lower center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
