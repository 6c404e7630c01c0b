"""Cut token streams into sequences of one length, with labels that respect documents.

B: sequences of a micro-batch. S: tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.batches import split_batch
from trainer.data.streams import TokenStream

IGNORED = -100
FILLER_ID = -1


class PackedDataset:
    """The sequences of a split, numbered through its sources; none holds text of two sources.

    Sequence i of a source has the inputs `tokens[i*S : (i+1)*S]` and as labels the token after
    each: every token but the first of the source is the label of exactly one position. The last
    sequence is filled up with eos tokens whose labels are ignored. Long documents go on in the next
    sequence.

    Args:
        streams: one per source. seq_len: S. token_lengths: bytes of every token id, `[vocab]`.
        eos_id: fills up last sequences.
        cross_documents: the end of a document predicts the start of the next one too.
        reset_positions: positions count from 0 at the start of every document, which also keeps
            attention inside documents where the model supports that.

    Raises:
        ValueError: for a length below 1.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        seq_len: int,
        *,
        token_lengths: npt.NDArray[np.int64],
        eos_id: int,
        cross_documents: bool = False,
        reset_positions: bool = True,
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"train.seq_len ({seq_len}) must be >= 1")
        self.streams, self.seq_len, self.eos_id = list(streams), seq_len, eos_id
        self.token_lengths = token_lengths
        self.cross_documents, self.reset_positions = cross_documents, reset_positions
        counts = [max(0, -(-(len(stream.tokens) - 1) // seq_len)) for stream in streams]
        self.sizes = {s.info.source: n for s, n in zip(streams, counts, strict=True)}
        self._first_ids = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._first_ids[-1])

    def batch(self, ids: Sequence[int], pad_to: int | None = None) -> dict[str, Tensor]:
        """One micro-batch: input_ids, labels (already shifted, -100 = ignored) and position_ids,
        all int64 [B, S], and sequence_ids int64 [B].

        Args:
            ids: sequences, in order. pad_to: add sequences without labels (id -1) up to this B.
        """
        padded = list(ids) + [FILLER_ID] * max(0, (pad_to or 0) - len(ids))
        rows = [self._sequence(number) for number in padded]
        empty = torch.empty(0, self.seq_len, dtype=torch.int64)
        names = ("input_ids", "labels", "position_ids")
        columns = zip(*rows, strict=True) if rows else ((), (), ())
        result = {
            name: torch.from_numpy(np.stack(column)) if column else empty
            for name, column in zip(names, columns, strict=True)
        }
        return result | {"sequence_ids": torch.tensor(padded, dtype=torch.int64)}

    def micro_batches(
        self, ids: list[int], rank: int, world: int, micro_batch_size: int
    ) -> list[dict[str, Tensor]]:
        """One rank's micro-batches of a global batch; equally many on every rank.

        Raises:
            ValueError: if the batch cannot be split evenly.
        """
        parts = split_batch(ids, rank, world, micro_batch_size)
        return [self.batch(part) for part in parts]

    def spread(self, limit: int) -> list[int]:
        """At most `limit` sequence ids (0: all), at equal distances through all sources."""
        count = min(limit, len(self)) if limit else len(self)
        return [index * len(self) // count for index in range(count)]

    def label_bytes(self, ids: Sequence[int]) -> int:
        """Bytes of text that the labels of these sequences stand for, ignored ones left out."""
        total = 0
        for number in ids:
            labels = self._sequence(number)[1]
            total += int(self.token_lengths[labels[labels != IGNORED]].sum())
        return total

    def sources_of(self, sequence_ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Which source each sequence is from, by place in `streams`; 0 for filler."""
        return np.maximum(0, np.searchsorted(self._first_ids, sequence_ids, side="right") - 1)

    def locate(self, sequence_id: int) -> tuple[TokenStream, int]:
        """The stream of a sequence, and where in it the sequence starts.

        Raises:
            IndexError: if there is no such sequence.
        """
        if not 0 <= sequence_id < len(self):
            raise IndexError(f"sequence id {sequence_id} must be >= 0 and < {len(self)}")
        source = int(np.searchsorted(self._first_ids, sequence_id, side="right")) - 1
        return self.streams[source], (sequence_id - int(self._first_ids[source])) * self.seq_len

    def _sequence(self, sequence_id: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Inputs, labels and positions of one sequence, each int64 [S]."""
        length = self.seq_len
        inputs = np.full(length, self.eos_id, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        positions = np.arange(length, dtype=np.int64)
        if sequence_id == FILLER_ID:
            return inputs, labels, positions
        stream, start = self.locate(sequence_id)
        piece = np.asarray(stream.tokens[start : start + length + 1], dtype=np.int64)
        used = len(piece) - 1
        inputs[: min(length, len(piece))] = piece[:length]
        labels[:used] = piece[1:]
        first, last = np.searchsorted(stream.ends, [start + 1, start + length + 1])
        ends = stream.ends[first:last] - start
        if not self.cross_documents:
            labels[ends - 1] = IGNORED
        if self.reset_positions:
            starts = np.zeros(length, dtype=np.int64)
            inner = ends[ends < length]
            starts[inner] = inner
            positions -= np.maximum.accumulate(starts)
        return inputs, labels, positions
