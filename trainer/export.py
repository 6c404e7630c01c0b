"""Write a model as its family's Hugging Face directory, and read one, a tensor at a time.

Both directions go through `trainer.hf_format`. In memory is never more than the tensors of one
conversion: a dense parameter, or one expert.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from trainer.durable import sync
from trainer.hf_checkpoint import HFCheckpoint
from trainer.hf_format import HFFormat, Piece

__all__ = ["HFCheckpoint", "TensorSource", "export_model", "export_order"]

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorSource(Protocol):
    """A model's tensors by logical key, made when asked for; a dict will do."""

    def keys(self) -> Iterable[str]: ...

    def __getitem__(self, key: str, /) -> Tensor: ...


@dataclass
class Shard:
    """The disk tensors of one file and the pieces that fill them."""

    pieces: list[Piece] = field(default_factory=list)
    disk: list[str] = field(default_factory=list)
    num_bytes: int = 0


def export_order(config: PretrainedConfig) -> list[str]:
    """The logical keys of a model in the order in which `export_model` asks for them.

    Ranks that take part in gathering tensors, but write nothing, follow this order.

    Raises:
        ValueError: as `export_model` for an unsupported family.
    """
    return [key for piece in HFFormat(config).pieces for key in piece.keys]


def export_model(
    config: PretrainedConfig,
    tensors: TensorSource,
    target_dir: str | Path,
    *,
    tokenizer: Any = None,
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> Path:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads, with the tensors that
    `save_pretrained` would write, one piece in memory at a time.

    Every key is asked for once, in the order of `export_order`. Every shard gets its name when
    it is complete and on disk; the file that makes the directory loadable comes last.

    Args:
        config: of the model. tensors: by logical key, on any device, tied parameters once.
        target_dir: missing or empty. tokenizer: anything with `save_pretrained`.
        generation_config: default is what the family derives from `config`.
        dtype: of the tensors in the files, except those that the family keeps in another, such
            as fp32 selection biases; default is the dtype of `config`, else float32.
        max_shard_bytes: of one file; a larger tensor gets a file of its own.

    Raises:
        ValueError: before anything is written, for a target that is not empty, a missing or
            superfluous key or an unsupported family; later for a tensor of the wrong shape.
        OSError: if the file system is full or refuses, naming the file.
    """
    target = Path(target_dir)
    refuse_non_empty(target)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes ({max_shard_bytes}) must be >= 1")
    form = HFFormat(config, dtype or own_dtype(config))
    check_keys(form, set(tensors.keys()))
    shards = plan_shards(form, max_shard_bytes)
    check_space(target, sum(shard.num_bytes for shard in shards))

    target.mkdir(parents=True, exist_ok=True)
    write_configs(form, config, target, tokenizer, generation_config)
    for name, shard in named(shards):
        write_shard(form, shard, tensors, target / name)
    write_index(shards, target)
    return target


def named(shards: list[Shard]) -> list[tuple[str, Shard]]:
    """File names of shards, as the library gives them."""
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    return [
        (f"model-{number:05}-of-{len(shards):05}.safetensors", shard)
        for number, shard in enumerate(shards, 1)
    ]


def write_index(shards: list[Shard], target: Path) -> None:
    """The index of several shards, which makes the directory loadable; nothing for one."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": {key: name for name, shard in named(shards) for key in shard.disk},
    }
    content = json.dumps(index, indent=2, sort_keys=True) + "\n"
    with _complete_file(target / "model.safetensors.index.json") as file:
        file.write(content.encode())


def plan_shards(form: HFFormat, max_shard_bytes: int) -> list[Shard]:
    """Disk tensors to files, in the order of the pieces; one piece never spans two files."""
    shards = [Shard()]
    placed: set[str] = set()
    for piece in form.pieces:
        if piece.disk[0] not in placed:  # false for the later experts of one stacked tensor
            size = sum(_num_bytes(form, key) for key in piece.disk)
            if shards[-1].num_bytes and shards[-1].num_bytes + size > max_shard_bytes:
                shards.append(Shard())
            shards[-1].disk.extend(piece.disk)
            shards[-1].num_bytes += size
            placed.update(piece.disk)
        shards[-1].pieces.append(piece)
    return shards


def write_shard(
    form: HFFormat,
    shard: Shard,
    tensors: TensorSource,
    path: Path,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """One safetensors file: header length, header, tensors at their offsets.

    Wider dtypes come first, so that every tensor is aligned to its own element size.

    Args:
        advance: told the bytes of every tensor that was written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    offset = 0
    for key in sorted(shard.disk, key=lambda key: -form.dtypes[key].itemsize):
        offsets[key] = offset
        offset += _num_bytes(form, key)
        header[key] = {
            "dtype": SAFETENSORS_NAMES[form.dtypes[key]],
            "shape": list(form.shapes[key]),
            "data_offsets": [offsets[key], offset],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with _complete_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for piece in shard.pieces:
            for key, tensor in form.to_disk(piece, _fetch(form, piece, tensors)).items():
                data = tensor.to("cpu", form.dtypes[key]).contiguous().reshape(-1)
                start = 8 + len(encoded) + offsets[key]
                start += (piece.row or 0) * data.numel() * data.itemsize
                file.seek(start)
                file.write(data.view(torch.uint8).numpy().data)
                advance(data.nbytes)


def _fetch(form: HFFormat, piece: Piece, tensors: TensorSource) -> dict[str, Tensor]:
    fetched = {}
    for key in piece.keys:
        fetched[key] = tensors[key].detach()
        if fetched[key].shape != form.parameters[key].shape:
            raise ValueError(
                f"export: {key} has shape {list(fetched[key].shape)}, the configuration needs "
                f"{list(form.parameters[key].shape)}"
            )
    return fetched


@contextmanager
def _complete_file(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name that gets its own when complete and on disk.

    Raises:
        OSError: naming the file, with nothing left of it, if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path}: {error}; remove {path.parent}, free space or choose another "
            f"target, and export again",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_configs(
    form: HFFormat,
    config: PretrainedConfig,
    target: Path,
    tokenizer: Any,
    generation_config: GenerationConfig | None,
) -> None:
    written = deepcopy(config)
    written.architectures = [type(form.model).__name__]
    written.dtype = str(form.model.dtype).removeprefix("torch.")
    written.save_pretrained(target)
    if form.model.can_generate():
        (generation_config or form.model.generation_config).save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    for path in target.iterdir():
        sync(path)


def own_dtype(config: PretrainedConfig) -> torch.dtype:
    own = config.dtype or torch.float32
    return getattr(torch, own) if isinstance(own, str) else own


def refuse_non_empty(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"export target {target} is a file; choose a directory")
    if target.exists() and any(target.iterdir()):
        raise ValueError(
            f"export target {target} is not empty: old weights beside new ones can be loaded in "
            f"their place; remove it or choose another directory"
        )


def check_keys(form: HFFormat, keys: set[str]) -> None:
    missing = [key for key in form.parameters if key not in keys]
    superfluous = sorted(keys - form.parameters.keys())
    family = form.model.config.model_type
    if missing:
        raise ValueError(
            f"export: {len(missing)} tensors of {family} are missing, first {missing[0]}; "
            f"nothing was written"
        )
    if superfluous:
        tied = superfluous[0] in form.model.state_dict()
        reason = "tied to another one" if tied else f"not of this {family} configuration"
        raise ValueError(
            f"export: {len(superfluous)} tensors are superfluous, first {superfluous[0]} "
            f"({reason}); leave them out; nothing was written"
        )


def check_space(target: Path, needed: int) -> None:
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"export target {target} needs {needed} bytes, {free} are free; free space or choose "
            f"another directory",
        )


def _num_bytes(form: HFFormat, key: str) -> int:
    return math.prod(form.shapes[key]) * form.dtypes[key].itemsize
