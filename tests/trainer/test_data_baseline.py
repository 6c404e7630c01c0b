"""The order-3 byte model against counting in dictionaries."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.data_corpus import small_data, write_texts
from trainer.data.baseline import END, NUM_SYMBOLS, ByteModel, baseline_bits_per_byte
from trainer.data.build import load_data
from trainer.data.sources import TextFiles
from trainer.data.tokenizers import ByteTokenizer, TrainedBPE

TRAIN = [*b"abracadabra", END, *b"abc", END, *b"\x00\x00\x00\x00", END]
HELD_OUT = [*b"cadabra", END, *b"zab", END, 0, 0, END]


def slow_probability(train: list[int], history: list[int], symbol: int) -> float:
    """Interpolated Witten-Bell over orders 0 to 3, from the definition."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    padded = [END] * 3 + train
    for index in range(3, len(padded)):
        for order in range(4):
            counts[tuple(padded[index - order : index])][padded[index]] += 1
    probability = 1 / NUM_SYMBOLS
    for order in range(4):
        after = counts[tuple(history[len(history) - order :])]
        total, kinds = sum(after.values()), len(after)
        if total:
            probability = (after[symbol] + kinds * probability) / (total + kinds)
    return probability


def test_equal_to_counting() -> None:
    got = ByteModel(np.array(TRAIN)).nats(np.array(HELD_OUT))
    history = [END] * 3
    for symbol, nats in zip(HELD_OUT, got, strict=True):
        assert nats == pytest.approx(-math.log(slow_probability(TRAIN, history, symbol)))
        history.append(symbol)


def test_probabilities_sum_to_one() -> None:
    model = ByteModel(np.array(TRAIN))
    for history in (b"abr", b"zzz", b"xab", b"\x00\x00\x00"):
        every = [model.nats(np.array([*history, symbol]))[3] for symbol in range(NUM_SYMBOLS)]
        assert sum(math.exp(-nats) for nats in every) == pytest.approx(1)


def test_scored_on_what_the_model_is_scored_on(tmp_path: Path) -> None:
    """First symbols of documents are no labels, so they cost nothing, and count as no bytes."""
    data = small_data(tmp_path, seq_len=16)
    assert data.validation is not None
    (train,), (held_out,) = data.train.streams, data.validation.streams
    symbols = held_out.tokens.tolist()
    firsts = {0, *held_out.ends.tolist()}
    ids = [0, 3, 4]
    labels = {16 * number + 1 + offset for number in ids for offset in range(16)} - firsts
    nats, num_bytes = 0.0, 0
    for index in sorted(labels & set(range(len(symbols)))):
        history = [END] * 3 + symbols[:index]
        nats -= math.log(slow_probability(train.tokens.tolist(), history, symbols[index]))
        num_bytes += symbols[index] != END
    assert baseline_bits_per_byte(data, ids) == pytest.approx(nats / math.log(2) / num_bytes)
    every = baseline_bits_per_byte(data)
    assert every == baseline_bits_per_byte(data, range(len(data.validation)))


def test_with_tokens_longer_than_a_byte(tmp_path: Path) -> None:
    """Another tokenizer sees the same bytes: only what is no label differs."""
    write_texts(tmp_path / "text", 80, words=60)
    sources = {"text": TextFiles(f"{tmp_path}/text/*")}
    results = []
    for tokenizer in (ByteTokenizer(), TrainedBPE(280)):
        data = load_data(
            sources,  # type: ignore[arg-type]
            tokenizer,
            seq_len=32,
            validation_fraction=0.3,
            cache_dir=tmp_path / "cache",
            cross_documents=True,
        )
        assert data.validation is not None and data.bytes_are_exact
        results.append(baseline_bits_per_byte(data))
    assert results[0] == pytest.approx(results[1], rel=0.01)


def test_known_entropies() -> None:
    """Four equally likely bytes cost two bits; a cycle costs almost nothing."""
    noise = np.array(random.Random(0).choices(range(4), k=60_000))
    bits = ByteModel(noise[:50_000]).nats(noise[50_000:]).mean() / math.log(2)
    assert 2.0 < bits < 2.03
    cycle = np.array([*b"abcdefgh "] * 1000)
    assert ByteModel(cycle).nats(cycle[:100])[3:].max() < 0.02
