"""What the schema and the groups say about themselves, for `--help` and the reference."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from configs import schema
from configs.launch_schema import (
    LAUNCH_GROUPS,
    KubernetesValues,
    LaunchConfig,
    LocalValues,
    SlurmValues,
)
from configs.rules import bounds_text
from configs.sizing_schema import SIZING_GROUPS, SizingConfig
from configs.sweep_schema import GROUPS, SweepConfig
from configs.upcycle_schema import UPCYCLE_GROUPS, UpcycleConfig

FOLDER = Path(__file__).parent
ROOTS = ("config", "upcycle", "launch")  # files of defaults, each with groups of its own
ROOT_OF = dict.fromkeys(UPCYCLE_GROUPS, "upcycle") | dict.fromkeys(LAUNCH_GROUPS, "launch")
EXAMPLES = (
    ("Train the quickstart on two ranks", "torchrun --nproc-per-node 2 -m {train} {quickstart}"),
    (
        "Train on your own text on 8 GPUs",
        "torchrun --nproc-per-node 8 -m {train} data=text data.sources.text.paths='[corpus/*.txt]' "
        "train.precision=bf16 train.steps=1000 train.batch_size=64 train.micro_batch_size=8 "
        "train.seq_len=1024",
    ),
    (
        "Continue a Hugging Face MoE",
        "torchrun --nproc-per-node 8 -m {train} model=hf model.source=allenai/OLMoE-1B-7B-0924 "
        "data=text data.sources.text.paths='[corpus/*.txt]' "
        "data/tokenizer=hf train.precision=bf16 train.steps=1000 "
        "train.batch_size=64 train.micro_batch_size=1 train.seq_len=4096",
    ),
    (
        "Try several values, one run after the other",
        "torchrun --nproc-per-node 2 -m {train} -m {quickstart} balance=auto,none seed=0,1",
    ),
    ("Show the configuration without training", "python -m {train} {quickstart} --cfg job"),
)

SWEEP_EXAMPLES = (
    (
        "Compare placements and planners on made-up routing, without any file",
        "python -m placement.sweep -m placement=contiguous,random,load,affinity planner=home,quota",
    ),
    (
        "On the routing of a run of your own (train.record_routing_every=10)",
        "python -m placement.sweep -m trace=runs/quickstart/routing cluster=laptop "
        "placement=contiguous,ilp planner=home,quota shape.hidden=128 shape.width=128",
    ),
    (
        "What faster links would buy",
        "python -m placement.sweep -m cluster.inter_gbps=100,200,400,800 "
        "dispatcher=direct,two_level",
    ),
)

UPCYCLE_EXAMPLES = (
    (
        "Eight copies of the FFN, two per token",
        "python -m trainer.upcycle source=Qwen/Qwen3-0.6B target_dir=qwen3-8x recipe=copy",
    ),
    (
        "64 fine-grained experts, the plan alone",
        "python -m trainer.upcycle source=Qwen/Qwen3-0.6B target_dir=qwen3-64x recipe=split "
        "recipe.num_experts=64 recipe.top_k=8 recipe.granularity=8 dry_run=true",
    ),
    (
        "Sigmoid routing with whole groups and a selection bias",
        "python -m trainer.upcycle source=Qwen/Qwen3-0.6B target_dir=glm-64x recipe=split "
        "target=glm4_moe routing=sigmoid",
    ),
    ("Check a result again", "python -m trainer.upcycle verify qwen3-8x"),
)

LAUNCH_EXAMPLES = (
    (
        "Check and show the quickstart on two ranks, start nothing",
        "python -m launch ranks_per_node=2 device=cpu dry_run=true -- experiment=quickstart",
    ),
    (
        "A script for four nodes of eight GPUs, submitted",
        "python -m launch launcher=slurm launcher.submit=true nodes=4 ranks_per_node=8 -- "
        "experiment=quickstart",
    ),
    (
        "A manifest for Kubernetes",
        "python -m launch launcher=kubernetes launcher.image=registry.example/evenkeel:0.1.0 "
        "launcher.claim=results nodes=2 ranks_per_node=8 -- experiment=quickstart",
    ),
)

SIZING_EXAMPLES = (
    (
        "Qwen3-30B-A3B on 16 nodes of 8 H100",
        "python -m launch plan model=qwen3_30b_a3b cluster=h100_8x8 cluster.num_nodes=16",
    ),
    (
        "A checkpoint of your own on one node of 80 GB GPUs",
        "python -m launch plan model=hf model.source=DIRECTORY cluster=h100_1x8 "
        "train.batch_size=512 json=plan.json",
    ),
)


@dataclass(frozen=True)
class Field:
    """One value of the schema: full key, type, default and bounds in words, documentation."""

    key: str
    type: str
    default: str
    bounds: str
    text: str


@dataclass(frozen=True)
class Choice:
    """One file of a group: its name, what it says about itself, whether it is the default."""

    group: str
    name: str
    text: str
    is_default: bool


def examples() -> list[tuple[str, str]]:
    """Example commands of the trainer, each with what it does."""
    names = {"train": "trainer.train", "quickstart": "experiment=quickstart"}
    return [(what, command.format(**names)) for what, command in EXAMPLES]


def fields(cls: type = schema.Config, prefix: str = "") -> list[Field]:
    """Every value of a schema class and of the classes in it, in the order of the source."""
    hints = typing.get_type_hints(cls)
    texts: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        texts |= _field_texts(base.__module__)[base.__name__]
    found: list[Field] = []
    for item in dataclasses.fields(cls):
        hint, key = hints[item.name], prefix + item.name
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found += fields(hint, f"{key}.")
        else:
            default = _default(item, key)
            found.append(Field(key, _type(hint), default, bounds_text(key), texts[item.name]))
    return found


def choices(root: str = "config") -> list[Choice]:
    """Every file of the groups of a root file, by group and name."""
    defaults = set(_defaults(FOLDER / f"{root}.yaml", ""))
    found = []
    for path in sorted(FOLDER.glob("*/**/*.yaml"), key=lambda path: (path.parent, path.name)):
        group = path.parent.relative_to(FOLDER).as_posix()
        if ROOT_OF.get(group, "config") != ("config" if root in ("sweep", "sizing") else root):
            continue
        is_default = (group, path.stem) in defaults
        found.append(Choice(group, path.stem, _first_comment(path), is_default))
    return found


def _defaults(path: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Group and choice of every entry of a file's defaults list, and of the files it names."""
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", []):
        if not isinstance(entry, dict):
            continue
        for group, chosen in entry.items():
            for name in chosen if isinstance(chosen, list) else [chosen]:
                file = FOLDER / f"{prefix}{group}" / f"{name}.yaml"
                if file.exists():
                    yield f"{prefix}{group}", name
                    yield from _defaults(file, f"{prefix}{group}/")


def help_text() -> str:
    """The answer to `python -m trainer.train --help`."""
    lines = [
        "Evenkeel trains mixture-of-experts language models with expert parallelism.",
        "",
        "  torchrun --nproc-per-node RANKS -m trainer.train [GROUP=CHOICE | KEY=VALUE] ...",
        "",
        "One process without torchrun works too: python -m trainer.train ...",
    ]
    lines += _example_lines(examples())
    lines += [*_group_lines(choices()), *_value_lines(fields())]
    lines += [
        "",
        "FLAGS",
        "",
        "  -m          run every combination of the values given as KEY=A,B,C; each job has its",
        "              own folder run.dir/KEY=VALUE,...",
        "  --cfg job   print the composed configuration and stop",
        "  --help      this text; --hydra-help: all flags",
        "",
        "HYDRA_FULL_ERROR=1 in the environment shows the traceback of an error.",
    ]
    return "\n".join(lines)


def sweep_help_text() -> str:
    """The answer to `python -m placement.sweep --help`."""
    lines = [
        "Evenkeel simulates placements and planners on a described cluster.",
        "",
        "  python -m placement.sweep [-m] [GROUP=CHOICE | KEY=VALUE] ...",
    ]
    lines += _example_lines(SWEEP_EXAMPLES)
    own = [choice for choice in choices("sweep") if choice.group in GROUPS]
    lines += [*_group_lines(own), *_value_lines(fields(SweepConfig))]
    lines += [
        "",
        "FLAGS",
        "",
        "  -m          simulate every combination of the values given as KEY=A,B,C",
        "  --help      this text",
        "",
        "Results: table.csv, table.md, results.jsonl and report.html in dir.",
        "HYDRA_FULL_ERROR=1 in the environment shows the traceback of an error.",
    ]
    return "\n".join(lines)


def launch_help_text() -> str:
    """The answer to `python -m launch --help`."""
    lines = [
        "Evenkeel starts jobs: here, through Slurm or on Kubernetes.",
        "",
        "  python -m launch [GROUP=CHOICE | KEY=VALUE] ... -- OVERRIDES OF THE JOB ...",
    ]
    lines += _example_lines(LAUNCH_EXAMPLES)
    lines += [*_group_lines(choices("launch")), *_value_lines(launch_fields())]
    lines += [
        "",
        "What follows -- goes to the job as it is; see python -m trainer.train --help.",
        "How many GPUs a job needs: python -m launch plan --help.",
        "HYDRA_FULL_ERROR=1 in the environment shows the traceback of an error.",
    ]
    return "\n".join(lines)


def sizing_help_text() -> str:
    """The answer to `python -m launch plan --help`."""
    lines = [
        "Evenkeel estimates memory and step time: what fits on a cluster, and what is fastest.",
        "",
        "  python -m launch plan [GROUP=CHOICE | KEY=VALUE] ...",
    ]
    lines += _example_lines(SIZING_EXAMPLES)
    own = [choice for choice in choices("sizing") if choice.group in SIZING_GROUPS]
    lines += [*_group_lines(own), *_value_lines(fields(SizingConfig))]
    return "\n".join([*lines, "", "docs/scaling.md says what is counted, and what is assumed."])


def launch_fields() -> list[Field]:
    """Every value of a launch, those of each launcher too."""
    found = fields(LaunchConfig)
    for values in (LocalValues, SlurmValues, KubernetesValues):
        found += fields(values, "launcher.")
    return found


def upcycle_help_text() -> str:
    """The answer to `python -m trainer.upcycle --help`."""
    lines = [
        "Evenkeel turns dense checkpoints into mixture-of-experts models.",
        "",
        "  python -m trainer.upcycle [GROUP=CHOICE | KEY=VALUE] ...",
        "  python -m trainer.upcycle verify DIR",
    ]
    lines += _example_lines(UPCYCLE_EXAMPLES)
    lines += [*_group_lines(choices("upcycle")), *_value_lines(fields(UpcycleConfig))]
    lines += [
        "",
        "A conversion that was stopped goes on when the same command is run again.",
        "HYDRA_FULL_ERROR=1 in the environment shows the traceback of an error.",
    ]
    return "\n".join(lines)


def _example_lines(of: Iterable[tuple[str, str]]) -> list[str]:
    lines = ["", "EXAMPLES"]
    for what, command in of:
        lines += ["", f"  {what}:", *_wrap(command, 4, " \\")]
    return lines


def _group_lines(of: list[Choice]) -> list[str]:
    lines, group = ["", "GROUPS (GROUP=CHOICE; * is the default)"], ""
    for choice in of:
        if choice.group != group:
            group = choice.group
            lines += ["", f"  {group}"]
        mark = "*" if choice.is_default else " "
        lines.append(f"   {mark}{choice.name:<13} {choice.text}")
    return lines


def _value_lines(of: list[Field]) -> list[str]:
    lines, section = ["", "VALUES (KEY=VALUE)"], ""
    for field in of:
        if field.key.rpartition(".")[0] != section:
            section = field.key.rpartition(".")[0]
            lines.append("")
        about = ", ".join(part for part in (field.type, field.bounds, field.default) if part)
        lines += [f"  {field.key}  ({about})", *_wrap(field.text, 6)]
    return lines


def help_node() -> dict[str, Any]:
    """The node of Hydra's group hydra/help: a template without anything left to fill in."""
    text = help_text().replace("${run.name}", "<run.name>").replace("${run.dir}", "<run.dir>")
    assert "$" not in text, "a $ would be filled in by Hydra"
    return {"app_name": "evenkeel", "header": "", "footer": "", "template": text}


@cache
def _field_texts(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the string under the field, of all classes of a module."""
    texts: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts[node.name] = {
            field.target.id: inspect.cleandoc(text.value.value).replace("\n", " ")
            for field, text in zip(node.body, node.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
    return texts


def _type(hint: Any) -> str:
    if hint is Any:
        return "node"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(member.name for member in hint)
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return text.replace("typing.", "").replace("None", "null")


def _default(item: dataclasses.Field[Any], key: str) -> str:
    value = item.default
    if item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    group = key.split(".")[0]
    if (FOLDER / group).is_dir() and (value == MISSING or "." not in key):
        return f"set by the group {group}"
    if value == MISSING:
        return "required"
    if isinstance(value, Enum):
        return f"default {value.name}"
    if value is None or isinstance(value, bool):
        return f"default {'null' if value is None else str(value).lower()}"
    return f"default {value}"


def _first_comment(path: Path) -> str:
    """The first comment of a file that is not an instruction to Hydra."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
        if not line.startswith("#"):
            break
    return ""


def _wrap(text: str, indent: int, joint: str = "") -> list[str]:
    lines = textwrap.wrap(text, 96 - indent, break_long_words=False, break_on_hyphens=False)
    ends = [joint] * (len(lines) - 1) + [""]
    return [f"{' ' * indent}{line}{end}" for line, end in zip(lines, ends, strict=True)]
