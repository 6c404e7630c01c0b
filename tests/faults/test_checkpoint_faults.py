"""What breaks while a checkpoint is written or on disk never costs a complete one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.filesystem as dcp_files

from tests.ranks import run_ranks
from tests.trainer.checkpoint_runs import (
    make_engine,
    message,
    save,
    snapshot,
    train,
)
from trainer import checkpoint_files
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_files import MARK, CheckpointWriter

FIRST, SECOND = "step-00000001", "step-00000002"


def stop_here(signs: Path) -> None:
    """Tell the test that this rank has come to the point, and stay there."""
    (signs / str(dist.get_rank())).touch()
    time.sleep(600)


def in_a_tensor_file(patch: pytest.MonkeyPatch, signs: Path) -> None:
    write, written = dcp_files._write_item, []

    def broken(transforms: Any, stream: Any, *args: Any) -> Any:
        written.append(write(transforms, stream, *args))
        if len(written) == 5:
            stream.write(b"half of the next")
            stream.flush()
            stop_here(signs)
        return written[-1]

    patch.setattr(dcp_files, "_write_item", broken)


def in_the_mark(patch: pytest.MonkeyPatch, signs: Path) -> None:
    write = checkpoint_files.write_durably

    def broken(path: Path, text: str) -> None:
        write(path, text[: len(text) // 2] if path.name == MARK else text)
        if path.name == MARK:
            stop_here(signs)

    patch.setattr(checkpoint_files, "write_durably", broken)


def before_the_rename(patch: pytest.MonkeyPatch, signs: Path) -> None:
    def broken(path: Path) -> None:
        stop_here(signs)

    patch.setattr(checkpoint_files, "sync", broken)


def in_the_deletion_of_the_old_one(patch: pytest.MonkeyPatch, signs: Path) -> None:
    def broken(path: Path) -> None:
        (path / "__0_0.distcp").unlink()
        stop_here(signs)

    patch.setattr(shutil, "rmtree", broken)


def save_until_killed(folder: str, signs: str, break_it: Callable[..., None]) -> None:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(folder, mesh=engine.mesh, keep=1)
    for step in (1, 2):
        train(engine, step)
        checkpointer.wait()
        if step == 2:
            break_it(pytest.MonkeyPatch(), Path(signs))
        else:
            torch.save(snapshot(engine), f"{signs}/state{dist.get_rank()}")
        save(engine, checkpointer, step)
    checkpointer.wait()


def ranks_in_a_session(folder: str, signs: str, break_it: Callable[..., None]) -> None:
    os.setsid()
    tempfile.tempdir = signs
    run_ranks(save_until_killed, 2, folder, signs, break_it)


def go_on(folder: str) -> dict[str, Any]:
    """Load what is there, then save again at the step that was torn."""
    engine = make_engine(ep=2, seed=1)
    checkpointer = Checkpointer(folder, mesh=engine.mesh, keep=1)
    latest = checkpointer.resolve("auto")
    assert latest is not None
    checkpointer.load(latest, engine.model, engine.optimizer)
    loaded = snapshot(engine)
    save(engine, checkpointer, 2 if latest.name == FIRST else 3)
    checkpointer.wait()
    return {"latest": latest.name, "loaded": loaded}


@pytest.mark.parametrize(
    ("break_it", "ranks_there", "stands"),
    [
        (in_a_tensor_file, 2, FIRST),
        (in_the_mark, 1, FIRST),
        (before_the_rename, 1, FIRST),
        (in_the_deletion_of_the_old_one, 1, SECOND),
    ],
)
def test_kill_9_while_saving(
    break_it: Callable[..., None], ranks_there: int, stands: str, tmp_path: Path
) -> None:
    folder, signs = tmp_path / "checkpoints", tmp_path / "signs"
    signs.mkdir()
    context = multiprocessing.get_context("fork")
    job = context.Process(target=ranks_in_a_session, args=(str(folder), str(signs), break_it))
    job.start()
    end = time.monotonic() + 120
    while len(list(signs.glob("[01]"))) < ranks_there:
        assert job.is_alive(), "the job ended before it came to the point"
        assert time.monotonic() < end, "the job never came to the point"
        time.sleep(0.02)
    assert job.pid is not None
    os.killpg(job.pid, signal.SIGKILL)
    job.join()
    left = {path.name for path in folder.iterdir()}
    assert left == {stands, f"{FIRST if stands == SECOND else SECOND}.partial"}
    for rank, result in enumerate(run_ranks(go_on, 2, str(folder))):
        assert result["latest"] == stands
        if stands == FIRST:
            saved = torch.load(signs / f"state{rank}")
            assert saved.keys() == result["loaded"].keys()
            for key, value in saved.items():
                assert torch.equal(result["loaded"][key], value), key
    left = {path.name for path in folder.iterdir()}
    assert left == {SECOND if stands == FIRST else "step-00000003"}


def two_checkpoints(folder: str) -> None:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(folder, mesh=engine.mesh, keep=2)
    for step in (1, 2):
        save(engine, checkpointer, step)
    checkpointer.wait()


def load_torn(folder: str) -> dict[str, Any]:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(folder, mesh=engine.mesh)
    said = message(lambda: checkpointer.load(f"{folder}/{SECOND}", engine.model, engine.optimizer))
    latest = checkpointer.resolve("auto")
    assert latest is not None
    checkpointer.load(latest, engine.model, engine.optimizer)
    save(engine, checkpointer, 2)  # takes the place of the torn one
    checkpointer.wait()
    return {"said": said, "latest": latest, "then": checkpointer.latest()}


def cut(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size - 7)
    return f"torn, {path.name} has {size - 7} of {size} bytes"


def remove(path: Path) -> str:
    path.unlink()
    return f"torn, {path.name} is missing"


def cut_mark(path: Path) -> str:
    os.truncate(path, 30)
    return "torn, complete.json cannot be read"


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (cut, "__1_0.distcp"),
        (remove, "__0_0.distcp"),
        (cut, "training.json"),
        (remove, ".metadata"),
        (cut_mark, MARK),
    ],
)
def test_torn_checkpoint_is_named_and_passed_over(
    damage: Callable[[Path], str], name: str, tmp_path: Path
) -> None:
    run_ranks(two_checkpoints, 2, str(tmp_path))
    said = damage(tmp_path / SECOND / name)
    for result in run_ranks(load_torn, 2, str(tmp_path)):
        assert result["said"].startswith(f"ValueError: checkpoint {tmp_path / SECOND}: {said}")
        assert result["latest"] == tmp_path / FIRST
        assert result["then"] == tmp_path / SECOND


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB where one may be mounted, else just a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], check=False).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def save_to_a_full_disk(folder: str, asynchronous: bool) -> dict[str, Any]:
    engine = make_engine(ep=2)
    path = Path(folder)
    checkpointer = Checkpointer(path / "run", mesh=engine.mesh, keep=1, asynchronous=asynchronous)
    save(engine, checkpointer, 1)
    checkpointer.wait()
    limit = None
    if os.path.ismount(path):
        if dist.get_rank() == 0:
            free = os.statvfs(path).f_bavail * os.statvfs(path).f_bsize
            (path / "other").write_bytes(bytes(free - 100_000))
        dist.barrier()
    else:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))

    def save_and_wait() -> None:
        save(engine, checkpointer, 2)
        checkpointer.wait()

    said, stands = message(save_and_wait), checkpointer.latest()
    assert checkpointer.poll()  # told once
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    elif dist.get_rank() == 0:
        (path / "other").unlink()
    dist.barrier()
    save_and_wait()
    return {"said": said, "stands": stands, "then": checkpointer.latest()}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk(asynchronous: bool, small_disk: Path) -> None:
    full = errno.ENOSPC if os.path.ismount(small_disk) else errno.EFBIG
    folder = small_disk / "run"
    for result in run_ranks(save_to_a_full_disk, 2, str(small_disk), asynchronous):
        said = result["said"]
        assert said.startswith(f"CheckpointError: checkpoint {folder / SECOND} was not saved: rank")
        assert os.strerror(full) in said
        assert said.endswith(f"; {folder / FIRST} is the newest complete one")
        assert result["stands"] == folder / FIRST
        assert result["then"] == folder / SECOND


def one_rank_fails(folder: str, where: str) -> str:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(folder, mesh=engine.mesh)

    def broken(*args: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "a-file")

    with pytest.MonkeyPatch.context() as patch:
        if where == "rank 1" and dist.get_rank() == 1:
            patch.setattr(CheckpointWriter, "write_data", broken)
        if where == "rank 0":  # alone with the last part of the work
            patch.setattr(checkpoint_files, "write_durably", broken)
        if where == "before":
            Path(folder).touch()
            return message(lambda: save(engine, checkpointer, 1))
        save(engine, checkpointer, 1)

        def poll() -> None:
            while not checkpointer.poll():
                time.sleep(0.01)

        return message(poll)


@pytest.mark.parametrize("where", ["rank 0", "rank 1"])
def test_failure_of_one_rank_surfaces_on_all(where: str, tmp_path: Path) -> None:
    for said in run_ranks(one_rank_fails, 2, str(tmp_path), where):
        assert said == (
            f"CheckpointError: checkpoint {tmp_path / FIRST} was not saved: {where}: OSError: "
            f"[Errno 5] Input/output error: 'a-file'; there is no complete one yet"
        )


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    for said in run_ranks(one_rank_fails, 2, str(tmp_path / "file"), "before"):
        assert said.startswith(
            f"CheckpointError: checkpoint {tmp_path}/file/{FIRST} was not saved: "
        )
        assert "Error" in said


def one_rank_dies(folder: str) -> None:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(folder, mesh=engine.mesh, keep=1)
    save(engine, checkpointer, 1)
    checkpointer.wait()

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        pytest.MonkeyPatch().setattr(CheckpointWriter, "write_data", die)
    save(engine, checkpointer, 2)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        checkpointer.wait()
    assert time.monotonic() - start < 30
    assert checkpoint_files.complete_checkpoints(Path(folder)) == [Path(folder) / FIRST]


def test_death_of_one_rank_while_saving_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(one_rank_dies, 2, str(tmp_path))
    assert str(failure.value) == "rank 1 left no result (exit code -9)"
    assert {path.name for path in tmp_path.iterdir()} == {FIRST, f"{SECOND}.partial"}
