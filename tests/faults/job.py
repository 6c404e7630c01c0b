"""A training job on emulated hosts, as a user has one: every host runs `python -m launch`, a host
of its own keeps the rendezvous, all see one file system."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.cluster import Cluster
from tests.launch.jobs import tiny_job

INJECT = Path(__file__).parent / "inject"
RANKS_PER_HOST = 2
PORT = 29400
TIMEOUT_S = 10  # mesh.timeout_s
JOB = (
    "train.micro_batch_size=1",
    "planner=home",  # bitwise the same losses whenever the same ranks take the same steps
    "checkpoint.every=5",
    "checkpoint.keep=100",
    f"mesh.timeout_s={TIMEOUT_S}",
    "optim.warmup_steps=2",
    "optim.schedule=constant",
)


class HostJob:
    """Training on the hosts of a cluster but the last, which keeps the rendezvous.

    Args:
        folder: of text, results and logs. options: of the launcher.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, *overrides: str, options: tuple[str, ...] = ()
    ) -> None:
        self.cluster, self.folder = cluster, folder
        self.hosts = cluster.size - 1
        self.overrides = [*tiny_job(folder), *JOB, *overrides]
        self.options = options
        self.sign = folder / "struck"
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.keep_rendezvous()

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def keep_rendezvous(self) -> None:
        """Start the store on the last host."""
        words = [sys.executable, "-m", "launch.store", str(PORT)]
        self.cluster.start(self.hosts, words, self.folder / "store.log")

    def start(self, host: int, **variables: str) -> None:
        """Start the host's part of the job, or start it again."""
        words = [sys.executable, "-m", "launch", "launcher=local", "device=cpu", "interface=eth0"]
        words += [f"nodes={self.hosts}", f"ranks_per_node={RANKS_PER_HOST}"]
        words += [f"launcher.node_rank={host}", f"launcher.address=n{host}", "launcher.host=n0"]
        words += [f"launcher.rdzv_host=n{self.hosts}", f"rdzv_port={PORT}", *self.options]
        paths = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{INJECT}"}
        self.processes[host] = self.cluster.start(
            host, [*words, "--", *self.overrides], self.log(host), **paths, **variables
        )

    def start_all(self, **variables: str) -> None:
        for host in range(self.hosts):
            self.start(host, **variables)

    def ranks(self, host: int) -> list[int]:
        """Processes of the host that train."""
        found = []
        for pid in self.cluster.pids(host):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"trainer.train" in words and b"torch.distributed.run" not in words:
                found.append(pid)
        return found

    def fault(self, where: str, rank: int, step: int) -> dict[str, str]:
        """Variables that strike a rank once; see `tests.faults.strike`."""
        return {"FAULT": f"{where} {rank} {step} {self.sign}"}

    def struck_at(self) -> float:
        """When it was (monotonic)."""
        return float(self.sign.read_text())

    def log(self, host: int) -> Path:
        return self.folder / f"n{host}.log"

    def output(self, host: int) -> str:
        path = self.log(host)
        return path.read_text(errors="replace") if path.exists() else ""

    def lines(self) -> list[str]:
        """Of steps in metrics.jsonl, in the order of writing: repeated steps come twice."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if '"train/loss"' in line]

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]

    def last_step(self) -> int:
        lines = self.lines()
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait_until(self, condition: Callable[[], Any], what: str, seconds: float = 120) -> float:
        """Seconds until the condition holds."""
        start = time.monotonic()
        while not condition():
            waited = time.monotonic() - start
            alive = any(process.poll() is None for process in self.processes.values())
            assert alive and waited < seconds, f"not {what} after {waited:.0f} s:\n{self.outputs()}"
            time.sleep(0.05)
        return time.monotonic() - start

    def wait_for_step(self, step: int, seconds: float = 120) -> float:
        return self.wait_until(lambda: self.last_step() >= step, f"at step {step}", seconds)

    def wait_for_more(self, records: int, seconds: float = 120) -> float:
        return self.wait_until(lambda: len(self.lines()) > records, "going on", seconds)

    def finish(self, seconds: float = 180) -> None:
        """Wait for a good end on all hosts."""
        for host, process in self.processes.items():
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"n{host} does not end:\n{self.outputs()}") from None
            assert code == 0, f"n{host} ended with {code}:\n{self.outputs()}"

    def outputs(self) -> str:
        return "\n".join(f"--- n{host}\n{self.output(host)[-3000:]}" for host in range(self.hosts))


def losses_of(records: list[dict[str, Any]]) -> dict[int, set[float]]:
    """Losses by step: one each, if repeated steps gave what they gave before."""
    losses: dict[int, set[float]] = {}
    for record in records:
        losses.setdefault(record["step"], set()).add(record["train/loss"])
    return losses
