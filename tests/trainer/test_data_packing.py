"""Packing against an oracle that walks the documents token by token."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data_corpus import small_data, stream
from trainer.data.packing import IGNORED, PackedDataset

EOS = 256
LENGTHS = np.array([1] * 256 + [0], dtype=np.int64)
Row = tuple[list[int], list[int], list[int]]


def packed(
    sources: list[list[list[int]]], seq_len: int, *, cross: bool = False, reset: bool = True
) -> PackedDataset:
    streams = [stream(documents, str(number)) for number, documents in enumerate(sources)]
    return PackedDataset(
        streams,
        seq_len,
        token_lengths=LENGTHS,
        eos_id=EOS,
        cross_documents=cross,
        reset_positions=reset,
    )


def oracle(sources: list[list[list[int]]], seq_len: int, cross: bool, reset: bool) -> list[Row]:
    """Inputs, labels and positions of every sequence, one token at a time."""
    rows = []
    for documents in sources:
        cells = []  # input, label, position in document
        for index, document in enumerate(documents):
            for position, token in enumerate([*document, EOS]):
                if position < len(document):
                    label = [*document, EOS][position + 1]
                elif cross and index + 1 < len(documents):
                    label = [*documents[index + 1], EOS][0]
                else:
                    label = IGNORED
                cells.append((token, label, position))
        for start in range(0, len(cells) - 1, seq_len):  # the last eos alone predicts nothing
            row: Row = ([], [], [])
            for offset in range(seq_len):
                if start + offset < len(cells):
                    token, label, position = cells[start + offset]
                    filling = 0
                else:
                    token, label, position = EOS, IGNORED, filling
                    filling += 1
                row[0].append(token)
                row[1].append(label)
                row[2].append(min(position, offset) if reset else offset)
            rows.append(row)
    return rows


documents_strategy = st.lists(
    st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=20), min_size=1, max_size=6),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(documents_strategy, st.integers(1, 9), st.booleans(), st.booleans())
def test_equal_to_the_oracle(
    sources: list[list[list[int]]], seq_len: int, cross: bool, reset: bool
) -> None:
    dataset = packed(sources, seq_len, cross=cross, reset=reset)
    want = oracle(sources, seq_len, cross, reset)
    assert len(dataset) == len(want)
    batch = dataset.batch(range(len(dataset)))
    got = zip(
        *(batch[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True
    )
    assert [tuple(row) for row in got] == want
    ids = list(range(len(dataset)))
    labels = [label for row in want for label in row[1]]
    assert dataset.label_bytes(ids) == sum(label not in (IGNORED, EOS) for label in labels)


def test_every_token_is_predicted_once() -> None:
    """All but the first of each document, eos included, however long the document is."""
    documents = [[n % 256 for n in range(length)] for length in (1, 200, 3, 64, 65, 63)]
    dataset = packed([documents], 64)
    labels = dataset.batch(range(len(dataset)))["labels"].flatten()
    want = [token for document in documents for token in [*document[1:], EOS]]
    assert labels[labels != IGNORED].tolist() == want


def test_sequences_of_one_source_only() -> None:
    dataset = packed([[[1] * 5], [[2] * 9]], 4)
    assert dataset.sizes == {"0": 2, "1": 3}
    inputs = dataset.batch(range(5))["input_ids"]
    assert [set(row.tolist()) - {EOS} for row in inputs] == [{1}, {1}, {2}, {2}, {2}]
    assert [dataset.locate(n)[1] for n in range(5)] == [0, 4, 0, 4, 8]
    for bad in (-2, 5):
        with pytest.raises(IndexError, match=rf"sequence id {bad} must be >= 0 and < 5"):
            dataset.locate(bad)


def test_filling_up_a_batch() -> None:
    dataset = packed([[[1, 2, 3, 4, 5]]], 3)
    batch = dataset.batch([1], pad_to=3)
    assert batch["sequence_ids"].tolist() == [1, -1, -1]
    assert (batch["labels"][1:] == IGNORED).all()
    assert all(value.dtype == torch.int64 for value in batch.values())
    empty = dataset.batch([])
    assert {name: tuple(value.shape) for name, value in empty.items()} == {
        "input_ids": (0, 3),
        "labels": (0, 3),
        "position_ids": (0, 3),
        "sequence_ids": (0,),
    }


def test_micro_batches_cover_the_batch() -> None:
    dataset = packed([[[n] * 7 for n in range(40)]], 8)
    ids = random.Random(0).sample(range(len(dataset)), 24)
    for world, micro in ((1, 24), (2, 3), (4, 6), (4, 1), (3, 4)):
        ranks = [dataset.micro_batches(ids, rank, world, micro) for rank in range(world)]
        assert {len(part) for part in ranks} == {24 // world // micro}
        assert all(len(batch["sequence_ids"]) == micro for part in ranks for batch in part)
        seen = [n for part in ranks for batch in part for n in batch["sequence_ids"].tolist()]
        assert sorted(seen) == sorted(ids)
        for part in ranks:
            for batch in part:
                same = dataset.batch(batch["sequence_ids"].tolist())
                assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_spread(tmp_path: Path) -> None:
    dataset = packed([[[1] * 99], [[2] * 99]], 10)
    assert dataset.spread(0) == list(range(20))
    assert dataset.spread(4) == [0, 5, 10, 15]
    assert dataset.spread(50) == list(range(20))


def test_from_files(tmp_path: Path) -> None:
    """The text comes back from the labels, document by document."""
    data = small_data(tmp_path, seq_len=16)
    assert data.validation is not None
    want = sorted(file.read_bytes() for file in tmp_path.glob("*.txt"))
    got = []
    for part in (data.train, data.validation):
        flat = part.batch(range(len(part)))
        inputs, labels = flat["input_ids"].flatten().tolist(), flat["labels"].flatten().tolist()
        document: list[int] = []
        for token, label in zip(inputs, labels, strict=True):
            document = document or [token]
            if label == EOS:
                got.append(bytes(document))
            document = [] if label in (EOS, IGNORED) else [*document, label]
    assert sorted(got) == want


def test_length_of_sequences() -> None:
    with pytest.raises(ValueError, match=r"train\.seq_len \(0\) must be >= 1"):
        packed([[[1]]], 0)
