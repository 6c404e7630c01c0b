"""What a run keeps for its page: loads, biases and rank loads at a bounded number of steps.

L MoE layers, E experts, R ranks of an EP group.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from parallel.decisions import Decision
from parallel.model import moe_blocks, moe_layers
from trainer.balance.bias import selection_bias

LOG = logging.getLogger(__name__)
NAME = "history.jsonl"
MOST_POINTS = 200  # in a file; at that many every other one is dropped
ARRAYS = {"load_LE": "<i8", "bias_LE": "<f4", "home_LR": "<i8", "planned_LR": "<i8"}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Point:
    """The routing of one optimizer step.

    Attributes:
        load_LE: int64 rows per layer and expert, global batch.
        bias_LE: float32 selection biases after the step; None for families without.
        home_LR, planned_LR: int64 rows per layer and rank of rank 0's EP group, summed over its
            micro-batches: had every row been computed at its expert's home; as planned. None if
            there is one rank.
    """

    step: int
    load_LE: Array
    bias_LE: Array | None = None
    home_LR: Array | None = None
    planned_LR: Array | None = None


@dataclass(frozen=True)
class Read:
    """What a history file holds: its points by ascending step, and how many lines are torn."""

    points: list[Point]
    torn: int


class History:
    """Appends points to the file of a run, on rank 0.

    A kill tears at most the line that was being written. The file has at most MOST_POINTS points:
    then it is written again with half of them, as evenly spaced as they can be, so that the
    newest steps are the densest. A file that cannot be written is named in one warning and left
    alone: it never ends a training.

    Args:
        step: the run starts after; later points are of a life of the run that was given up.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.active, self.steps = path, True, list[int]()
        self._try(lambda: self._begin(step))

    def record(self, point: Point) -> None:
        """Append a point."""
        self._try(lambda: self._record(point))

    def _begin(self, step: int) -> None:
        lines = [(at, line) for at, line in _lines(self.path) if at <= step]
        self._write(dict(lines))

    def _record(self, point: Point) -> None:
        with self.path.open("a", encoding="ascii") as file:
            file.write(encode(point))
        self.steps.append(point.step)
        if len(self.steps) >= MOST_POINTS:
            kept = set(thinned(self.steps, MOST_POINTS // 2))
            self._write({at: line for at, line in _lines(self.path) if at in kept})

    def _write(self, lines: dict[int, str]) -> None:
        """Put these lines in the place of the file, or nothing at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        with partial.open("w", encoding="ascii") as file:
            file.writelines(lines[step] for step in sorted(lines))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        self.steps = sorted(lines)

    def _try(self, write: Callable[[], None]) -> None:
        if not self.active:
            return
        try:
            write()
        except OSError as error:
            self.active = False
            LOG.warning(f"{self.path} is not written any more, training goes on: {error}")


def observe(
    step: int, load_LE: Tensor, model: nn.Module, decisions: Sequence[Decision], num_ranks: int
) -> Point:
    """The point of the step that was just made.

    Args:
        load_LE: int64 rows, global batch. decisions: of the step, of this rank's EP group.
        num_ranks: of that group.
    """
    biases = [selection_bias(block) for _, block in moe_blocks(model)]
    found = [bias.detach().float().cpu().flatten() for bias in biases if bias is not None]
    bias_LE = torch.stack(found).numpy() if len(found) == len(biases) else None
    home_LE = torch.stack([layer.path.home_E for _, layer in moe_layers(model)])
    loads = rank_loads(decisions, home_LE, num_ranks) if num_ranks > 1 else (None, None)
    return Point(step, load_LE.numpy(), bias_LE, *loads)


def rank_loads(
    decisions: Sequence[Decision], home_LE: Tensor, num_ranks: int
) -> tuple[Array, Array]:
    """Rows per layer and rank over all micro-batches, int64 [L, R]: at home, and as planned."""
    home_LR = torch.zeros(len(home_LE), num_ranks, dtype=torch.int64)
    planned_LR = torch.zeros_like(home_LR)
    for decision in decisions:
        layer = decision.layer
        home_LR[layer].index_add_(0, home_LE[layer].cpu(), decision.counts_RE.sum(0).cpu())
        planned_LR[layer] += decision.plan.load_R().cpu()
    return home_LR.numpy(), planned_LR.numpy()


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """So many of these ascending steps, first and last among them, at distances alike.

    One after another goes the step whose neighbours are closest to each other.
    """
    kept = list(steps)
    while len(kept) > max(2, most):
        gaps = [after - before for before, after in zip(kept, kept[2:], strict=False)]
        del kept[1 + gaps.index(min(gaps))]
    return kept


def encode(point: Point) -> str:
    """A point as one line: JSON, every array zlib-compressed in base64."""
    record: dict[str, Any] = {"step": point.step}
    for name, dtype in ARRAYS.items():
        array = getattr(point, name)
        if array is not None:
            packed = zlib.compress(np.ascontiguousarray(array, dtype).tobytes(), 1)
            record[name] = {
                "shape": list(array.shape),
                "data": base64.b64encode(packed).decode("ascii"),
            }
    return json.dumps(record) + "\n"


def decode(line: str) -> Point:
    """Read what `encode` wrote.

    Raises:
        ValueError: if the line is torn.
    """
    try:
        record = json.loads(line)
        return Point(
            record["step"], **{n: _array(record[n], d) for n, d in ARRAYS.items() if n in record}
        )
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"a torn line: {error}") from error


def _array(record: dict[str, Any], dtype: str) -> Array:
    packed = base64.b64decode(record["data"], validate=True)
    return np.frombuffer(zlib.decompress(packed), dtype).reshape(record["shape"])


def read_history(path: Path) -> Read:
    """The points of a file; of a repeated step the last counts, torn lines are passed over.

    Raises:
        ValueError: if there is no file or no point in it, or if points are of other models.
    """
    if not path.exists():
        raise ValueError(
            f"{path} is missing: the run has no recorded history; it is written from the first "
            f"logged step (train.log_every) on"
        )
    points, torn = {}, 0
    with path.open(encoding="ascii", errors="replace") as file:
        for line in file:
            try:
                point = decode(line)
            except ValueError:
                torn += 1
                continue
            points[point.step] = point
    if not points:
        raise ValueError(f"{path} holds no readable step ({torn} torn lines); train on to record")
    shapes = {point.load_LE.shape for point in points.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path} holds steps of models with (layers, experts) in {sorted(shapes)}")
    return Read([points[step] for step in sorted(points)], torn)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Step and text of the whole lines of a file, in their order."""
    found: list[tuple[int, str]] = []
    if not path.exists():
        return found
    with path.open(encoding="ascii", errors="replace") as file:
        for line in file:
            try:
                found.append((int(json.loads(line)["step"]), line))
            except (ValueError, KeyError, TypeError):
                continue
    return [(step, line) for step, line in found if line.endswith("\n")]
