"""Indexed datasets: megatron-core reads what we write, and we read what it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.trainer.data_corpus import documents, prose, write_texts
from trainer.data.__main__ import main
from trainer.data.build import load_data
from trainer.data.indexed import read_indexed, write_indexed
from trainer.data.sources import Document, Indexed, Reading, TextFiles
from trainer.data.tokenizers import ByteTokenizer, HFTokenizer

pytest.importorskip("megatron.core", reason="megatron-core is optional")
EOS = ByteTokenizer.eos_id


def some(count: int) -> list[Document]:
    return [Document(str(n), "d", prose(n, n % 9 + 1)) for n in range(count)]


def test_megatron_reads_what_we_write(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    wrote = [*some(30), Document("empty", "d", ""), Document("t", "d", tokens=np.array([5, EOS]))]
    total = write_indexed(tmp_path / "a", wrote, ByteTokenizer())
    want = [[*(d.text or "").encode(), EOS] for d in wrote[:30]] + [[5, EOS]]
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert [dataset[n].tolist() for n in range(len(dataset))] == want
    assert dataset.index.dtype == np.uint16
    assert dataset.document_indices.tolist() == list(range(32))
    assert sum(map(len, want)) == total
    assert [ids.tolist() for ids in read_indexed(str(tmp_path / "a"))] == want


def test_we_read_what_megatron_writes(tmp_path: Path) -> None:
    """Documents of several sentences and of none, in 32 bits, with and without an eos token."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=np.int32)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.end_document()
    builder.add_document([7, EOS], [2])
    builder.finalize(f"{tmp_path}/a.idx")
    read = [d.tokens for d in documents(Indexed(f"{tmp_path}/a"), "train", Reading(0))]
    assert [ids.tolist() for ids in read if ids is not None] == [[1, 2, 3, 4, 5], [], [7, EOS]]
    data = load_data(
        {"indexed": Indexed(f"{tmp_path}/a")},
        ByteTokenizer(),
        seq_len=4,
        validation_fraction=0,
    )
    assert data.train.streams[0].tokens.tolist() == [1, 2, 3, 4, 5, EOS, 7, EOS]
    assert data.infos[0].empty == 1


def test_training_on_text_and_on_its_tokens_is_the_same(tmp_path: Path) -> None:
    """Through the command, with the splits it wrote."""
    folder = write_texts(tmp_path / "text", 40)
    arguments = ["data=text", f"data.sources.text.paths={folder}/*.txt"]
    out = tmp_path / "out"
    assert main([str(out), *arguments, "data.validation_fraction=0.2"]) == 0
    tokenizer = HFTokenizer(str(out / "tokenizer"))
    indexed = Indexed(f"{out}/text.train", validation_prefix=f"{out}/text.validation")
    results = [
        load_data({"s": source}, tokenizer, seq_len=16, validation_fraction=0.2)
        for source in (indexed, TextFiles(f"{folder}/*.txt"))
    ]
    for ours, theirs in zip(
        (results[0].train, results[0].validation),
        (results[1].train, results[1].validation),
        strict=True,
    ):
        assert ours is not None and theirs is not None
        assert ours.streams[0].tokens.tolist() == theirs.streams[0].tokens.tolist()
    for split in ("train", "validation"):
        assert len(documents(indexed, split)) > 2
    assert results[0].infos[0].token_bytes == results[1].infos[0].text_bytes


def test_the_command_writes_over_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_texts(tmp_path / "text", 40)
    arguments = [f"{tmp_path}/out", "data=text", f"data.sources.text.paths={folder}/*.txt"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    tokens = (tmp_path / "out" / "text.train.bin").stat().st_size // 2
    assert f"text.train.bin: {tokens} tokens" in said
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert main(arguments) == 1
    assert "out/tokenizer exists; remove it" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=text"], "error: missing values: data.sources.text.paths; give them as"),
        (["data=txt"], "error: data=txt: no such choice; did you mean text?"),
        (
            ["data=text", "data.sources.text.paths=x/*", "+data.sources.text.sep=3"],
            "error: data.sources.text.sep: trainer.data.sources.TextFiles has no such argument",
        ),
        (["data=text", "data.sources.text.paths=x/*"], "error: x/* matches no file"),
    ],
)
def test_the_command_explains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([f"{tmp_path}/out", *arguments]) == 1
    assert capsys.readouterr().err.startswith(message)


def test_the_command_trains_a_tokenizer(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "text", 80)
    arguments = [f"{tmp_path}/out", "data=text", f"data.sources.text.paths={folder}/*.txt"]
    bpe = ["data/tokenizer=bpe", "data.tokenizer.vocab_size=280"]
    assert main([*arguments, *bpe, f"data.cache_dir={tmp_path}/cache"]) == 0
    tokenizer = HFTokenizer(f"{tmp_path}/out/tokenizer")
    assert tokenizer.vocab_size == 280
    text = [tokenizer.decode(ids.tolist()) for ids in read_indexed(f"{tmp_path}/out/text.train")]
    assert set(text) <= {file.read_text() for file in folder.iterdir()}


def test_limit_counts_bytes_of_the_bin_file(tmp_path: Path) -> None:
    write_indexed(tmp_path / "a", some(200), ByteTokenizer())
    read = documents(Indexed(f"{tmp_path}/a"), "train", Reading(0.5, num_bytes=1000))
    sizes = [d.tokens.nbytes for d in read if d.tokens is not None]
    assert sum(sizes[:-1]) < 500 <= sum(sizes)


def test_tokens_of_another_tokenizer(tmp_path: Path) -> None:
    write_indexed(tmp_path / "a", some(20), ByteTokenizer())

    class Small(ByteTokenizer):
        vocab_size = 100

    message = r"document .*a:\d+ has token \d+, but the tokenizer has ids 0 to 99"
    with pytest.raises(ValueError, match=message):
        load_data({"a": Indexed(f"{tmp_path}/a")}, Small(), seq_len=8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no bin", r"a\.bin is missing; an indexed dataset is a \.bin and a \.idx file"),
        ("short bin", r"a\.bin has \d+ bytes, but its index needs \d+"),
        ("short idx", r"a\.idx has 40 bytes and version 1, but an index of 20 sequences"),
        ("long idx", r"a\.idx has \d+ bytes and version 1, but an index of 20 sequences"),
        ("other idx", r"a\.idx is not an index of megatron-core"),
        ("empty idx", r"a\.idx is not an index of megatron-core"),
    ],
)
def test_damaged_pairs(tmp_path: Path, damage: str, message: str) -> None:
    write_indexed(tmp_path / "a", some(20), ByteTokenizer())
    binary, index = tmp_path / "a.bin", tmp_path / "a.idx"
    if damage == "no bin":
        binary.unlink()
    elif damage == "short bin":
        binary.write_bytes(binary.read_bytes()[:-4])
    else:
        content = index.read_bytes()
        index.write_bytes(
            {"short": content[:40], "long ": content * 2, "other": b"x" * 99, "empty": b""}[
                damage[:5]
            ]
        )
    with pytest.raises(ValueError, match=message):
        list(read_indexed(str(tmp_path / "a")))
