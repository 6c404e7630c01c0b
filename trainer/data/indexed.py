"""Read and write the indexed datasets of megatron-core: tokens in a .bin, documents in a .idx."""

from __future__ import annotations

import itertools
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.sources import Document
from trainer.data.streams import tokenized
from trainer.data.tokenizers import Tokenizer

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEAD_BYTES = 34


def read_indexed(prefix: str) -> Iterator[npt.NDArray[Any]]:
    """The tokens of every document of `prefix.bin` and `prefix.idx`.

    Raises:
        ValueError: if the pair is missing or damaged, or megatron-core is not installed.
    """
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        if not path.is_file():
            raise ValueError(f"{path} is missing; an indexed dataset is a .bin and a .idx file")
    _check_index(Path(f"{prefix}.idx"))
    dataset = _indexed_module().IndexedDataset(prefix, mmap=True)
    needed = int(dataset.sequence_lengths.astype(np.int64).sum()) * dataset.index.dtype_size
    size = Path(f"{prefix}.bin").stat().st_size
    if size != needed:
        raise ValueError(f"{prefix}.bin has {size} bytes, but its index needs {needed}")
    bounds = dataset.document_indices
    nothing = np.empty(0, dtype=dataset.index.dtype)
    for first, last in itertools.pairwise(bounds):
        yield np.concatenate([nothing, *(dataset.get(number) for number in range(first, last))])


def _check_index(path: Path) -> None:
    """Refuse a file that is no index, or not a whole one, before megatron-core trips over it."""
    with open(path, "rb") as file:
        head = file.read(INDEX_HEAD_BYTES)
    if len(head) < INDEX_HEAD_BYTES or not head.startswith(INDEX_MAGIC):
        raise ValueError(f"{path} is not an index of megatron-core; it must start with MMIDIDX")
    version, _, sequences, bounds = struct.unpack_from("<QBQQ", head, len(INDEX_MAGIC))
    needed = INDEX_HEAD_BYTES + 12 * sequences + 8 * bounds
    if version != 1 or path.stat().st_size != needed:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes and version {version}, but an index of "
            f"{sequences} sequences of text must have {needed} and version 1; it is damaged, or "
            f"of another kind"
        )


def write_indexed(prefix: Path, documents: Iterable[Document], tokenizer: Tokenizer) -> int:
    """Write documents, each ended by the eos token, as a .bin and .idx pair; returns the tokens.

    Writes nothing and returns 0 if there are no documents.

    Raises:
        ValueError: if the pair exists, or megatron-core is not installed.
    """
    module = _indexed_module()
    paths = [Path(module.get_bin_path(str(prefix))), Path(module.get_idx_path(str(prefix)))]
    for path in paths:
        if path.exists():
            raise ValueError(f"{path} exists; remove it, or write to another folder")
    dtype = module.DType.optimal_dtype(tokenizer.vocab_size)
    builder = module.IndexedDatasetBuilder(str(paths[0]), dtype=dtype)
    total = 0
    for _, ids in tokenized(documents, tokenizer):
        if len(ids):
            builder.add_document(ids, [len(ids)])
            total += len(ids)
    builder.finalize(str(paths[1]))
    if not total:
        for path in paths:
            path.unlink()
    return total


def _indexed_module() -> ModuleType:
    """`megatron.core.datasets.indexed_dataset`, without the warnings about optional packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from megatron.core.datasets import indexed_dataset
        except ImportError as error:
            raise ValueError(
                f"indexed datasets need the packages megatron-core and einops ({error}); install "
                f"them with: pip install megatron-core==0.16.1 einops"
            ) from error
    return indexed_dataset
