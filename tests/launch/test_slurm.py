"""launcher=slurm: the script is run with stand-ins for sbatch, srun and scontrol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from configs.launch_schema import Job, LaunchConfig
from launch.__main__ import main
from launch.plan import Plan
from launch.slurm import Slurm
from tests.launch.jobs import (
    BIN,
    CPU,
    DUMP,
    HOSTILE,
    environment,
    free_port,
    refused,
    script,
    shown,
    through_torchrun,
    tiny_job,
    written,
)
from tests.trainer.test_run import metrics

SRUN = """\
#!/bin/bash
# Two nodes of one task each; signals go to both, as srun documents.
printf '%s\\n' "$@" >srun.asked
while [[ "$1" == --* ]]; do shift; done
pids=()
for node in 0 1; do
    SLURM_NODEID=$node "$@" >"node$node.log" 2>&1 &
    pids+=("$!")
done
got=0
trap 'got=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM
code=0
for pid in "${pids[@]}"; do
    wait "$pid"; one=$?
    if [ "$got" = 1 ]; then got=0; wait "$pid"; one=$?; fi
    [ "$one" = 0 ] || code=$one
done
exit "$code"
"""
SCONTROL = """\
#!/bin/bash
case $1 in
    show) printf '127.0.0.1\\nother\\n' ;;
    *) echo "$@" >>requeued ;;
esac
"""
SBATCH = '#!/bin/bash\nexec bash "$1"\n'
# a python whose job writes `started`, ends with 7 at SIGTERM and with 0 by itself
PATIENT = """\
#!/bin/bash
trap 'exit 7' TERM
touch "started$SLURM_NODEID"
for _ in $(seq 100); do sleep 0.05; [ -e finish ] && exit 0; done
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and the commands of Slurm in front of PATH."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        script(tmp_path / "bin" / name, text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("SLURM_JOB_ID", str(60000 + free_port(20000, 40000)))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[0-1]")
    return tmp_path


def run_script(slurm: Slurm, plan: Plan) -> subprocess.Popen[bytes]:
    Path("job").write_text(slurm.text(plan))
    return subprocess.Popen(["bash", "job"], env=environment(), start_new_session=True)


def fake_plan(job: Job = Job.train) -> Plan:
    nodes = 2 if job is Job.train else 1
    return Plan(LaunchConfig(job=job, nodes=nodes), HOSTILE, 1, cuda=False)


def test_two_nodes_train(cluster: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Written and submitted as a user does; port and identity come from Slurm's variables."""
    words = ["launcher=slurm", "launcher.submit=true", "nodes=2", "ranks_per_node=1"]
    words += [*CPU, f"env=['PYTHONPATH={environment()['PYTHONPATH']}']", "--", *tiny_job(cluster)]
    assert main(words) == 0, (cluster / "node0.log").read_text()
    logs = [(cluster / f"node{node}.log").read_text() for node in (0, 1)]
    assert any("6 on 2 ranks, EP 2" in log for log in logs)
    assert metrics(cluster / "run")[-1]["step"] == 6
    assert not (cluster / "requeued").exists()
    asked = (cluster / "srun.asked").read_text().splitlines()
    assert asked[1:4] == [
        "--cpus-per-task=8",
        "--open-mode=append",
        f"--output={cluster}/logs/%x-%j-%N.log",
    ]
    assert (cluster / "logs").is_dir()
    assert "the job saves and queues itself again 150 s" in capfd.readouterr().out


@pytest.mark.parametrize("job", list(Job))
def test_every_word_reaches_the_job_unchanged(cluster: Path, job: Job) -> None:
    fake = script(cluster / "bin/py thon", DUMP)
    assert run_script(Slurm(python=str(fake)), fake_plan(job)).wait(timeout=60) == 0
    for node in (0, 1):
        words = json.loads((cluster / f"bin/seen{node}.json").read_text())["words"]
        arrived = words[-len(HOSTILE) :]
        assert (through_torchrun(arrived) if job is Job.train else arrived) == list(HOSTILE)
    assert not (cluster / "broken").exists() and not (cluster / "out").exists()
    if job is Job.train:
        own = words[: -len(HOSTILE)]
        number = os.environ["SLURM_JOB_ID"]
        assert f"--rdzv-endpoint=127.0.0.1:{20000 + int(number) % 20000}" in own
        assert f"--rdzv-id={number}-0" in own


@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [(signal.SIGUSR1, 7, True), (signal.SIGTERM, 7, False), (None, 0, False)],
)
def test_signals_reach_the_ranks_and_only_the_time_limit_queues_again(
    cluster: Path, number: signal.Signals | None, code: int, requeued: bool
) -> None:
    fake = script(cluster / "bin/python", PATIENT)
    process = run_script(Slurm(python=str(fake)), fake_plan())
    end = time.monotonic() + 30
    while not all((cluster / f"started{node}").exists() for node in (0, 1)):
        assert time.monotonic() < end
        time.sleep(0.02)
    if number is None:
        (cluster / "finish").touch()
    else:
        os.kill(process.pid, number)  # of the script alone, as --signal=B: does
    assert process.wait(timeout=30) == code
    assert (cluster / "requeued").exists() == requeued
    if requeued:
        asked = (cluster / "requeued").read_text()
        assert asked == f"requeue {os.environ['SLURM_JOB_ID']}\n"


def test_a_variable_given_by_name_is_needed_and_never_written(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["launcher=slurm", "nodes=2", "ranks_per_node=1", *CPU, "env=[MY_KEY]"]
    words += ["--", *tiny_job(cluster)]
    refused(*words)
    assert "env (MY_KEY) is not set here; export it" in capfd.readouterr().out
    monkeypatch.setenv("MY_KEY", "hush")
    assert main(words) == 0
    assert "hush" not in written(cluster / "evenkeel.sbatch") + capfd.readouterr().out
    fake = script(cluster / "bin/python", DUMP)
    plan = Plan(LaunchConfig(nodes=2, env=["MY_KEY"]), (), 1, cuda=False)
    assert run_script(Slurm(python=str(fake)), plan).wait(timeout=30) == 0
    seen = json.loads((cluster / "bin/seen0.json").read_text())["environment"]
    assert seen["MY_KEY"] == "hush"
    monkeypatch.delenv("MY_KEY")
    assert run_script(Slurm(python=str(fake)), plan).wait(timeout=30) != 0


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("rdzv_host", [None, "store.example"])
def test_the_script_is_sound(cluster: Path, cuda: bool, rdzv_host: str | None) -> None:
    slurm = Slurm(rdzv_host=rdzv_host, partition="gpu", setup=["umask 027"], options=["--qos=low"])
    config = LaunchConfig(nodes=4, grace_s=90, env=["A_TOKEN", "NCCL_DEBUG=INFO"])
    text = slurm.text(Plan(config, HOSTILE, 8, cuda))
    Path("job").write_text(text)
    subprocess.run(["bash", "-n", "job"], check=True)
    found = subprocess.run([BIN / "shellcheck", "--severity=warning", "job"], capture_output=True)
    assert found.returncode == 0, found.stdout.decode()
    lines = text.splitlines()
    directives = lines[2 : lines.index("set -eo pipefail")]
    assert all(line.startswith("#SBATCH --") for line in directives)
    options = {line.removeprefix("#SBATCH ") for line in directives}
    assert {"--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=64", "--requeue"} <= options
    assert {"--signal=B:USR1@120", "--open-mode=append", "--qos=low", "--partition=gpu"} <= options
    assert ("--gpus-per-node=8" in options) == cuda
    assert ("is_host=0" in text) == (rdzv_host is not None)
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in lines


def test_without_sbatch_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("PATH", str(tmp_path))
    job = tiny_job(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = ["launcher=slurm", "nodes=2", "ranks_per_node=1", *CPU]
    refused(*words, "launcher.submit=true", "--", *job)
    assert "there is no sbatch here" in capfd.readouterr().out
    shown(*words, "--", *job)
    assert "#SBATCH --nodes=2" in capfd.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_of_somebody_else_is_kept(cluster: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (cluster / "evenkeel.sbatch").write_text("mine\n")
    words = ["launcher=slurm", "nodes=2", "ranks_per_node=1", *CPU, "--", *tiny_job(cluster)]
    refused(*words)
    assert "exists and is not of python -m launch" in capfd.readouterr().out
    assert (cluster / "evenkeel.sbatch").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("launcher.name='a\nrm -rf x'", "launcher.name ('a\\nrm -rf x') must be made of letters"),
        ("launcher.partition='a b'", "launcher.partition ('a b') must be made of"),
        ("launcher.options=['--x=$(y)']", "launcher.options[0] ('--x=$(y)') must be made of"),
        ("launcher.time=noon", "launcher.time ('noon') must be made of [DAYS-]HOURS:MINUTES"),
        ("launcher.time=0:02:00", "the job would save 150 s before its limit (0:02:00); raise"),
        ("launcher.memory=all", "launcher.memory ('all') must be made of a number"),
        ("launcher.cpus_per_rank=0", "launcher.cpus_per_rank (0) must be >= 1"),
    ],
)
def test_what_is_refused(
    cluster: Path, capfd: pytest.CaptureFixture[str], value: str, expected: str
) -> None:
    words = ["launcher=slurm", "nodes=2", "ranks_per_node=1", *CPU, value]
    refused(*words, "--", *tiny_job(cluster))
    assert expected in capfd.readouterr().out
    assert not (cluster / "evenkeel.sbatch").exists()
