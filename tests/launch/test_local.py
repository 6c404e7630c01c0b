"""launcher=local: real ranks, restarts, two nodes, signals, exit codes, and words that arrive."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch.local
from configs.launch_schema import Device, Job, LaunchConfig
from launch.__main__ import main
from launch.local import Local
from launch.plan import Plan
from tests.launch.jobs import (
    CPU,
    DUMP,
    HOSTILE,
    ended,
    environment,
    free_port,
    script,
    start,
    through_torchrun,
    tiny_job,
)
from tests.trainer.test_run import metrics, ranks_of

FOREVER = "train.steps=100000"


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path, steps: int) -> None:
    end = time.monotonic() + 120
    path = run_dir / "metrics.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) >= steps):
        assert time.monotonic() < end and process.poll() is None, ended(process)[0]
        time.sleep(0.05)


def test_a_killed_rank_is_started_again_and_the_run_completes(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "train.steps=40", "checkpoint.every=2")
    process = start(tmp_path, "ranks_per_node=2", "max_restarts=1", *CPU, "--", *job)
    wait_for_steps(process, tmp_path / "run", 4)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    (output,) = ended(process)
    assert process.returncode == 0, output
    steps = [record["step"] for record in metrics(tmp_path / "run")]
    assert steps[-1] == 40 and set(steps) == set(range(1, 41))
    assert len(steps) < 60  # it went on from a checkpoint
    assert "1 x 2 = 2, on CPUs" in output and "40 on 2 ranks, EP 2" in output


def test_a_signal_to_the_launcher_saves_and_stops(tmp_path: Path) -> None:
    process = start(tmp_path, "ranks_per_node=1", *CPU, "--", *tiny_job(tmp_path, FOREVER))
    wait_for_steps(process, tmp_path / "run", 2)
    os.kill(process.pid, signal.SIGTERM)
    (output,) = ended(process)
    assert process.returncode == 1, output  # as torchrun says it
    last = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step-{last:08d}/complete.json").exists()


def test_two_nodes_train_together(tmp_path: Path) -> None:
    """Both on this machine: each launch runs its part."""
    nodes = ["nodes=2", "ranks_per_node=1", "max_restarts=0", *CPU]
    nodes += [f"rdzv_port={free_port(20000, 30000)}"]
    nodes += ["launcher.host=127.0.0.1", "launcher.address=127.0.0.1", "--", *tiny_job(tmp_path)]
    processes = [start(tmp_path, f"launcher.node_rank={rank}", *nodes) for rank in (1, 0)]
    outputs = ended(*processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert any("6 on 2 ranks, EP 2" in output for output in outputs)
    assert "a group of 2 is on 2 nodes, so its exchange crosses nodes" in outputs[0]
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_the_exit_code_is_the_jobs(tmp_path: Path) -> None:
    """A conversion that is refused by itself, after the launch."""
    (tmp_path / "empty").mkdir()
    process = start(tmp_path, "job=upcycle", "--", "verify", "empty")
    (output,) = ended(process)
    assert process.returncode == 2
    assert "verifies empty" in output and "error:" in output


def test_a_dry_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execvpe", None)
    job = tiny_job(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["dry_run=true", "ranks_per_node=2", *CPU, "--", *job]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    last = capfd.readouterr().out.splitlines()[-1]
    assert f"{sys.executable} -m torch.distributed.run --nnodes=1 --nproc-per-node=2" in last


def test_every_nodes_command_is_shown_and_none_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execvpe", None)
    words = ["nodes=2", "ranks_per_node=2", "launcher.host=n0", *CPU, "--", *tiny_job(tmp_path)]
    assert main(words) == 0
    output = capfd.readouterr().out
    commands = [line for line in output.splitlines() if "torch.distributed.run" in line]
    assert len(commands) == 2 and all("--rdzv-endpoint=n0:29400" in one for one in commands)
    assert "is_host=1" in commands[0] and "is_host=0" in commands[1]
    assert "nothing was started" in output


def test_fewer_nodes_and_a_rendezvous_of_their_own_are_in_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execvpe", None)
    words = ["nodes=4", "min_nodes=2", "ranks_per_node=2", "launcher.host=n0", *CPU]
    words += ["launcher.rdzv_host=keeper", "--", *tiny_job(tmp_path, "train.batch_size=48")]
    assert main(words) == 0
    output = capfd.readouterr().out
    commands = [line for line in output.splitlines() if "torch.distributed.run" in line]
    assert len(commands) == 4
    for command in commands:
        assert "--rdzv-endpoint=keeper:29400" in command and "is_host=0" in command
        assert "--nnodes=2:4" in command and "last_call_timeout=10" in command
    assert "composes and fits 8 or 6 or 4 ranks" in output


def hostile_plan(**values: object) -> Plan:
    return Plan(LaunchConfig(**values), HOSTILE, ranks_per_node=2, cuda=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("job", list(Job))
def test_every_word_reaches_the_job_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    fake = script(tmp_path / "bin o/python", DUMP)
    monkeypatch.setattr(launch.local, "this_python", lambda: str(fake))
    plan = hostile_plan(job=job, env=["MY_KEY='\"$(touch broken)"])
    subprocess.run(["bash", "-c", Local().text(plan)], cwd=tmp_path, check=True, env=environment())
    seen = json.loads((fake.parent / "seen0.json").read_text())
    words_seen = seen["words"][-len(HOSTILE) :]
    assert (through_torchrun(words_seen) if job is Job.train else words_seen) == list(HOSTILE)
    assert seen["environment"]["MY_KEY"] == "'\"$(touch broken)"
    ranks = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    assert (ranks.items() <= seen["environment"].items()) == (job is Job.train)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin o"]
    called: list[object] = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: called.extend(arguments))
    Local().launch(plan)
    file, words, variables = called
    assert isinstance(words, list) and isinstance(variables, dict)
    assert (file, words[1:]) == (str(fake), seen["words"])
    assert variables["MY_KEY"] == seen["environment"]["MY_KEY"]


def test_torchrun_itself_takes_every_word(tmp_path: Path) -> None:
    """Its parser leaves the job's words alone."""
    (tmp_path / "placed").mkdir()
    module = tmp_path / "placed" / "dump.py"
    module.write_text(DUMP.replace("seen{node}", "seen{os.environ['RANK']}"))
    words = Local()._words(Plan(LaunchConfig(device=Device.cpu), HOSTILE, 1, False), 0)
    words[words.index("trainer.train")] = "placed.dump"
    subprocess.run(words, env=environment(PYTHONPATH=str(tmp_path)), check=True, timeout=60)
    seen = json.loads((tmp_path / "placed/seen0.json").read_text())
    assert seen["words"] == list(HOSTILE)


def test_the_store_serves_until_it_is_told_to_stop() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.store", "0"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    port = int(process.stdout.readline().rpartition(" ")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
