"""A checkpoint on disk: its folder, the mark that makes it complete, reading one tensor.

    <directory>/step-00000100/          renamed from step-00000100.partial when all is on disk
        __<rank>_0.distcp, .metadata    tensors by logical key (torch.distributed.checkpoint)
        training.json                   everything else that training goes on from
        complete.json                   the mark, written last: format, step, sizes of all files

Nothing here needs a process group, and nothing in a checkpoint is ever run.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from placement.table import ExpertPlacement
from trainer.durable import sync, write_durably
from trainer.safe_reader import SafeReader

FORMAT = 1
MARK = "complete.json"
TRAINING = "training.json"
FOLDER = re.compile(r"step-(\d{8,})")
MODEL, OPTIMIZER = "model.", "optimizer."

logger = logging.getLogger(__name__)


class NewerFormatError(ValueError):
    """A checkpoint of a later version of Evenkeel."""


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint; names sort like steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint folder is named after; 0 for another name."""
    match = FOLDER.fullmatch(path.name)
    return int(match[1]) if match else 0


def read_mark(path: Path) -> dict[str, Any]:
    """The mark of a complete checkpoint, after a look at every file that it lists.

    Raises:
        ValueError: if there is no checkpoint, or a torn one or one of a newer format, saying
            which and, if torn, by which file.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint {path}: there is no such folder")
    if not (path / MARK).is_file():
        raise ValueError(
            f"checkpoint {path}: not a complete checkpoint, {MARK} is missing{_nearby(path)}"
        )
    try:
        mark = json.loads((path / MARK).read_text())
        number, files = mark["format"], mark["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: torn, {MARK} cannot be read ({error!r})") from error
    if number > FORMAT:
        raise NewerFormatError(
            f"checkpoint {path}: its format ({number}) is newer than {FORMAT}, the newest that "
            f"this version reads; update Evenkeel"
        )
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"checkpoint {path}: torn, {name} is missing")
        if file.stat().st_size != size:
            raise ValueError(
                f"checkpoint {path}: torn, {name} has {file.stat().st_size} of {size} bytes"
            )
    return mark


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first; warns of torn ones.

    One of a newer format counts: to resume from an older one instead would lose steps unseen.
    """
    complete = []
    for path in sorted(directory.glob("step-*"), key=step_of):
        if not FOLDER.fullmatch(path.name):
            continue
        try:
            read_mark(path)
        except NewerFormatError:
            complete.append(path)
        except ValueError as error:
            logger.warning("ignored: %s", error)
        else:
            complete.append(path)
    return complete


def prepare(directory: Path, step: int) -> Path:
    """Make the empty folder that a step's checkpoint is written to; torn ones are cleared away.

    Raises:
        ValueError: if there is a complete checkpoint of this step.
    """
    target = directory / folder_name(step)
    if target in complete_checkpoints(directory):
        raise ValueError(f"checkpoint {target} exists; checkpoints are never overwritten")
    for leftover in [*directory.glob("step-*.partial"), *directory.glob(target.name)]:
        shutil.rmtree(leftover)
    partial = target.with_suffix(".partial")
    partial.mkdir(parents=True)
    return partial


def placement_of(path: str | Path) -> ExpertPlacement:
    """The table that a run had when it saved this checkpoint.

    Raises:
        ValueError: as `read_mark`; or if there is no such table.
    """
    read_mark(Path(path))
    saved = json.loads((Path(path) / TRAINING).read_text()).get("placement")
    if saved is None:
        raise ValueError(f"checkpoint {path}: has no placement; name one in the configuration")
    return ExpertPlacement(torch.tensor(saved["home"], dtype=torch.int64), saved["num_ranks"])


class CheckpointWriter(FileSystemWriter):
    """Writes a folder that `prepare` made and, once every rank's file is on disk, completes it.

    torch.distributed.checkpoint calls `finish` on rank 0 and hands its errors to all ranks.

    Args:
        partial: the folder. training: content of training.json. keep: newest complete
            checkpoints that remain; older ones are deleted when the new one is complete.
    """

    def __init__(self, partial: Path, *, step: int, training: str, keep: int) -> None:
        super().__init__(partial, per_thread_copy_ahead=0)
        self.partial, self.step, self.training, self.keep = partial, step, training, keep

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # a serialiser's, that hides the file system's
            raise _os_error(error) or error from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the mark, give the folder its name and delete what is older than the newest."""
        super().finish(metadata, results)
        self._check_visible(results)
        write_durably(self.partial / TRAINING, self.training)
        files = {file.name: file.stat().st_size for file in sorted(self.partial.iterdir())}
        mark = {"format": FORMAT, "step": self.step, "files": files}
        write_durably(self.partial / MARK, json.dumps(mark, indent=1) + "\n")
        sync(self.partial)
        self.partial.rename(self.partial.with_suffix(""))
        sync(self.partial.parent)
        for old in complete_checkpoints(self.partial.parent)[: -self.keep]:
            delete(old)

    def _check_visible(self, results: list[list[WriteResult]]) -> None:
        """Rank 0 sees what all ranks wrote, in full."""
        sizes: dict[str, int] = {}
        for result in (result for per_rank in results for result in per_rank):
            where = result.storage_data
            end = where.offset + where.length
            sizes[where.relative_path] = max(end, sizes.get(where.relative_path, 0))
        for name, size in sizes.items():
            file = self.partial / name
            if not file.is_file() or file.stat().st_size < size:
                raise OSError(
                    f"rank 0 does not see all of {name}; run.dir must be on a file system that "
                    f"all ranks share"
                )


class CheckpointReader:
    """The model in a complete checkpoint, one tensor at a time, on one process.

    Attributes:
        extra: what was saved beside the tensors. step: of the checkpoint.

    Raises:
        ValueError: as `read_mark`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.step: int = read_mark(self.path)["step"]
        self.extra: dict[str, Any] = json.loads((self.path / TRAINING).read_text())
        self._reader = SafeReader(self.path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, True)

    def keys(self) -> list[str]:
        """The logical keys of the model's parameters and buffers, sorted."""
        keys = self._metadata.state_dict_metadata
        return sorted(key.removeprefix(MODEL) for key in keys if key.startswith(MODEL))

    def optimizer_fields(self) -> set[str]:
        """Names of the optimizer's state, such as exp_avg."""
        keys = self._metadata.state_dict_metadata
        return {key.split(".")[1] for key in keys if key.startswith(OPTIMIZER)}

    def layout(self, key: str) -> Tensor:
        """Shape and dtype of a tensor of the model, as a tensor on the meta device."""
        stored = self._metadata.state_dict_metadata.get(MODEL + key)
        if stored is None:
            raise ValueError(f"checkpoint {self.path}: has no tensor {key}")
        assert isinstance(stored, TensorStorageMetadata)
        return torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")

    def get(self, key: str) -> Tensor:
        """A tensor of the model, on the CPU, by its logical key.

        Raises:
            ValueError: if the checkpoint has no such tensor.
        """
        tensor = torch.empty_like(self.layout(key), device="cpu")
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({MODEL + key: tensor}, self._metadata, True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return tensor

    def __getitem__(self, key: str) -> Tensor:
        return self.get(key)


def delete(path: Path) -> None:
    """Delete a complete checkpoint; one interrupted here is a partial one, not a torn one."""
    partial = path.with_suffix(".partial")
    path.rename(partial)
    shutil.rmtree(partial)


def _nearby(path: Path) -> str:
    """A hint at a checkpoint that the user may have meant."""
    near = complete_checkpoints(path) or complete_checkpoints(path.parent)
    return f"; {near[-1]} is complete" if near else ""


def _os_error(error: BaseException) -> OSError | None:
    """The file system's error that led to another one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause
