"""Choose copies of busy experts for planner=replicated: `python -m placement.sweep.replicas`.

    python -m placement.sweep.replicas out=copies.json stats=... placement=file placement.path=...

Takes the values of a sweep's cell (`python -m placement.sweep --help`): stats, trace or synthetic
say what routers choose, placement where experts live, planner.slots and `+planner.within_node` what
copies may be, micro_batch and micro_batches how many tokens of a rank share one fetch of them.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate

from configs.compose import composed_cell, to_cell
from configs.errors import COMPOSE_ERRORS, explain
from configs.sweep_schema import SweepConfig, check_sweep
from placement.objective import Cost
from placement.placers import TWO_LEVEL
from placement.replicate import Chosen, choose_replicas
from placement.sweep.cell import load_routing, place, shape_of, topology_of
from placement.sweep.run import EXIT_CONFIG, FULL_ERROR


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose copies as the command line says, save and describe them; returns the exit code.

    0: saved. 2: refused.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in given or "-h" in given:
        print(__doc__)
        return 0
    try:
        out, config = _config(given)
        chosen = chosen_for(config)
        chosen.replicas.save(out)
    except (*COMPOSE_ERRORS, ValueError, OSError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exception(error)
        print(f"error: {explain(error, SweepConfig)}", file=sys.stderr)
        return EXIT_CONFIG
    print(describe(chosen))
    print(f"saved: {out}; train with planner=replicated planner.copies={out}")
    return 0


def chosen_for(config: SweepConfig) -> Chosen:
    """The copies for the routing, placement, planner and cluster of a cell.

    Raises:
        ValueError: for a planner that holds no copies, no tokens, and what does not fit.
    """
    planner = instantiate(config.planner)
    if not hasattr(planner, "with_copies"):
        raise ValueError(
            f"planner ({config.planner['_target_']}) holds no copies; use planner=replicated"
        )
    topology, shape = topology_of(config), shape_of(config)
    stats = load_routing(config, topology.num_ranks).stats
    placement, _ = place(config, stats, topology, shape)
    return choose_replicas(
        placement,
        stats,
        topology,
        planner,
        steps=stats.tokens / (config.micro_batch * config.micro_batches * topology.num_ranks),
        two_level=config.dispatcher["_target_"] == TWO_LEVEL,
        shape=shape,
    )


def describe(chosen: Chosen) -> str:
    """What no copies, those by load and the chosen ones cost, as a table."""
    head = f"{'':10}{'ms':>10}{'traffic ms':>12}{'compute ms':>12}{'rows across':>14}{'load':>8}"
    costs = (("no copies", chosen.without), ("by load", chosen.by_load), ("chosen", chosen.cost))
    number = sum(map(len, chosen.replicas.copies_LN2))
    return "\n".join([head, *(_line(*cost) for cost in costs), f"{number} copies"])


def _line(name: str, cost: Cost) -> str:
    milliseconds = f"{cost.seconds * 1e3:10.2f}{cost.traffic_s * 1e3:12.2f}"
    rows = f"{cost.compute_s * 1e3:12.2f}{cost.rows_inter:14,.0f}{cost.load_ratio_L.mean():8.3f}"
    return f"{name:10}{milliseconds}{rows}"


def _config(given: Sequence[str]) -> tuple[Path, SweepConfig]:
    outs = [word.removeprefix("out=") for word in given if word.startswith("out=")]
    if len(outs) != 1 or not outs[0]:
        raise ValueError(
            "out is missing: name the file of the copies once, such as out=copies.json"
        )
    overrides = [word for word in given if not word.startswith("out=")]
    if not any(word.startswith("planner=") for word in overrides):
        overrides.insert(0, "planner=replicated")
    composition, choices = composed_cell(*overrides)
    config = to_cell(composition)
    check_sweep(config, choices)
    return Path(outs[0]), config


if __name__ == "__main__":
    sys.exit(main())
