"""A strong trivial baseline: a byte model of order 3, scored on what the model is scored on.

Each order interpolates with the next lower one by Witten and Bell's estimate: in a context seen
n times with t different symbols after it, P(s) = (count(s) + t * P_lower(s)) / (n + t); below
order 0 all symbols are equally likely. Symbols are the 256 bytes and the end of a document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data.build import Data
from trainer.data.packing import PackedDataset
from trainer.data.streams import TokenStream
from trainer.data.tokenizers import Tokenizer

NUM_SYMBOLS = 257
END = 256
ORDER = 3
Symbols = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Order:
    """Counts of one order. A gram is a context and the symbol after it, as a number in base 257.

    `contexts`, `grams`: sorted. `totals`, `kinds`: symbols, and different ones, after a context.
    """

    grams: Symbols
    counts: Symbols
    contexts: Symbols
    totals: Symbols
    kinds: Symbols


class ByteModel:
    """Byte model of order 0 to 3 by interpolated Witten-Bell, from counts of training symbols."""

    def __init__(self, symbols: Symbols) -> None:
        grams, counts = np.unique(_grams(symbols), return_counts=True)
        self.orders = [_order(grams, counts)]
        for order in range(ORDER - 1, -1, -1):
            shorter, index = np.unique(grams % NUM_SYMBOLS ** (order + 1), return_inverse=True)
            counts = np.bincount(index, weights=counts).astype(np.int64)
            grams = shorter
            self.orders.append(_order(grams, counts))
        self.orders.reverse()

    def nats(self, symbols: Symbols) -> npt.NDArray[np.float64]:
        """-ln P of every symbol, given the three before it."""
        grams = _grams(symbols)
        probability = np.full(len(symbols), 1 / NUM_SYMBOLS)
        for length, order in enumerate(self.orders):
            gram = grams % NUM_SYMBOLS ** (length + 1)
            count = _look_up(order.grams, order.counts, gram)
            total = _look_up(order.contexts, order.totals, gram // NUM_SYMBOLS)
            kinds = _look_up(order.contexts, order.kinds, gram // NUM_SYMBOLS)
            seen = total > 0
            mixed = (count + kinds * probability) / np.maximum(total + kinds, 1)
            probability = np.where(seen, mixed, probability)
        return -np.log(probability)


def baseline_bits_per_byte(data: Data, sequence_ids: Sequence[int] | None = None) -> float:
    """Bits per byte of a `ByteModel` of the training split on the validation split.

    It scores the bytes (and document ends) of the very labels that a model is scored on, and
    divides by the same number of bytes.

    Args:
        sequence_ids: of the validation split. None: all.

    Raises:
        ValueError: if there is no validation split, or its tokens stand for no bytes.
    """
    if data.validation is None:
        raise ValueError("there is no validation split; set data.validation_fraction above 0")
    pieces, lengths = _symbols_of_ids(data.tokenizer)
    model = ByteModel(np.concatenate([_symbols(s, pieces, lengths) for s in data.train.streams]))
    ids = range(len(data.validation)) if sequence_ids is None else sequence_ids
    nats = 0.0
    for stream in data.validation.streams:
        scored = _scored_tokens(data.validation, stream, ids)
        of_symbols = model.nats(_symbols(stream, pieces, lengths))
        nats += float(of_symbols[np.repeat(scored, lengths[stream.tokens])].sum())
    num_bytes = data.validation.label_bytes(ids)
    if not num_bytes:
        raise ValueError("the validation labels stand for no bytes; use a tokenizer of text")
    return nats / math.log(2) / num_bytes


def _scored_tokens(
    dataset: PackedDataset, stream: TokenStream, ids: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """Which tokens of a stream are labels, not ignored, in these sequences."""
    scored = np.zeros(len(stream.tokens), dtype=bool)
    for number in ids:
        owner, start = dataset.locate(number)
        if owner is stream:
            scored[start + 1 : start + dataset.seq_len + 1] = True
    if not dataset.cross_documents:
        scored[stream.ends[:-1]] = False
    return scored


def _symbols_of_ids(tokenizer: Tokenizer) -> tuple[Symbols, Symbols]:
    """Symbols of every token id `[vocab, longest]` (padded), and how many each has `[vocab]`."""
    spelled = [list(piece) for piece in tokenizer.token_bytes]
    spelled[tokenizer.eos_id] = [END]
    lengths = np.array([len(symbols) for symbols in spelled], dtype=np.int64)
    pieces = np.zeros((len(spelled), int(lengths.max())), dtype=np.int64)
    for row, symbols in zip(pieces, spelled, strict=True):
        row[: len(symbols)] = symbols
    return pieces, lengths


def _symbols(stream: TokenStream, pieces: Symbols, lengths: Symbols) -> Symbols:
    """The tokens of a stream as bytes and document ends."""
    used = np.arange(pieces.shape[1]) < lengths[stream.tokens][:, None]
    return pieces[stream.tokens][used]


def _grams(symbols: Symbols) -> Symbols:
    """Every symbol with the three before it (document ends before the first), in base 257."""
    padded = np.concatenate([np.full(ORDER, END, dtype=np.int64), symbols])
    grams = np.zeros(len(symbols), dtype=np.int64)
    for shift in range(ORDER + 1):
        grams = grams * NUM_SYMBOLS + padded[shift : shift + len(symbols)]
    return grams


def _order(grams: Symbols, counts: Symbols) -> _Order:
    contexts, first, kinds = np.unique(grams // NUM_SYMBOLS, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)
    return _Order(grams, counts, contexts, totals, kinds)


def _look_up(keys: Symbols, values: Symbols, wanted: Symbols) -> Symbols:
    """The value of each wanted key, 0 for those that are not there. `keys` is sorted."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
