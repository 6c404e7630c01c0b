"""Read a Hugging Face directory one logical key at a time, each with its own bytes alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from trainer.hf_format import HFFormat, Source
from trainer.remote_code import why_not_read

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Recipe:
    """What one logical key is made of: (pattern, disk key) in the order of the conversion, and
    the row of them to read where they stack all experts."""

    parts: list[tuple[str | None, str]]
    row: int | None


class HFCheckpoint:
    """A model directory as `save_pretrained` writes it, with experts one by one or stacked.

    The headers of all files are read and checked at once, tensors when asked for.

    Attributes:
        config: the model's configuration. dtypes: of its tensors, as safetensors names them.

    Raises:
        ValueError: naming file and key, for a directory without configuration or weights, an
            unknown family, quantised weights, a missing, torn or unreadable file, and for
            missing, unexpected or doubled tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, list[int]] = {}
        self.dtypes: set[str] = set()
        for file in weight_files(self.path):
            self._read_header(file)
        self._form = HFFormat(self.config)
        self._recipes = self._resolve()

    def logical_keys(self) -> list[str]:
        """Every key that `read` knows: dense parameters by name, experts one by one."""
        return list(self._form.parameters)

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """The tensor of a logical key, in the dtype of the file; of a stack of experts only this
        expert's rows are read.

        Args:
            rows: to read alone, of a tensor that is stored as it is in memory.

        Raises:
            ValueError: for an unknown key, an unreadable file or a wrong shape.
        """
        if key not in self._recipes:
            raise ValueError(f"{self.path}: {self.config.model_type} has no tensor {key}")
        parameter, recipe = self._form.parameters[key], self._recipes[key]
        if rows is not None and self._is_stored_as_it_is(key):
            with opened(self._file_of[recipe.parts[0][1]]) as file:
                return file.get_slice(recipe.parts[0][1])[rows]
        if rows is not None:
            return self.read(key)[rows]
        parts = [(p, disk, self._read_part(disk, recipe.row)) for p, disk in recipe.parts]
        problem: Exception | None = None
        try:
            tensor = self._form.from_disk(parameter.name, parts)
            if parameter.expert is not None:
                tensor = tensor.squeeze(0)
            if tensor.shape == parameter.shape:
                return tensor
        except (RuntimeError, ValueError) as error:  # shapes that the conversion cannot join
            problem = error
        have = ", ".join(
            f"{disk} {self._shape_of[disk]} in {self._file_of[disk].name}"
            for _, disk in recipe.parts
        )
        raise ValueError(
            f"{self.path}: shape mismatch: {key} needs {list(parameter.shape)} by "
            f"config.json, the files hold {have}"
        ) from problem

    def _is_stored_as_it_is(self, key: str) -> bool:
        (pattern, disk), *others = self._recipes[key].parts
        same_shape = self._shape_of[disk] == list(self._form.parameters[key].shape)
        return pattern is None and not others and same_shape

    def _read_part(self, disk_key: str, row: int | None) -> Tensor:
        with opened(self._file_of[disk_key]) as file:
            if row is None:
                return file.get_tensor(disk_key)
            return file.get_slice(disk_key)[row : row + 1]

    def _read_header(self, path: Path) -> None:
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key in self._file_of:
                    raise ValueError(
                        f"{path}: holds {key}, which {self._file_of[key].name} holds as well"
                    )
                self._file_of[key] = path
                self._shape_of[key] = file.get_slice(key).get_shape()
                self.dtypes.add(file.get_slice(key).get_dtype())

    def _resolve(self) -> dict[str, Recipe]:
        """The recipe of every logical key."""
        sources, unexpected = self._form.sources(self._file_of)
        if unexpected:
            raise ValueError(
                f"{self._file_of[unexpected[0]]}: {len(unexpected)} tensors are unexpected in "
                f"{self.config.model_type}, first {unexpected[0]}"
            )
        keys_of: dict[str, list[str]] = defaultdict(list)
        for key, parameter in self._form.parameters.items():
            keys_of[parameter.name].append(key)
        recipes: dict[str, Recipe] = {}
        missing = []
        for name, keys in keys_of.items():
            found = self._recipes_of(name, keys, sources.get(name, {}))
            if found is None:
                missing.extend(keys)
            else:
                recipes.update(zip(keys, found, strict=True))
        if missing:
            raise ValueError(self._describe_missing(missing))
        return recipes

    def _recipes_of(self, name: str, keys: list[str], source: Source) -> list[Recipe] | None:
        """Recipes of the logical keys of one tensor in memory; None if some disk tensor lacks."""
        if not source:
            return None
        parts = [(pattern, disk) for pattern, found in source.items() for disk in found]
        if None in source and len(parts) > 1:
            raise ValueError(
                f"{self._file_of[parts[0][1]]}: {name} is there twice, as {parts[0][1]} and as "
                f"{parts[-1][1]}; remove one of them"
            )
        parameter = self._form.parameters[keys[0]]
        if parameter.expert is None:
            return [Recipe(parts, None)]
        if len(self._shape_of[parts[0][1]]) > len(parameter.shape):
            self._check_stacks(parts, len(keys))
            return [Recipe(parts, row) for row in range(len(keys))]
        for found in source.values():
            if len(found) > len(keys):
                raise ValueError(
                    f"{self._file_of[found[-1]]}: {len(found)} experts for {name}, last "
                    f"{found[-1]}, config.json has {len(keys)}"
                )
            if not _are_numbered(found, len(keys)):
                return None
        return [
            Recipe([(pattern, found[expert]) for pattern, found in source.items()], None)
            for expert in range(len(keys))
        ]

    def _check_stacks(self, parts: list[tuple[str | None, str]], num_experts: int) -> None:
        for _, key in parts:
            if self._shape_of[key][0] != num_experts:
                raise ValueError(
                    f"{self._file_of[key]}: shape mismatch: {key} {self._shape_of[key]} stacks "
                    f"{self._shape_of[key][0]} experts, config.json has {num_experts}"
                )

    def _describe_missing(self, keys: list[str]) -> str:
        first = set(keys)
        expected = [
            disk for piece in self._form.pieces if first & set(piece.keys) for disk in piece.disk
        ]
        absent = [disk for disk in dict.fromkeys(expected) if disk not in self._file_of]
        return (
            f"{self.path}: {len(absent)} tensors of {self.config.model_type} are missing, first "
            f"{(absent or keys)[0]}; the download may be incomplete or of another model"
        )


def _are_numbered(disk_keys: list[str], num_experts: int) -> bool:
    """Whether the keys differ in one part of the name alone and count 0, 1, ... there."""
    columns = zip(*(key.split(".") for key in disk_keys), strict=True)
    differing = [column for column in columns if len(set(column)) > 1]
    counted = [tuple(str(expert) for expert in range(num_experts))]
    return len(disk_keys) == num_experts and (differing == counted or num_experts == 1)


def read_config(path: Path) -> PretrainedConfig:
    """The configuration in a model directory.

    Raises:
        ValueError: if there is none, it is broken, of an unknown family, or of quantised weights.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{path}: no config.json; it must be a local directory of a Hugging Face model "
            f"(fetch one with `hf download`)"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"{file}: not a configuration of a known family: {why_not_read(error)}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{file}: quantization_config is set; only unquantised weights can be read, "
            f"dequantise the model first"
        )
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, by its index where there is one.

    Raises:
        ValueError: if there is none, an indexed file is missing, or it is unclear which count.
    """
    index, single = path / INDEX, path / WEIGHTS
    if index.is_file() and single.is_file():
        raise ValueError(f"{path}: both {WEIGHTS} and {INDEX}; remove the one that is out of date")
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{path}: no {WEIGHTS} and no {INDEX}; only safetensors weights can be read"
        )
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = [path / name for name in dict.fromkeys(weight_map.values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors files: {error!r}") from error
    for file in files:
        if not file.is_file():
            lost = next(key for key, name in weight_map.items() if name == file.name)
            raise ValueError(f"{file}: missing, {INDEX} expects {lost} in it")
    return files


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: naming it, if it is torn or unreadable.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: torn or unreadable: {error}") from error
