"""Do several dense models differ in their weights alone, so that they can be merged?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.upcycle.dense import DenseModel
from trainer.upcycle.layout import DenseShape

# fields of a configuration that change no output of the model
IGNORED = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
TOKENIZER = "tokenizer.json"
TEXT_TO_IDS = ("added_tokens", "normalizer", "pre_tokenizer", "model")  # of a tokenizer
SHOWN = 120  # characters of a value in a message


def check_alike(models: Sequence[DenseModel]) -> None:
    """Refuse models that cannot become one.

    Raises:
        ValueError: naming the first field of the configuration, the tensors or the tokenizer that
            differs, with both values.
    """
    first = models[0]
    tokens = _tokenizer(first)
    for other in models[1:]:
        differences = [
            *_differing(_config(first), _config(other)),
            *_differing(dataclasses.asdict(first.attention), dataclasses.asdict(other.attention)),
            *_differing({"dtypes": sorted(first.checkpoint.dtypes)}, _dtypes(other)),
        ]
        if tokens and (others := _tokenizer(other)):
            differences += _differing(tokens, others)
        differences.sort(key=lambda difference: difference[0] != "model_type")  # says most
        for key, mine, its in differences:
            raise ValueError(
                f"source: {key} is {mine} in {first.checkpoint.path}, {its} in "
                f"{other.checkpoint.path}; only models that differ in their weights alone can be "
                f"merged"
            )


def shape_of(models: Sequence[DenseModel]) -> DenseShape:
    """Sizes of the models, how many there are and whether their weights are the same."""
    return models[0].shape._replace(num_models=len(models), same=are_same(models))


def are_same(models: Sequence[DenseModel]) -> bool:
    """Whether all models have the same weights; reads up to the first tensor that differs."""
    first = models[0]
    path = first.checkpoint.path.resolve()
    others = [model for model in models[1:] if model.checkpoint.path.resolve() != path]
    # FFNs first: they differ where anything does
    keys = sorted(first.keys, key=lambda key: (".mlp." not in key, key)) if others else []
    return all(
        torch.equal(first.checkpoint.read(key), other.checkpoint.read(key))
        for key in keys
        for other in others
    )


def _config(model: DenseModel) -> dict[str, Any]:
    return {k: v for k, v in model.config.to_dict().items() if k not in IGNORED}


def _dtypes(model: DenseModel) -> dict[str, Any]:
    return {"dtypes": sorted(model.checkpoint.dtypes)}


def _tokenizer(model: DenseModel) -> dict[str, Any]:
    """What turns text into ids; empty without a tokenizer.

    Raises:
        ValueError: for a file that cannot be read.
    """
    path: Path = model.checkpoint.path / TOKENIZER
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {f"{TOKENIZER}: {part}": content.get(part) for part in TEXT_TO_IDS}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def _differing(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """Keys that differ, those of nested dicts joined by dots, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted({*one, *other}):
            full = f"{key}.{name}" if key else str(name)
            yield from _differing(one.get(name), other.get(name), full)
    elif one != other:
        yield key, _short(one), _short(other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
