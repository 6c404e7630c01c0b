"""Which sequences make up which global batch: a pure function of seed and position.

Nothing here knows the number of ranks, so a run goes on with the same batches on any number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """How many sequences an epoch takes from each source.

    Without weights an epoch is every sequence of every source once. With weights it is as many
    sequences as the sources have together, of which source i supplies its share by weight. Each
    source is a stack of its own that is dealt out completely, then shuffled and dealt again, epoch
    after epoch: no sequence comes a second time before all others of its source came once, and one
    with a small weight takes several epochs to be dealt.

    `sizes`: sequences per source. `draws`: how many of them an epoch takes. Sequence ids count
    through the sources in order.
    """

    sizes: tuple[int, ...]
    draws: tuple[int, ...]

    @classmethod
    def build(cls, sizes: Mapping[str, int], weights: Mapping[str, float] | None) -> Mixture:
        """Shares by weight, rounded by largest remainder, so that an epoch keeps its length.

        Raises:
            ValueError: for names that differ from the sources', and for weights that are not
                shares.
        """
        if weights is None:
            return cls(tuple(sizes.values()), tuple(sizes.values()))
        if weights.keys() != sizes.keys():
            raise ValueError(
                f"data.weights names {sorted(weights)} but data.sources has {sorted(sizes)}; "
                f"give every source a weight (0 leaves it out)"
            )
        values = np.array([weights[name] for name in sizes], dtype=np.float64)
        if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
            raise ValueError(f"data.weights ({dict(weights)}) must be >= 0, and one of them > 0")
        exact = values / values.sum() * sum(sizes.values())
        draws = np.floor(exact).astype(np.int64)
        short = sum(sizes.values()) - int(draws.sum())
        draws[np.argsort(draws - exact, kind="stable")[:short]] += 1
        return cls(tuple(sizes.values()), tuple(int(n) for n in draws))

    def epoch(self, seed: int, epoch: int) -> Ids:
        """Sequence ids of an epoch, in order."""
        ids, first = [], 0
        for source, (size, draws) in enumerate(zip(self.sizes, self.draws, strict=True)):
            begin, end = epoch * draws, (epoch + 1) * draws
            while begin < end:
                deal, used = divmod(begin, size)
                stack = _permutation(size, seed, source, deal)
                part = stack[used : used + end - begin]
                ids.append(first + part)
                begin += len(part)
            first += size
        chosen = np.concatenate(ids)
        return chosen[_permutation(len(chosen), seed, len(self.sizes), epoch)]


def _permutation(size: int, *key: int) -> Ids:
    """A permutation of 0..size-1 that depends on nothing but size and key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(size)


class GlobalBatches:
    """The endless stream of global batches: lists of sequence ids, the same on every rank.

    Every epoch is a new permutation; a batch may hold the end of one and the start of the next.

    Args:
        num_sequences: of the dataset. batch_size: sequences per batch. seed: of the order.
        mixture: shares of several sources. None: every sequence once per epoch.

    Raises:
        ValueError: if there are no sequences, or for a batch size below 1.
    """

    def __init__(
        self, num_sequences: int, batch_size: int, seed: int, mixture: Mixture | None = None
    ) -> None:
        if num_sequences < 1:
            raise ValueError("the training split has no sequences; give data.sources more text")
        if batch_size < 1:
            raise ValueError(f"train.batch_size ({batch_size}) must be >= 1")
        self.mixture = mixture or Mixture((num_sequences,), (num_sequences,))
        assert sum(self.mixture.sizes) == sum(self.mixture.draws) == num_sequences
        self.num_sequences, self.batch_size, self.seed = num_sequences, batch_size, seed
        self.position = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> float:
        """Epochs handed out so far, with the started one as a fraction."""
        return self.position / self.num_sequences

    def next(self) -> list[int]:
        """Sequence ids of the next batch."""
        ids: list[int] = []
        while len(ids) < self.batch_size:
            epoch, offset = divmod(self.position, self.num_sequences)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self.mixture.epoch(self.seed, epoch)
            part = self._order[offset : offset + self.batch_size - len(ids)]
            ids += part.tolist()
            self.position += len(part)
        return ids

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.next()

    def state_dict(self) -> dict[str, Any]:
        """Position, and what the order depends on; plain numbers and lists."""
        sizes, draws = list(self.mixture.sizes), list(self.mixture.draws)
        return {"position": self.position, "seed": self.seed, "sizes": sizes, "draws": draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream stood; its batch size may have been another.

        Raises:
            ValueError: if the order of that stream was not this one.
        """
        mine = self.state_dict()
        keys = {"seed": "seed", "sizes": "data or train.seq_len", "draws": "data.weights"}
        for name, key in keys.items():
            if state[name] != mine[name]:
                raise ValueError(
                    f"the checkpoint's order of the data has {name} {state[name]}, this run "
                    f"{mine[name]}: {key} changed; put it back, or start a run of its own from the "
                    f"exported model"
                )
        self.position = int(state["position"])


def check_batch_size(batch_size: int, world: int, micro_batch_size: int) -> None:
    """Refuse a global batch that ranks cannot split into equally many equal micro-batches.

    Raises:
        ValueError: naming the nearest sizes that work.
    """
    unit = world * micro_batch_size
    if batch_size % unit:
        below = batch_size // unit * unit
        fits = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"train.batch_size ({batch_size}) must be a multiple of ranks ({world}) x "
            f"train.micro_batch_size ({micro_batch_size}) = {unit}; use {fits}"
        )


def split_batch(ids: list[int], rank: int, world: int, micro_batch_size: int) -> list[list[int]]:
    """The micro-batches of one rank: an equal, consecutive part of the batch, cut up.

    Raises:
        ValueError: if the batch cannot be split evenly.
    """
    check_batch_size(len(ids), world, micro_batch_size)
    share = len(ids) // world
    mine = iter(ids[rank * share : (rank + 1) * share])
    return [
        list(itertools.islice(mine, micro_batch_size)) for _ in range(share // micro_batch_size)
    ]
