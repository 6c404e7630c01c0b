"""Tokenized documents of one source and split: written once, mapped into memory by every rank."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from trainer.data.sources import Document
from trainer.data.tokenizers import Tokenizer

DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True)
class StreamInfo:
    """What a stream holds. Tokens include the end of every document.

    `text_bytes` is the UTF-8 size of the text (0 for sources of tokens), `token_bytes` the sum over
    its tokens: they are equal if the tokenizer loses and adds nothing.
    """

    source: str
    split: str
    documents: int
    tokens: int
    text_bytes: int
    token_bytes: int
    invalid: int
    empty: int
    domains: dict[str, int]


@dataclass(frozen=True)
class TokenStream:
    """Documents of one source and split, one after the other, each ended by the eos token.

    `ends[i]` is the position after document i's eos token.
    """

    info: StreamInfo
    tokens: npt.NDArray[Any]
    ends: npt.NDArray[np.int64]


def write_stream(
    folder: Path, source: str, split: str, documents: Iterable[Document], tokenizer: Tokenizer
) -> None:
    """Tokenize documents into `folder`; empty ones are left out and counted.

    Raises:
        ValueError: for tokens that the tokenizer does not have.
    """
    lengths = np.array([len(piece) for piece in tokenizer.token_bytes], dtype=np.int64)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
    totals: Counter[str] = Counter()
    domains: Counter[str] = Counter()
    ends: list[int] = []
    with open(_path(folder, source, split, "tokens.npy"), "wb") as file:
        _write_header(file, dtype, 0)
        for document, ids in tokenized(documents, tokenizer):
            totals["invalid"] += document.invalid
            if not len(ids):
                totals["empty"] += 1
                continue
            file.write(ids.astype(dtype).tobytes())
            ends.append(totals["tokens"] + len(ids))
            totals["tokens"] += len(ids)
            totals["token_bytes"] += int(lengths[ids].sum())
            totals["text_bytes"] += len((document.text or "").encode())
            domains[document.domain] += len(ids)
        file.seek(0)
        _write_header(file, dtype, totals["tokens"])
    np.save(_path(folder, source, split, "ends.npy"), np.array(ends, dtype=np.int64))
    counts = ("tokens", "text_bytes", "token_bytes", "invalid", "empty")
    info = StreamInfo(
        source=source,
        split=split,
        documents=len(ends),
        domains=dict(domains),
        **{name: totals[name] for name in counts},
    )
    text = json.dumps(asdict(info), indent=1)
    _path(folder, source, split, "info.json").write_text(text, encoding="utf-8")


def read_stream(folder: Path, source: str, split: str, *, mapped: bool) -> TokenStream:
    """A stream that `write_stream` wrote; `mapped`: leave the tokens on disk until used."""
    info = json.loads(_path(folder, source, split, "info.json").read_text(encoding="utf-8"))
    path, ends = (
        _path(folder, source, split, "tokens.npy"),
        _path(folder, source, split, "ends.npy"),
    )
    # an empty file cannot be mapped
    mode: Any = "r" if mapped and info["tokens"] else None
    tokens = np.load(path, mmap_mode=mode, allow_pickle=False)
    return TokenStream(StreamInfo(**info), tokens, np.load(ends, allow_pickle=False))


def tokenized(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, npt.NDArray[Any]]]:
    """Documents with their tokens and an eos token at the end; no tokens at all for empty ones.

    Raises:
        ValueError: for tokens that the tokenizer does not have.
    """
    rest = iter(documents)
    while group := list(itertools.islice(rest, DOCUMENTS_PER_CALL)):
        texts = [document.text for document in group if document.text is not None]
        encoded = iter(tokenizer.encode_batch(texts) if texts else [])
        for document in group:
            ids = next(encoded) if document.tokens is None else document.tokens
            if len(ids):
                _check_ids(document, ids, tokenizer.vocab_size)
                if ids[-1] != tokenizer.eos_id:
                    ids = np.append(ids, ids.dtype.type(tokenizer.eos_id))
            yield document, ids


def _check_ids(document: Document, ids: npt.NDArray[Any], vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"document {document.id} has token {low if low < 0 else high}, but the tokenizer has "
            f"ids 0 to {vocab_size - 1}; give data.tokenizer the one that wrote it"
        )


def _write_header(file: IO[bytes], dtype: np.dtype[Any], length: int) -> None:
    """The header of a .npy file; its size does not depend on the length (NumPy leaves room)."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _path(folder: Path, source: str, split: str, ending: str) -> Path:
    return folder / f"{source}.{split}.{ending}"
