"""From sources to packed data: the cache, its keys, the ranks, and what is refused."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.compose import load
from tests.trainer.data_corpus import prose, write_texts
from trainer.data.build import Data, build_data, load_data
from trainer.data.sources import Document, JsonLines, Source, TextFiles
from trainer.data.tokenizers import ByteTokenizer, TrainedBPE


def texts_of(folder: Path) -> dict[str, Source]:
    return {"text": TextFiles(f"{folder}/*.txt")}


def cached(folder: Path, **options: Any) -> Data:
    """Data of folder/text, with the cache in folder/cache."""
    given: dict[str, Any] = {
        "sources": texts_of(folder / "text"),
        "tokenizer": ByteTokenizer(),
        "seq_len": 32,
        "validation_fraction": 0.2,
        "cache_dir": folder / "cache",
    }
    return load_data(**(given | options))


def tokens(data: Data) -> list[list[int]]:
    parts = [data.train, *([data.validation] if data.validation else [])]
    return [stream.tokens.tolist() for part in parts for stream in part.streams]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir() if path.is_dir())


def test_cached_and_in_memory_are_equal(tmp_path: Path) -> None:
    write_texts(tmp_path / "text", 50)
    on_disk, in_memory = cached(tmp_path), cached(tmp_path, cache_dir=None)
    assert tokens(on_disk) == tokens(in_memory)
    assert on_disk.digest == in_memory.digest
    assert isinstance(on_disk.train.streams[0].tokens, np.memmap)
    assert not isinstance(in_memory.train.streams[0].tokens, np.memmap)


def test_counts(tmp_path: Path) -> None:
    write_texts(tmp_path / "text", 50)
    (tmp_path / "text" / "empty.txt").write_text("")
    (tmp_path / "text" / "bad.txt").write_bytes(b"a\xffb")
    data = cached(tmp_path)
    sizes = [path.stat().st_size for path in (tmp_path / "text").iterdir()]
    assert sum(info.text_bytes for info in data.infos) == sum(sizes) + 2  # U+FFFD has 3 bytes
    assert sum(info.tokens for info in data.infos) == sum(sizes) + 2 + 51
    assert sum(info.documents for info in data.infos) == 51
    assert sum(info.empty for info in data.infos) == 1
    assert sum(info.invalid for info in data.infos) == 1
    assert data.bytes_are_exact
    assert data.token_counts == {"text": data.infos[0].tokens}
    assert all(sum(info.domains.values()) == info.tokens for info in data.infos)


def test_a_second_run_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "text", 50)
    first = cached(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(TextFiles, "documents", refuse)
    monkeypatch.setattr("trainer.data.files._plain_chunks", refuse)
    assert tokens(cached(tmp_path)) == tokens(first)
    cached(tmp_path, seq_len=7, cross_documents=True)  # packing is not part of the cache


def test_what_changes_the_tokens_changes_the_cache(tmp_path: Path) -> None:
    write_texts(tmp_path / "text", 50)
    first = cached(tmp_path)
    file = tmp_path / "text" / "040.txt"
    times = file.stat()
    other = bytearray(file.read_bytes())
    other[0] ^= 1

    def rewrite() -> None:
        file.write_bytes(other)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    changes: list[dict[str, Any] | Callable[[], None]] = [
        {"validation_fraction": 0.3},
        {"num_bytes": 1000},
        {"invalid_utf8": "refuse"},
        {"tokenizer": TrainedBPE(270)},
        {"sources": {"other": TextFiles(f"{tmp_path}/text/*.txt")}},
        {"sources": {"text": TextFiles(f"{tmp_path}/text/*.txt", separator=" a ")}},
        rewrite,
        file.unlink,
    ]
    digests = [first.digest]
    for change in changes:
        if isinstance(change, dict):
            digests.append(cached(tmp_path, **change).digest)
        else:
            change()
            digests.append(cached(tmp_path).digest)
    assert len(set(digests)) == len(digests)


def test_a_corpus_that_changes_while_it_is_read(tmp_path: Path) -> None:
    write_texts(tmp_path / "text", 50)

    class Writing(ByteTokenizer):
        def encode(self, text: str) -> np.ndarray:
            (tmp_path / "text" / "000.txt").write_text("new")
            return super().encode(text)

    with pytest.raises(ValueError, match="changed while they were read"):
        cached(tmp_path, tokenizer=Writing())
    assert entries(tmp_path) == []


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    write_texts(tmp_path / "text", 50)
    (tmp_path / "text" / "bad.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"bad\.txt: invalid UTF-8 at byte 1"):
        cached(tmp_path, invalid_utf8="refuse")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TrainedBPE(270)])
def test_ranks_share_what_rank_0_writes(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path / "text", 50)
    barrier = threading.Barrier(3)
    results: dict[int, Data] = {}

    def rank(number: int) -> None:
        results[number] = cached(
            tmp_path, tokenizer=tokenizer, rank=number, barrier=lambda: barrier.wait(30) and None
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tokens(results[0]) == tokens(results[1]) == tokens(results[2])
    assert len({data.digest for data in results.values()}) == 1
    assert len(entries(tmp_path)) == (2 if isinstance(tokenizer, TrainedBPE) else 1)


def test_other_ranks_do_not_wait_for_a_failed_rank_0(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("")
    calls: list[int] = []
    with pytest.raises(ValueError, match="no text to train on"):
        cached(tmp_path, rank=0, barrier=lambda: calls.append(0))
    assert calls == [0]
    write_texts(tmp_path / "text", 50)
    with pytest.raises(
        ValueError, match=r"is missing: rank 0 did not write it, or data\.cache_dir"
    ):
        cached(tmp_path, rank=1, barrier=lambda: calls.append(1))
    assert calls == [0, 1]


def test_two_jobs_build_the_same_cache(tmp_path: Path) -> None:
    """The slower one takes what the faster one wrote."""
    write_texts(tmp_path / "text", 50)

    class Slow(ByteTokenizer):
        def encode(self, text: str) -> np.ndarray:
            cached(tmp_path)
            return super().encode(text)

    data = cached(tmp_path, tokenizer=Slow())
    assert len(entries(tmp_path)) == 1
    assert tokens(data) == tokens(cached(tmp_path))


def test_mixtures(tmp_path: Path) -> None:
    write_texts(tmp_path / "text", 50)
    write_texts(tmp_path / "more", 90, words=70)
    sources = texts_of(tmp_path / "text") | {"more": TextFiles(f"{tmp_path}/more/*")}
    plain = cached(tmp_path, sources=sources)
    assert list(plain.token_counts) == ["text", "more"]
    assert plain.mixture.draws == plain.mixture.sizes == tuple(plain.train.sizes.values())
    data = cached(tmp_path, sources=sources, weights={"text": 3, "more": 1})
    ids = data.batches(len(data.train), seed=0).next()
    of_text = sum(number < data.train.sizes["text"] for number in ids)
    assert of_text / len(ids) == pytest.approx(0.75, abs=1 / len(ids))
    alone = cached(tmp_path, sources=sources, weights={"text": 1, "more": 0})
    assert list(alone.token_counts) == ["text"]
    assert alone.digest == cached(tmp_path).digest


def test_a_limit_falls_to_sources_by_weight(tmp_path: Path) -> None:
    sources = texts_of(write_texts(tmp_path / "text", 300))
    sources["more"] = TextFiles(f"{write_texts(tmp_path / 'more', 300)}/*")
    options = {"sources": sources, "num_bytes": 8000, "validation_fraction": 0.5}
    for weights, want in ((None, (2000, 2000)), ({"text": 3, "more": 1}, (3000, 1000))):
        data = cached(tmp_path, weights=weights, **options)
        for info in data.infos:
            goal = want[info.source == "more"]
            assert goal <= info.text_bytes < goal + 300


def test_documents_longer_than_the_context(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(prose(number, 500))
    data = cached(tmp_path, seq_len=64)
    total = sum(info.text_bytes for info in data.infos)
    assert data.validation is not None
    labels = sum(part.label_bytes(range(len(part))) for part in (data.train, data.validation))
    assert labels == total - 40  # first bytes are predicted from nothing


def test_without_validation(tmp_path: Path) -> None:
    write_texts(tmp_path / "text", 5)
    assert cached(tmp_path, validation_fraction=0).validation is None


class Nothing:
    def documents(self, split: str, reading: object) -> list[Document]:
        return []

    def fingerprint(self, digests: object) -> str:
        return "nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {}}, r"data\.sources is empty; choose a data group"),
        ({"sources": {"a/b": Nothing()}}, r"data\.sources\.a/b: a name must be letters"),
        ({"sources": {"x": Nothing()}}, r"data\.sources\.x has no text to train on: .* separator"),
        ({"weights": {"a": 1}}, r"data\.weights names \['a'\] but data\.sources has \['text'\]"),
        (
            {"validation_fraction": 0.0001},
            r"validation split is empty: none of the 50 documents .*\(0\.0001\); raise it",
        ),
        (
            {"tokenizer": TrainedBPE(270), "cache_dir": None},
            r"data\.cache_dir \(null\) must be a folder for a tokenizer that is trained",
        ),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_texts(tmp_path / "text", 50)
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, **options)


def test_from_a_configuration(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"body": prose(n)}) + "\n" for n in range(100))
    (tmp_path / "a.jsonl").write_text(lines)
    config = load(
        "experiment=quickstart",
        "data=jsonl",
        f"data.sources.jsonl.paths=[{tmp_path}/a.jsonl]",
        "data.sources.jsonl.field=body",
        "data.pack.cross_documents=true",
        "data.invalid_utf8=refuse",
        "data/tokenizer=bpe",
        "data.tokenizer.vocab_size=280",
        f"data.cache_dir={tmp_path}/cache",
    )
    data = build_data(config.data, 256)
    want = load_data(
        {"jsonl": JsonLines(f"{tmp_path}/a.jsonl", field="body")},
        TrainedBPE(280),
        seq_len=256,
        invalid_utf8="refuse",
        cross_documents=True,
        cache_dir=tmp_path / "cache",
    )
    assert data.tokenizer.vocab_size == 280
    assert tokens(data) == tokens(want)
    assert (data.train.cross_documents, data.train.seq_len) == (True, 256)
