"""Write docs/configuration.md from the schema and the groups: `python -m configs.reference`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from configs.describe import FOLDER, Choice, Field, choices, examples, fields, launch_fields
from configs.sizing_schema import SizingConfig
from configs.sweep_schema import SweepConfig
from configs.upcycle_schema import UpcycleConfig

PATH = FOLDER.parent / "docs" / "configuration.md"
HEAD = """\
# Configuration

Written by `python -m configs.reference` from `configs/`; change it there.

A run is one configuration: groups (`GROUP=CHOICE`) fill it, values (`KEY=VALUE`) on the command
line change it, an experiment is a file of both. `python -m trainer.train --help` prints the same
tables, `python -m trainer.train experiment=quickstart --cfg job` the whole configuration.
"""
RULES = """\
## How values are read

- `KEY=VALUE` changes a value that exists. `+KEY=VALUE` adds one to an open node, such as
  `+model.overrides.rope_theta=50000` or `+data.weights.code=2`. `~KEY` removes one from it.
- `null` is "not set". Lists: `'optim.betas=[0.9,0.99]'`. Another value: `'run.dir=${run.name}'`.
- Several choices of one group: `'logger=[console,wandb]'`, `'balance=[loss_free,aux_loss]'`.
- A name that does not exist, a value of a wrong type, a missing value or values that do not fit
  each other end the command before anything is built, with the full key and the remedy.
- Every rank composes the same configuration; rank 0 speaks. The exit code is 2 for a configuration
  that is refused and 1 for a run that fails. `HYDRA_FULL_ERROR=1` shows the traceback as well.
- Rank 0 saves the resolved configuration as `config.yaml` in `run.dir`; that of an earlier start
  with other values stays there as `config.1.yaml`, and so on. Checkpoints hold it too.

## Sweeps

`-m` runs every combination of comma-separated values, one job after the other:

    torchrun --nproc-per-node 2 -m trainer.train -m experiment=quickstart balance=auto,none seed=0,1

All jobs are composed before the first one starts. Each has its own folder below `run.dir`, named
after its overrides (`runs/quickstart/balance=none,seed=1`; the experiment and `run.name` are left
out), so that `checkpoint.resume=auto` finds its own checkpoints when the sweep is started again.
A sweep that sets `run.dir` keeps `${sweep_job:}` in it. The list of the jobs' common values is
`multirun.yaml` in the folder of the sweep. The first job that fails ends the sweep.

## Slots

`engine`, `planner`, `placement`, `balance`, `logger`, `data.sources` and `data.tokenizer` hold
`_target_` nodes: the dotted path of a class or function, and its arguments. Your own class works
without a change here: `'+logger.mine._target_=my_package.MyLogger'`. Arguments are checked against
its signature before the run starts. `_partial_: true`: the trainer gives the other arguments.
"""

SWEEP = """\
## Values of `python -m placement.sweep`

Its groups are placement, planner, dispatcher and cluster; its defaults are in configs/sweep.yaml.
"""

UPCYCLE = """\
## Groups and values of `python -m trainer.upcycle`

Its defaults are in configs/upcycle.yaml.
"""

LAUNCH = """\
## Groups and values of `python -m launch`

Its defaults are in configs/launch.yaml and configs/launcher/; docs/launch.md explains them.
"""

SIZING = """\
## Values of `python -m launch plan`

Its groups are model, cluster and planner; its defaults are in configs/sizing.yaml. docs/scaling.md
says what it counts.
"""


def markdown() -> str:
    """The whole page."""
    parts = [HEAD, "## Examples\n"]
    parts += [f"{what}:\n\n    {command}\n" for what, command in examples()]
    parts += [RULES, "## Groups\n\nThe default is marked with *.\n", _choice_table(choices())]
    parts.append("## Values\n")
    for section, members in groupby(fields(), lambda field: field.key.rpartition(".")[0]):
        title = f"`{section}`" if section else "Top level"
        parts += [f"### {title}\n", _field_table(list(members))]
    parts.append(SWEEP)
    parts.append(_field_table(fields(SweepConfig)))
    parts += [UPCYCLE, _choice_table(choices("upcycle")), _field_table(fields(UpcycleConfig))]
    parts += [LAUNCH, _choice_table(choices("launch")), _field_table(launch_fields())]
    parts += [SIZING, _field_table(fields(SizingConfig))]
    return "\n".join(parts)


def _choice_table(rows: list[Choice]) -> str:
    lines = ["| group | choice | |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.group} | `{row.name}`{' *' * row.is_default} | {row.text} |")
    return "\n".join(lines) + "\n"


def _field_table(rows: list[Field]) -> str:
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for row in rows:
        kind = ", ".join(part for part in (row.type, row.bounds) if part).replace("|", "\\|")
        default = row.default.removeprefix("default ")
        lines.append(f"| `{row.key}` | {kind} | {default} | {row.text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    Path(PATH).write_text(markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
