"""Small corpora and streams for the tests of the data package."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from trainer.data.build import Data, load_data
from trainer.data.sources import Document, Reading, Source, TextFiles
from trainer.data.streams import StreamInfo, TokenStream
from trainer.data.tokenizers import ByteTokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "saw", "\u00e9t\u00e9", "\u65e5\u672c", "42", ".\n"]


def prose(number: int, words: int = 40) -> str:
    """Text of the given number, the same every time."""
    return " ".join(random.Random(number).choices(WORDS, k=words))


def write_texts(folder: Path, count: int, words: int = 40) -> Path:
    """`count` text files of different length in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(prose(number, 1 + number % words))
    return folder


def stream(documents: list[list[int]], name: str = "s", eos: int = 256) -> TokenStream:
    """A token stream of these documents, without the files."""
    tokens = [token for document in documents for token in [*document, eos]]
    ends = np.cumsum([len(document) + 1 for document in documents])
    info = StreamInfo(name, "train", len(documents), len(tokens), 0, 0, 0, 0, {})
    return TokenStream(info, np.array(tokens, dtype=np.uint16), ends.astype(np.int64))


def texts(source: Source, split: str, reading: Reading | None = None) -> list[str]:
    """The texts of a split."""
    return [d.text or "" for d in documents(source, split, reading)]


def documents(source: Source, split: str, reading: Reading | None = None) -> list[Document]:
    """The documents of a split."""
    assert split in ("train", "validation")
    return list(source.documents(split, reading or Reading()))  # type: ignore[arg-type]


def small_data(folder: Path, seq_len: int = 16, count: int = 60) -> Data:
    """Packed bytes of small text files."""
    write_texts(folder, count)
    sources: dict[str, Source] = {"text": TextFiles(f"{folder}/*.txt")}
    return load_data(sources, ByteTokenizer(), seq_len=seq_len, validation_fraction=0.2)
