"""Write an upcycled model, shard by shard, so that an interrupted conversion goes on.

The folder is loadable when the last file has its name; `upcycle.partial.json` is there until then
and says which conversion it is and which files are complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from configs.upcycle_schema import UpcycleConfig
from trainer.durable import sha256, write_durably
from trainer.export import (
    check_keys,
    check_space,
    named,
    refuse_non_empty,
    write_configs,
    write_index,
    write_shard,
)
from trainer.upcycle.plan import Plan

PARTIAL = "upcycle.partial.json"
RECEIPT = "upcycle.json"
FORMAT = 1
# what a tokenizer is made of, copied as it is
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
Advance = Callable[[int], None]


def convert(plan: Plan, advance: Advance = lambda num_bytes: None) -> Path:
    """Write the MoE, its tokenizer and its receipt; goes on with the same conversion.

    Args:
        advance: told the bytes of every tensor that was written or found complete.

    Raises:
        ValueError: for a folder with anything but the same conversion in it, before it is
            touched. OSError: if the file system is full or refuses, naming the file.
    """
    target = Path(plan.config.target_dir)
    if target.exists() and not (target / PARTIAL).exists():
        refuse_non_empty(target)
    check_keys(plan.form, set(plan.model.keys()))
    sources = [[file.name, sha256(file)] for file in plan.source_files()]
    identity = plan.identity([digest for _, digest in sources])
    done = _complete(target, identity)
    left = [(name, shard) for name, shard in named(plan.shards) if name not in done]
    check_space(target, sum(shard.num_bytes for _, shard in left))
    target.mkdir(parents=True, exist_ok=True)
    _note(target, identity, done)
    advance(plan.num_bytes - sum(shard.num_bytes for _, shard in left))
    source = plan.model.checkpoints[0].path
    write_configs(plan.form, plan.model.config, target, None, _generation(source))
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name, shard in left:
        write_shard(plan.form, shard, plan.model, target / name, advance)
        done[name] = sha256(target / name)
        _note(target, identity, done)
    write_receipt(target, receipt(plan, sources, done))
    write_index(plan.shards, target)
    (target / PARTIAL).unlink()
    return target


def receipt(plan: Plan, sources: list[list[str]], files: dict[str, str]) -> dict[str, Any]:
    """What was made of what and how, for `verify` and for people."""
    resolved = plan.config.resolved
    total, active = plan.parameters
    given = ("source", "recipe", "router_init", "routing", "scale", "dtype", "seed", "max_shard_gb")
    return {
        "format": FORMAT,
        **{key: resolved[key] for key in given},
        **plan.model.noted(),
        "source_files": sources,
        "files": files,
        "parameters": total,
        "active_parameters": active,
        "exact": not plan.inexact,
        "inexact_because": plan.inexact,
        "measured": {},
    }


def write_receipt(target: Path, content: dict[str, Any]) -> None:
    """Write the receipt, or write it anew."""
    write_durably(target / f"{RECEIPT}.tmp", json.dumps(content, indent=2) + "\n")
    (target / f"{RECEIPT}.tmp").replace(target / RECEIPT)


def read_receipt(target: Path) -> tuple[dict[str, Any], UpcycleConfig]:
    """The receipt in a folder, and the configuration that makes the same again.

    Raises:
        ValueError: if there is none, or not one that can be read.
    """
    if (target / PARTIAL).exists():
        raise ValueError(f"{target} is not complete: run the same conversion again")
    try:
        content = json.loads((target / RECEIPT).read_text())
        assert content["format"] == FORMAT
        config = UpcycleConfig(target_dir=str(target))
        for key in ("source", "target", "dtype", "seed", "max_shard_gb", "recipe", "router_init"):
            setattr(config, key, content[key])
        for key in ("routing", "scale"):
            setattr(config, key, type(getattr(config, key))(content[key]))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{target / RECEIPT}: not a receipt of an upcycled model") from error
    return content, config


def _complete(target: Path, identity: str) -> dict[str, str]:
    """Files of an interrupted conversion that are complete, with their hashes.

    Raises:
        ValueError: if it is another conversion.
    """
    partial = target / PARTIAL
    if not partial.exists():
        return {}
    try:
        noted = json.loads(partial.read_text())
        same, files = noted["identity"] == identity, dict(noted["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{partial}: not readable; remove {target} and start again") from error
    if not same:
        raise ValueError(
            f"target_dir ({target}) holds another conversion that was interrupted, of other "
            f"sources or settings; remove it or choose another directory"
        )
    return {
        name: digest
        for name, digest in files.items()
        if (target / name).is_file() and sha256(target / name) == digest
    }


def _note(target: Path, identity: str, done: dict[str, str]) -> None:
    write_durably(target / f"{PARTIAL}.tmp", json.dumps({"identity": identity, "files": done}))
    (target / f"{PARTIAL}.tmp").replace(target / PARTIAL)


def _generation(source: Path) -> GenerationConfig | None:
    """The dense model's settings for generation, if it has any."""
    if not (source / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(source)
