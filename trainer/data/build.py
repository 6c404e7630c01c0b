"""From sources and a tokenizer to packed datasets, once per corpus and shared by all ranks."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hydra.utils import instantiate

from configs.schema import DataConfig
from trainer.data.batches import GlobalBatches, Mixture
from trainer.data.files import FileDigests
from trainer.data.packing import PackedDataset
from trainer.data.sources import SPLITS, Reading, Source, Split, corpus_key
from trainer.data.streams import StreamInfo, TokenStream, read_stream, write_stream
from trainer.data.tokenizers import HFTokenizer, Tokenizer, TrainedBPE

FORMAT = 1


@dataclass(frozen=True)
class Data:
    """Everything the trainer needs of the data.

    `validation` is None if the validation fraction is 0 and no source has a split of its own for
    it. `mixture` says how many sequences an epoch takes from each source. `digest` names the
    tokenized corpus: equal digests, equal tokens.
    """

    train: PackedDataset
    validation: PackedDataset | None
    tokenizer: Tokenizer
    mixture: Mixture
    digest: str

    @property
    def token_counts(self) -> dict[str, int]:
        """Training tokens of each source, the ends of documents included."""
        return {stream.info.source: stream.info.tokens for stream in self.train.streams}

    @property
    def infos(self) -> list[StreamInfo]:
        """Documents, tokens, bytes, replaced and left out, per source and split."""
        parts = [self.train, self.validation] if self.validation else [self.train]
        return [stream.info for part in parts for stream in part.streams]

    @property
    def bytes_are_exact(self) -> bool:
        """Whether the bytes of all tokens add up to the bytes of all texts."""
        of_text = [info for info in self.infos if info.text_bytes]
        return all(info.text_bytes == info.token_bytes for info in of_text)

    def batches(self, batch_size: int, seed: int) -> GlobalBatches:
        """The stream of global training batches, with the weights of the sources."""
        return GlobalBatches(len(self.train), batch_size, seed, self.mixture)


@dataclass(frozen=True)
class Corpus:
    """Sources, how each is read, and the folder that keeps what was made of them."""

    sources: dict[str, Source]
    readings: dict[str, Reading]
    folder: Path
    may_build: bool

    def key(self, *more: object) -> str:
        """Digest of the corpus as it is now (and of `more`)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        digests = FileDigests(self.folder / "digests.json")
        key = corpus_key(self.sources, self.readings, digests, FORMAT, *more)
        if self.may_build:
            digests.save()
        return key

    def tokenizer(self, tokenizer: Tokenizer | TrainedBPE) -> Tokenizer:
        """The tokenizer itself, or the one that is trained on this corpus."""
        if not isinstance(tokenizer, TrainedBPE):
            return tokenizer
        trainer, more = tokenizer, ["bpe", tokenizer.vocab_size]
        key = self.key(*more)
        path = self._entry(
            f"tokenizer-{key}", lambda folder: trainer.train(self._texts(), folder), key, more
        )
        return HFTokenizer(str(path))

    def streams(self, tokenizer: Tokenizer) -> tuple[Path, str]:
        """Folder and digest of the tokenized corpus."""

        def build(folder: Path) -> None:
            for name, source in self.sources.items():
                for split in SPLITS:
                    documents = source.documents(split, self.readings[name])
                    write_stream(folder, name, split, documents, tokenizer)

        more = [tokenizer.fingerprint()]
        key = self.key(*more)
        return self._entry(f"tokens-{key}", build, key, more), key

    def _texts(self) -> Iterator[str]:
        """The training texts.

        Raises:
            ValueError: for a source of tokens, which a new tokenizer cannot read.
        """
        for name, source in self.sources.items():
            for document in source.documents("train", self.readings[name]):
                if document.text is None:
                    raise ValueError(
                        f"source {name} holds tokens, on which no tokenizer can be trained; give "
                        f"data.tokenizer the one that wrote them"
                    )
                yield document.text

    def _entry(
        self, name: str, build: Callable[[Path], None], key: str, more: Sequence[object]
    ) -> Path:
        """A folder of this name that `build` filled, now or in an earlier run; it is all there or
        not at all."""
        path = self.folder / name
        if path.exists():
            return path
        if not self.may_build:
            raise ValueError(
                f"{path} is missing: rank 0 did not write it, or data.cache_dir is not a folder "
                f"that all ranks share; see rank 0's message, or set data.cache_dir=null"
            )
        partial = self.folder / f".{name}.{secrets.token_hex(4)}"
        partial.mkdir()
        try:
            build(partial)
            if self.key(*more) != key:
                raise ValueError(
                    "the files of data.sources changed while they were read; try again"
                )
            try:
                os.rename(partial, path)
            except OSError:
                if not path.exists():  # else another job was faster, with the same content
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return path


def build_data(
    config: DataConfig,
    seq_len: int,
    *,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> Data:
    """The data that a configuration describes; see `load_data`."""
    return load_data(
        instantiate(config.sources, _convert_="all"),
        instantiate(config.tokenizer, _convert_="all"),
        seq_len=seq_len,
        weights=config.weights or None,
        validation_fraction=config.validation_fraction,
        invalid_utf8=config.invalid_utf8.value,
        num_bytes=config.num_bytes,
        cross_documents=config.pack.cross_documents,
        reset_positions=config.pack.reset_positions,
        cache_dir=config.cache_dir,
        rank=rank,
        barrier=barrier,
    )


def load_data(
    sources: dict[str, Source],
    tokenizer: Tokenizer | TrainedBPE,
    *,
    seq_len: int,
    weights: Mapping[str, float] | None = None,
    validation_fraction: float = 0.05,
    invalid_utf8: str = "replace",
    num_bytes: int | None = None,
    cross_documents: bool = False,
    reset_positions: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> Data:
    """Tokenize and pack a corpus; every rank calls it and gets the same.

    With `cache_dir`, rank 0 writes the tokens there unless they are there for this very content,
    and all ranks map the same files; without, every rank reads and tokenizes into its own memory.

    Args:
        weights: share of each source in the training batches; sources with 0 are left out.
        num_bytes: of text over all sources: equal parts, or parts by weight.
        barrier: returns when all ranks have called it; called once per rank, with `cache_dir` only.

    Raises:
        ValueError: for what the user has to change: empty or unreadable sources, weights that do
            not fit them, an empty split, a tokenizer that cannot be trained on them.
    """
    sources, weights = used_sources(sources, weights)
    readings = source_readings(sources, weights, validation_fraction, invalid_utf8, num_bytes)

    def load(folder: Path, *, may_build: bool, mapped: bool) -> Data:
        corpus = Corpus(sources, readings, folder, may_build)
        ready = corpus.tokenizer(tokenizer)
        path, digest = corpus.streams(ready)
        splits: dict[Split, list[TokenStream]] = {
            split: [read_stream(path, name, split, mapped=mapped) for name in sources]
            for split in SPLITS
        }
        _check_not_empty(splits["train"], splits["validation"], readings)
        token_lengths = np.array([len(piece) for piece in ready.token_bytes], dtype=np.int64)
        train, validation = (
            PackedDataset(
                [stream for stream in splits[split] if stream.info.tokens],
                seq_len,
                token_lengths=token_lengths,
                eos_id=ready.eos_id,
                cross_documents=cross_documents,
                reset_positions=reset_positions,
            )
            for split in SPLITS
        )
        mixture = Mixture.build(train.sizes, weights)
        return Data(train, validation if len(validation) else None, ready, mixture, digest)

    if cache_dir is None:
        if isinstance(tokenizer, TrainedBPE):
            raise ValueError(
                "data.cache_dir (null) must be a folder for a tokenizer that is trained, so that "
                "every rank and every later run uses the same one; set data.cache_dir"
            )
        with tempfile.TemporaryDirectory() as scratch:
            return load(Path(scratch), may_build=True, mapped=False)
    if rank == 0:
        try:
            return load(Path(cache_dir), may_build=True, mapped=True)
        finally:
            barrier()
    barrier()
    return load(Path(cache_dir), may_build=False, mapped=True)


def used_sources(
    sources: dict[str, Source], weights: Mapping[str, float] | None
) -> tuple[dict[str, Source], dict[str, float] | None]:
    """The sources that have a weight above 0, and those weights.

    Raises:
        ValueError: if there are none, or for weights that do not fit them.
    """
    if not sources:
        raise ValueError("data.sources is empty; choose a data group such as data=stdlib")
    for name in sources:
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"data.sources.{name}: a name must be letters, digits, _ and - only")
    if weights is None:
        return sources, None
    Mixture.build(dict.fromkeys(sources, 1), weights)
    used = {name: weight for name, weight in weights.items() if weight > 0}
    return {name: source for name, source in sources.items() if name in used}, used


def source_readings(
    sources: dict[str, Source],
    weights: Mapping[str, float] | None,
    validation_fraction: float,
    invalid_utf8: str,
    num_bytes: int | None,
) -> dict[str, Reading]:
    """How each source is read; the limit of bytes falls to them by weight, or in equal parts."""
    readings = {}
    for name in sources:
        share = weights[name] / sum(weights.values()) if weights else 1 / len(sources)
        part = None if num_bytes is None else max(1, int(num_bytes * share))
        readings[name] = Reading(validation_fraction, invalid_utf8, part)
    return readings


def _check_not_empty(
    train: list[TokenStream], validation: list[TokenStream], readings: dict[str, Reading]
) -> None:
    """Refuse a source without training text, and a validation split without any."""
    for ours, theirs in zip(train, validation, strict=True):
        name = ours.info.source
        if not ours.info.tokens:
            empty = ours.info.empty + theirs.info.empty
            raise ValueError(
                f"data.sources.{name} has no text to train on: it has {theirs.info.documents} "
                f"documents for validation and {empty} empty ones; give it more documents, or a "
                f"separator that cuts files into several"
            )
    fraction = next(iter(readings.values())).validation_fraction
    if fraction > 0 and not any(stream.info.tokens for stream in validation):
        documents = sum(stream.info.documents for stream in train)
        raise ValueError(
            f"the validation split is empty: none of the {documents} documents fell into "
            f"data.validation_fraction ({fraction}); raise it, give more documents, set a "
            f"separator that cuts files into several, give the source validation_paths, or set "
            f"the fraction to 0 to train without validation"
        )
