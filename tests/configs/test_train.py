"""The entry point: single process, sweeps, torchrun, messages, exit codes and folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from configs.schema import Config
from tests.configs import stub_run
from trainer import train

ROOT = Path(__file__).parents[2]
QUICK = "experiment=quickstart"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, a stub for the trainer and no trace of a launcher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "trainer.run", None)
    stub_run.install()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    return tmp_path


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    try:
        train.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_a_sweep_refuses_a_secret_before_it_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = (QUICK, "train.steps=1,2", "-m")
    assert start(monkeypatch, *sweep, "+logger.mine.api_key=hush") == train.EXIT_CONFIG
    said = capsys.readouterr().err
    assert "+logger.mine.api_key=***" in said and "${oc.env:NAME}" in said and "hush" not in said
    assert files(folder) == []


def test_the_package_is_ours() -> None:
    assert Path(str(trainer.__file__)).parent == ROOT / "trainer"


def test_single_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(monkeypatch, QUICK, "train.steps=40") == 0
    assert files(folder) == ["runs/quickstart/config.yaml", "runs/quickstart/rank0.json"]
    seen = json.loads((folder / "runs/quickstart/rank0.json").read_text())
    assert seen["train"]["steps"] == 40


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((QUICK, "train.step=3"), "error: train.step: no such key; did you mean train.steps?\n"),
        ((QUICK, "mesh.ep=3"), "error: mesh.ep (3) must divide the world size (1); use 1\n"),
        ((QUICK, "model=tinyy"), "error: model=tinyy: no such choice; did you mean tiny?"),
        ((), "error: missing values: train.batch_size,"),
        (("-m", QUICK, "seed=0,1", "train.step=3"), "error: train.step: no such key;"),
        (("-m", QUICK, "train.steps=0,1"), "error: train.steps (0) must be >= 1\n"),
    ],
)
def test_a_refused_configuration(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    assert start(monkeypatch, *arguments) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith(expected)
    assert shown.out == "" and "Traceback" not in shown.err
    assert not [name for name in files(folder) if "multirun" not in name]


def test_an_error_of_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "OUR_PACKAGES", {"tests"})
    assert start(monkeypatch, QUICK, "run.name=wrong") == 1
    assert capfd.readouterr().err == (
        "error: data.sources: nothing to read on wrong\n"
        "(HYDRA_FULL_ERROR=1 shows where it was raised)\n"
    )


def test_an_error_inside_a_library_keeps_its_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["trainer.run"], "run", lambda config: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        start(monkeypatch, QUICK)


def test_an_error_of_our_own_kind_is_a_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class StoppedError(RuntimeError):
        __module__ = "trainer.example"

    def run(config: Config) -> None:
        raise StoppedError("step 3: loss nan")

    monkeypatch.setattr(sys.modules["trainer.run"], "run", run)
    assert start(monkeypatch, QUICK) == 1
    assert capfd.readouterr().err.startswith("error: step 3: loss nan\n")


def test_full_error_shows_the_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert start(monkeypatch, QUICK, "train.step=3") == 2
    shown = capfd.readouterr().err
    assert "Traceback" in shown and "full_key: train.step" in shown


def test_help(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, "--help") == 0
    text = capfd.readouterr().out
    assert "train.batch_size  (int, >= 1, required)" in text
    assert text.count("torchrun --nproc-per-node") >= 4
    monkeypatch.setenv("RANK", "1")
    assert start(monkeypatch, "--help") == 0
    assert capfd.readouterr().out == ""
    assert files(folder) == []


def test_every_job_of_a_sweep_has_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(monkeypatch, "-m", QUICK, "balance=auto,none", "seed=0,1") == 0
    assert [name for name in files(folder) if name.endswith("rank0.json")] == [
        "runs/quickstart/balance=auto,seed=0/rank0.json",
        "runs/quickstart/balance=auto,seed=1/rank0.json",
        "runs/quickstart/balance=none,seed=0/rank0.json",
        "runs/quickstart/balance=none,seed=1/rank0.json",
    ]
    path = folder / "runs/quickstart/balance=none,seed=1"
    seen = json.loads((path / "rank0.json").read_text())
    assert (seen["balance"], seen["seed"]) == ({}, 1)
    assert seen["checkpoint"]["export_dir"] == "runs/quickstart/balance=none,seed=1/export"
    assert not (folder / "multirun").exists() and not (folder / "outputs").exists()


def test_sweep_folders_survive_paths_and_length(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "x" * 300
    given = [f"+model.overrides.a={long}", "+model.overrides.b=/a/b,/a/c"]
    assert start(monkeypatch, "-m", QUICK, *given) == 0
    folders = [path.parent for path in (folder / "runs/quickstart").glob("*/rank0.json")]
    assert len(folders) == 2 and all(len(path.name) <= 120 for path in folders)


def test_a_sweep_into_one_folder_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, "-m", QUICK, "run.dir=here", "seed=0,1") == 2
    assert "'run.dir=here${sweep_job:}'" in capfd.readouterr().err
    assert start(monkeypatch, "-m", QUICK, "run.dir=here${sweep_job:}", "seed=0,1") == 0
    assert (folder / "here/seed=0/rank0.json").exists()
    assert (folder / "here/seed=1/rank0.json").exists()


def torchrun(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.configs.stub_run", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


def test_torchrun_gives_every_rank_the_same_configuration(folder: Path) -> None:
    result = torchrun(folder, QUICK, "mesh.ep=2")
    assert result.returncode == 0, result.stderr
    assert files(folder) == [
        "runs/quickstart/config.yaml",
        "runs/quickstart/rank0.json",
        "runs/quickstart/rank1.json",
    ]
    one, two = ((folder / f"runs/quickstart/rank{r}.json").read_text() for r in (0, 1))
    assert one == two and json.loads(one)["mesh"]["ep"] == 2


def test_torchrun_prints_a_refusal_once(folder: Path) -> None:
    result = torchrun(folder, QUICK, "mesh.ep=3")
    assert result.returncode != 0
    assert result.stderr.count("mesh.ep (3) must divide the world size (2); use 1 or 2") == 1
    assert files(folder) == []


def test_a_rank_that_fails_alone_says_so(folder: Path) -> None:
    result = torchrun(folder, QUICK, "run.name=lonely")
    assert result.returncode != 0
    assert "rank 1:" in result.stderr and "nothing to read on lonely" in result.stderr
