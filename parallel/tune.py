"""Choose, from measured times, into how many chunks every layer cuts its rows (arXiv:2206.03382).

L MoE layers, C candidates.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layer import ExpertParallel
from parallel.phases import time_layers

CANDIDATES = (1, 2, 4)
ROUNDS = 2  # after one optimizer step that warms up


class ChunkTuner:
    """Tries every number of chunks in the first optimizer steps, then keeps each layer's best.

    Every rank runs the same numbers at the same time, and the slowest rank's times decide.
    """

    def __init__(self, layers: Sequence[ExpertParallel], group: dist.ProcessGroup) -> None:
        self.layers, self.group = layers, group
        self.candidates = [c for c in CANDIDATES if c <= layers[0].path.dispatcher.num_ranks]
        self.seconds: list[list[list[float]]] = [[[] for _ in self.candidates] for _ in layers]
        self.schedule = [0, *list(range(len(self.candidates))) * ROUNDS]
        self.step = 0

    @property
    def done(self) -> bool:
        return self.step == len(self.schedule)

    @contextmanager
    def try_step(self) -> Iterator[None]:
        """One optimizer step with the next candidate; after the last one the choice is made."""
        if self.done:
            yield
            return
        place = self.schedule[self.step]
        for layer in self.layers:
            layer.path.num_chunks = self.candidates[place]
        with time_layers() as seconds:
            yield
        if self.step:
            for layer, tried in zip(self.layers, self.seconds, strict=True):
                tried[place].append(seconds[layer.layer_index])
        self.step += 1
        if self.done:
            self._choose()

    def _choose(self) -> None:
        median_LC: Tensor = torch.tensor(
            [[statistics.median(times) for times in tried] for tried in self.seconds],
            dtype=torch.float64,
            device=next(self.layers[0].parameters()).device,
        )
        dist.all_reduce(median_LC, op=dist.ReduceOp.MAX, group=self.group)
        for layer, best in zip(self.layers, median_LC.argmin(1).tolist(), strict=True):
            layer.path.num_chunks = self.candidates[best]
