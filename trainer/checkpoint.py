"""Save and resume training: any number of ranks, any placement, in the background, atomically."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from parallel.mesh import ParallelMesh
from trainer.checkpoint_files import (
    OPTIMIZER,
    CheckpointReader,
    CheckpointWriter,
    complete_checkpoints,
    folder_name,
    prepare,
    read_mark,
    step_of,
)
from trainer.safe_reader import SafeReader
from trainer.training_state import TrainingState, state_of

__all__ = ["CheckpointError", "CheckpointReader", "Checkpointer"]

T = TypeVar("T")

FILES = datetime.timedelta(minutes=30)  # disks of ranks differ by more than their steps do

# fields of a model's configuration that do not change what its weights compute
INCIDENTAL = {
    "_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "output_router_logits",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; names it and the cause, the same on all ranks."""


class Checkpointer:
    """Saves to and loads from the checkpoints of one run; every rank makes the same calls.

    Tensors are stored under logical keys (`trainer.state`), one per expert, so that a checkpoint
    fits every number of ranks and every placement.

    Args:
        directory: of the checkpoints, on a file system that all ranks share.
        keep: newest complete checkpoints that are kept, at least 1.
        asynchronous: write in the background, from a copy in CPU memory.
    """

    def __init__(
        self, directory: str | Path, *, mesh: ParallelMesh, keep: int = 2, asynchronous: bool = True
    ) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep ({keep}) must be >= 1")
        self.directory, self.keep, self.asynchronous = Path(directory), keep, asynchronous
        self.rank = mesh.rank
        # two groups, so that the background's collectives never meet those of the training loop
        self._background = dist.new_group(backend="gloo", timeout=FILES)
        self._control = dist.new_group(backend="gloo", timeout=FILES)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | TrainingState,
        extra: dict[str, Any],
    ) -> None:
        """Save model and optimizer as they are now; they may change as soon as this returns.

        Waits for the save before this one. If asynchronous, the checkpoint is on disk after the
        next `wait`, or when `poll` says so.

        Args:
            optimizer: or the state of both, if they cannot be read as they are.
            extra: JSON-able, the same on all ranks; its "model_config" is the configuration of
                the model as a dict and is compared on loading.

        Raises:
            CheckpointError: if this save or the one before failed, on all ranks.
        """
        assert "model_config" in extra
        training = json.dumps(extra)
        self.wait()
        target = self.directory / folder_name(step)
        try:
            partial = self._on_rank_zero(lambda: prepare(self.directory, step))
        except OSError as error:
            raise CheckpointError(self._failure(target, describe(error))) from error
        state = state_of(model, optimizer).tensors(copy=self.asynchronous)
        writer = CheckpointWriter(partial, step=step, training=training, keep=self.keep)
        self._pending = target, self._executor.submit(self._write, state, writer)
        if not self.asynchronous:
            self.wait()

    def poll(self) -> bool:
        """Whether the last save is on disk. Cheap, but a collective while one is under way.

        Raises:
            CheckpointError: if it failed, on all ranks.
        """
        if self._pending is None:
            return True
        done = torch.tensor(int(self._pending[1].done()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN)  # among steps, with their timeout
        if done:
            self.wait()
        return bool(done)

    def wait(self) -> None:
        """Return when the last save is on disk.

        Raises:
            CheckpointError: if it failed, on all ranks.
            RuntimeError: if a rank died meanwhile.
        """
        if self._pending is None:
            return
        target, future = self._pending
        error = future.exception()
        self._pending = None
        if isinstance(error, CheckpointException):  # of any rank, the same on all
            raise CheckpointError(self._failure(target, describe(error))) from error
        if error is not None:
            raise error  # the process group is broken: no rank can be asked any more

    def latest(self) -> Path | None:
        """The newest complete checkpoint of the directory, as rank 0 sees it."""
        return self._on_rank_zero(lambda: newest(self.directory))

    def resolve(self, resume: str) -> Path | None:
        """The checkpoint to start from, None to start anew.

        Args:
            resume: auto for the newest complete one if there is any, none, or a path.

        Raises:
            ValueError: if there is no complete checkpoint at the path, or if the directory holds
                checkpoints of later steps than the start, which the run would run into.
        """
        if resume == "auto":
            return self.latest()
        return self._on_rank_zero(lambda: self._start(resume))

    def load(
        self,
        path: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | TrainingState,
    ) -> dict[str, Any]:
        """Load model and optimizer in place and return the `extra` of the save.

        The mesh, the placement and the number of ranks may differ from those of the save.

        Raises:
            ValueError: if there is no checkpoint at the path, or it is torn, of a newer format,
                of another model or of another optimizer.
            CheckpointError: if it could not be read.
        """
        self.wait()
        path = Path(path)
        training = state_of(model, optimizer)
        state, layout = training.to_fill(), training.layout()
        fields = {key.split(".")[1] for key in state if key.startswith(OPTIMIZER)}
        extra = self._on_rank_zero(lambda: check_fits(path, model, layout, fields))
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(
                state,
                storage_reader=SafeReader(path),
                planner=planner,
                process_group=self._control,
            )
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {path} was not read: {describe(error)}") from error
        training.take(state)
        return extra

    def _write(self, state: dict[str, Tensor], writer: CheckpointWriter) -> None:
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(state, storage_writer=writer, planner=planner, process_group=self._background)

    def _start(self, resume: str) -> Path | None:
        path = None if resume == "none" else Path(resume)
        if path is not None:
            read_mark(path)
        start = 0 if path is None else step_of(path)
        later = [other for other in complete_checkpoints(self.directory) if step_of(other) > start]
        if later:
            raise ValueError(
                f"checkpoint.resume ({resume}) starts at step {start}, but {self.directory} holds "
                f"checkpoints up to step {step_of(later[-1])}; use checkpoint.resume=auto, another "
                f"run.dir, or delete them"
            )
        return path

    def _failure(self, target: Path, cause: str) -> str:
        left = self.latest()
        stands = f"{left} is the newest complete one" if left else "there is no complete one yet"
        return f"checkpoint {target} was not saved: {cause}; {stands}"

    def _on_rank_zero(self, function: Callable[[], T]) -> T:
        """Rank 0's result, or its ValueError or OSError, on all ranks."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except (ValueError, OSError) as error:
                box[1] = error
        dist.broadcast_object_list(box, group=self._control, group_src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint of a directory."""
    complete = complete_checkpoints(directory)
    return complete[-1] if complete else None


def check_fits(
    path: Path, model: Any, layout: dict[str, Tensor], optimizer_fields: set[str]
) -> dict[str, Any]:
    """The `extra` of a checkpoint, if it is complete and of this model and optimizer.

    Args:
        layout: of the whole model, by logical key.

    Raises:
        ValueError: naming what differs.
    """
    reader = CheckpointReader(path)
    saved = reader.extra["model_config"]
    current = json.loads(json.dumps(model.config.to_dict(), default=str))
    differing = [
        f"{field} is {saved[field]!r} there and {current[field]!r} here"
        for field in sorted((saved.keys() & current.keys()) - INCIDENTAL)
        if saved[field] != current[field]
    ]
    if differing:
        _refuse(path, differing)
    stored = set(reader.keys())
    _refuse(path, [f"{key} is missing there" for key in sorted(layout.keys() - stored)])
    _refuse(path, [f"{key} is unknown here" for key in sorted(stored - layout.keys())])
    differing = []
    for key, here in layout.items():
        there = reader.layout(key)
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            differing.append(
                f"{key} is {there.dtype} {tuple(there.shape)} there and {here.dtype} "
                f"{tuple(here.shape)} here"
            )
    _refuse(path, differing)
    if reader.optimizer_fields() != optimizer_fields:
        raise ValueError(
            f"checkpoint {path} is of another optimizer: its state is "
            f"{sorted(reader.optimizer_fields())} there and {sorted(optimizer_fields)} here"
        )
    return reader.extra


def _refuse(path: Path, differing: list[str]) -> None:
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"checkpoint {path} is of another model: {'; '.join(differing[:3])}{more}. Resume with "
            f"the model it was saved from, or start anew in another run.dir"
        )


def describe(error: BaseException) -> str:
    """What went wrong, on which ranks."""
    if not isinstance(error, CheckpointException):
        return f"{type(error).__name__}: {error}"
    failures = sorted(error.failures.items())
    causes = [f"rank {rank}: {describe(failure)}" for rank, (failure, _) in failures[:3]]
    if len(failures) > 3:
        causes.append(f"and {len(failures) - 3} more ranks")
    return "; ".join(causes)
