"""A checkpoint that was tampered with runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tests.ranks import run_ranks
from tests.trainer.checkpoint_runs import make_engine, message
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_files import CheckpointReader
from trainer.safe_reader import SafeReader


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def copied(saved_runs: dict[str, Any], tmp_path: Path) -> Path:
    directory, _ = saved_runs["qwen3, EP 4"]
    folder = tmp_path / "step-00000002"
    shutil.copytree(f"{directory}/step-00000002", folder)
    return folder


def replace(folder: Path, table: bytes) -> None:
    """Another table, of the size that the mark says."""
    (folder / ".metadata").write_bytes(table)
    mark = json.loads((folder / "complete.json").read_text())
    mark["files"][".metadata"] = len(table)
    (folder / "complete.json").write_text(json.dumps(mark))


def load(directory: str, path: str) -> str:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    return message(lambda: checkpointer.load(path, engine.model, engine.optimizer))


def test_what_runs_something_is_refused_before_it_does(copied: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # it would
    mark.rmdir()
    good = SafeReader(copied).read_metadata()
    evil = Metadata(good.state_dict_metadata, planner_data=Evil(mark))
    replace(copied, pickle.dumps(evil))
    with pytest.raises(ValueError, match=r"\.metadata is refused, it names posix.mkdir"):
        CheckpointReader(copied)
    for text in run_ranks(load, 2, str(tmp_path), str(copied)):
        assert "is refused, it names posix.mkdir" in text
    assert not mark.exists()


def test_values_that_are_pickles_are_refused(copied: Path) -> None:
    good = SafeReader(copied).read_metadata()
    key = next(iter(good.state_dict_metadata))
    entries = {**good.state_dict_metadata, key: BytesStorageMetadata()}
    replace(copied, pickle.dumps(Metadata(entries, storage_data=good.storage_data)))
    with pytest.raises(ValueError, match=r"it names .*metadata\.BytesStorageMetadata"):
        CheckpointReader(copied)


def test_torn_tables_are_named(copied: Path) -> None:
    table = (copied / ".metadata").read_bytes()
    replace(copied, table[: len(table) // 2])
    with pytest.raises(ValueError, match=r"\.metadata is refused"):
        CheckpointReader(copied)
