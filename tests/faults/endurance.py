"""A long run with a random fault every 30 to 60 s: `python -m tests.faults.endurance`.

Two emulated hosts with two ranks each train a tiny model, once undisturbed and once under faults.
Holds that every step has bitwise the same loss in both, so that no sequence is lost or taken twice
in a step, that nothing hangs, and that threads, files and memory of the undisturbed ranks and of
the disturbed torchruns do not grow. Prints what happened. Needs root on Linux.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.faults.cluster import Cluster, missing
from tests.faults.job import HostJob, losses_of
from tests.faults.scenarios import Suite

PATIENCE_S = 180  # without a new step the run hangs
SETTLED = 0.25  # share of the steps after which nothing may grow any more
MEMORY_MB = 30


@dataclass(frozen=True)
class Use:
    """Of several processes together."""

    threads: int
    files: int
    memory_mb: float

    @classmethod
    def of(cls, pids: Sequence[int]) -> Use:
        threads = files = memory = 0
        for pid in pids:
            folder = Path(f"/proc/{pid}")
            threads += len(list((folder / "task").iterdir()))
            files += len(list((folder / "fd").iterdir()))
            memory += int((folder / "statm").read_text().split()[1])
        return cls(threads, files, memory * os.sysconf("SC_PAGE_SIZE") / 1e6)

    def check(self, later: Use, what: str) -> None:
        """The later use is no larger."""
        print(f"{what}: {self} at first, {later} at last", flush=True)
        assert later.threads <= self.threads, what
        assert later.files <= self.files, what
        assert later.memory_mb <= self.memory_mb + MEMORY_MB, what


def kill_rank(job: HostJob, choose: random.Random) -> str:
    host = choose.randrange(job.hosts)
    os.kill(choose.choice(job.ranks(host)), signal.SIGKILL)
    return f"a rank of n{host} killed"


def freeze_rank(job: HostJob, choose: random.Random) -> str:
    host = choose.randrange(job.hosts)
    pid = choose.choice(job.ranks(host))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(20)
    for other in job.ranks(host):
        if other == pid:
            os.kill(pid, signal.SIGCONT)
    return f"a rank of n{host} frozen for 20 s"


def cut_link(job: HostJob, choose: random.Random) -> str:
    host, seconds = choose.randrange(job.hosts), choose.choice((3, 5, 20))
    job.cluster.cut(host)
    time.sleep(seconds)
    job.cluster.heal(host)
    return f"the link of n{host} cut for {seconds} s"


def lose_host(job: HostJob, choose: random.Random) -> str:
    host = choose.randrange(job.hosts)
    job.cluster.lose(host)
    time.sleep(choose.uniform(1, 15))
    job.cluster.heal(host)
    return f"n{host} without power"


FAULTS = (kill_rank, freeze_rank, cut_link, lose_host)


def undisturbed(suite: Suite) -> dict[int, set[float]]:
    """Losses by step; nothing grows."""
    job = suite.job(*LONG)
    job.start_all()
    job.wait_for_step(int(SETTLED * suite.steps), 3600)
    ranks = [pid for host in range(job.hosts) for pid in job.ranks(host)]
    first = Use.of(ranks)
    job.wait_for_step(suite.steps - 20, 3600)
    first.check(Use.of(ranks), "ranks")
    job.finish(600)
    return losses_of(job.records())


LONG = ("checkpoint.every=25", "checkpoint.keep=2")


def disturbed(suite: Suite, choose: random.Random) -> HostJob:
    """Train to the end under faults; the torchruns do not grow from the first to the last."""
    job = suite.job(*LONG, options=("max_restarts=1000",))
    job.start_all()
    job.wait_for_step(1)
    uses: list[Use] = []
    while job.last_step() < suite.steps:
        until = time.monotonic() + choose.uniform(30, 60)
        while time.monotonic() < until and job.last_step() < suite.steps:
            restart(job)
            time.sleep(0.5)
        if job.last_step() >= suite.steps:
            break
        before = len(job.lines())
        step = job.last_step()
        said = choose.choice(FAULTS)(job, choose)
        restart(job)
        waited = job.wait_for_more(before + 1, PATIENCE_S)  # one may have been on its way
        steps = [record["step"] for record in job.records()[before - 1 :]]
        again = sum(max(0, last + 1 - number) for last, number in pairwise(steps))
        print(f"step {step}: {said}; on after {waited:.0f} s, {again} steps again", flush=True)
        uses.append(Use.of([process.pid for process in job.processes.values()]))
    assert uses, "the run was over before the first fault; raise --steps"
    print(f"{len(uses)} faults", flush=True)
    uses[0].check(uses[-1], "torchruns")
    job.finish(600)
    return job


def restart(job: HostJob) -> None:
    """Start the part of a host whose torchrun has ended, unless the run is over."""
    for host, process in job.processes.items():
        if process.poll() not in (None, 0):
            job.start(host)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.endurance", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    reason = missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), 3) as cluster:
        suite = Suite(Path(folder), cluster, options.steps)
        expected = undisturbed(suite)
        found = losses_of(disturbed(suite, random.Random(options.seed)).records())
    assert list(expected) == list(range(1, options.steps + 1))
    different = [step for step in expected if found.get(step) != expected[step]]
    assert not different, f"steps {different[:5]} have other losses than without faults"
    print(f"all {options.steps} steps have the losses of the run without faults")
    return 0


if __name__ == "__main__":
    sys.exit(main())
