"""Several indexed datasets of megatron-core blend by weight, as its own blend does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from configs.schema import DataConfig
from tests.trainer.data_corpus import prose
from trainer.data.__main__ import data_config
from trainer.data.build import build_data
from trainer.data.tokenizers import ByteTokenizer

indexed_dataset = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="megatron-core is optional"
)
EOS, SEQ_LEN = ByteTokenizer.eos_id, 16
DOCUMENTS = {"web": 300, "code": 40, "books": 7}  # so many, whatever their weights
WEIGHTS = {"web": 5, "code": 3, "books": 2}


def write(path: Path, count: int, first: int) -> list[int]:
    """A pair of files, written by megatron-core; all of its tokens."""
    builder = indexed_dataset.IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    tokens: list[int] = []
    for number in range(first, first + count):
        ids = [*prose(number, 5 + number % 30).encode(), EOS]
        builder.add_document(ids, [len(ids)])
        tokens += ids
    builder.finalize(f"{path}.idx")
    return tokens


def blend(folder: Path, **weights: float) -> DataConfig:
    """The configuration of a command: one source of data=indexed, and more beside it."""
    first, *more = DOCUMENTS
    sources = [f"data.sources.indexed.prefix={folder}/{first}"]
    for name in more:
        sources += [
            f"+data.sources.{name}._target_=trainer.data.sources.Indexed",
            f"+data.sources.{name}.prefix={folder}/{name}",
        ]
    names = {first: "indexed"}
    shares = [f"+data.weights.{names.get(n, n)}={weight}" for n, weight in weights.items()]
    words = ["data=indexed", "data/tokenizer=bytes", "data.validation_fraction=0"]
    return data_config([*words, "data.cache_dir=null", *sources, *shares])


def test_shares_of_an_epoch(tmp_path: Path) -> None:
    """Within one sequence of the weights, whatever the sizes; the small source comes again and
    again, every part of it as often as the others within one; the large one in part."""
    tokens = {
        name: write(tmp_path / name, count, 1000 * number)
        for number, (name, count) in enumerate(DOCUMENTS.items())
    }
    data = build_data(blend(tmp_path, **WEIGHTS), SEQ_LEN)
    sizes = [-(-(len(ids) - 1) // SEQ_LEN) for ids in tokens.values()]
    epoch, batches = sum(sizes), data.batches(batch_size=5, seed=3)
    assert len(data.train) == epoch and sizes[2] < epoch * 0.2 < 0.5 * epoch < sizes[0]
    ids = [number for _ in range(-(-epoch // 5)) for number in batches.next()][:epoch]
    bounds = np.cumsum(sizes)
    drawn = Counter(list(DOCUMENTS)[int(np.searchsorted(bounds, n, side="right"))] for n in ids)
    for name, weight in WEIGHTS.items():
        assert abs(drawn[name] - epoch * weight / sum(WEIGHTS.values())) < 1
    times = Counter(ids)
    books = [times[number] for number in range(int(bounds[1]), int(bounds[2]))]
    assert min(books) >= 2 and max(books) - min(books) <= 1
    assert {times[number] for number in range(int(bounds[0]))} == {0, 1}
    for name, last in zip(tokens, bounds, strict=True):  # and they are these very tokens
        size = sizes[list(tokens).index(name)]
        batch = data.train.batch(list(range(int(last) - size, int(last))))
        read = batch["input_ids"].flatten().tolist()
        assert read[: len(tokens[name]) - 1] == tokens[name][:-1]


def test_as_megatron_blends_them(tmp_path: Path) -> None:
    """Of as many samples megatron's own blend takes as many from every source, within one."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    for number, (name, count) in enumerate(DOCUMENTS.items()):
        write(tmp_path / name, count, 1000 * number)
    data = build_data(blend(tmp_path, **WEIGHTS), SEQ_LEN)
    prefixes = [f"{tmp_path}/{name}" for name in WEIGHTS]

    class Tokens:
        eod, pad, vocab_size = EOS, EOS + 1, EOS + 2
        unique_identifiers: ClassVar = {"class": "Tokens"}

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LEN,
        blend_per_split=[(prefixes, [float(weight) for weight in WEIGHTS.values()]), None, None],
        path_to_cache=None,
        tokenizer=Tokens(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [len(data.train), None, None]
    theirs, *_ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    found = Counter(int(source) for source in theirs.dataset_index[: len(data.train)])
    for source, draws in enumerate(data.mixture.draws):
        assert abs(found[source] - draws) <= 1
    assert sum(found.values()) == sum(data.mixture.draws)


def test_a_weight_of_no_source(tmp_path: Path) -> None:
    write(tmp_path / "web", 3, 0)
    with pytest.raises(ValueError, match=r"data\.weights names .* give every source a weight"):
        build_data(blend(tmp_path, web=1), SEQ_LEN)
