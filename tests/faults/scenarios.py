"""Faults of a job on two emulated hosts: what the user sees, how long it takes, what is lost.

Every scenario trains until the fault, waits for recovery and holds that the losses of all steps,
also of those that were taken twice, are bitwise those of a run without the fault.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

from tests.faults.cluster import Cluster
from tests.faults.job import TIMEOUT_S, HostJob, losses_of

STEPS = 24
GONE = "is gone, hangs or cannot be reached"
LARGER = (  # products of milliseconds
    "train.seq_len=256",
    "model.overrides.hidden_size=128",
    "model.overrides.moe_intermediate_size=512",
)
RELOCATION = (
    "stats.every=1",
    "relocate.every=4",
    "relocate.pays_within=null",
    "cluster.intra_gbps=100",
    "cluster.inter_gbps=1",
    "cluster.flops=1e9",
)


@dataclass(frozen=True)
class Outcome:
    """Seconds until the error was reported and until the next step was done; None if neither."""

    fault: str
    seen: str
    detected_s: float | None = None
    recovered_s: float | None = None
    steps_lost: int = 0


@dataclass
class Suite:
    """Jobs on hosts n0 and n1 that train, and n2 that keeps the rendezvous.

    Attributes:
        folder: of the folders of all jobs. cluster: three hosts. steps: of a job.
    """

    folder: Path
    cluster: Cluster
    steps: int = STEPS
    _undisturbed: dict[tuple[str, ...], dict[int, set[float]]] = field(default_factory=dict)
    _jobs: int = 0

    def job(self, *overrides: str, options: tuple[str, ...] = ()) -> HostJob:
        """A job on hosts where nothing else runs."""
        self.cluster.clear()
        folder = self.folder / f"job{self._jobs}"
        folder.mkdir()
        self._jobs += 1
        return HostJob(
            self.cluster, folder, f"train.steps={self.steps}", *overrides, options=options
        )

    def undisturbed(self, *overrides: str) -> dict[int, set[float]]:
        """Losses by step of the same job without a fault."""
        if overrides not in self._undisturbed:
            job = self.job(*overrides)
            job.start_all()
            job.finish()
            losses = losses_of(job.records())
            assert list(losses) == list(range(1, self.steps + 1))
            self._undisturbed[overrides] = losses
        return self._undisturbed[overrides]

    def check(self, job: HostJob, *overrides: str) -> None:
        """The job ends well, and no loss is another than without the fault."""
        job.finish()
        assert losses_of(job.records()) == self.undisturbed(*overrides)


def reported(job: HostJob, since: float, who: str = "") -> float:
    """Seconds from a time until n0 says who is gone."""
    job.wait_until(lambda: f"{who}{GONE}" in job.output(0), "reported on the other host")
    return time.monotonic() - since


def recovery(job: HostJob, since: float, taken: int) -> tuple[float, int]:
    """Seconds from a time to the first step of the next start, and how many are taken again.

    Args:
        taken: records before the fault.
    """
    job.wait_until(lambda: repeated(job, taken), "going on from a checkpoint")
    seconds = time.monotonic() - since
    return seconds, repeated(job, taken)


def repeated(job: HostJob, taken: int) -> int:
    """Steps that the next start takes again; 0 before it has taken one."""
    steps = [record["step"] for record in job.records()]
    for before, step in pairwise(steps[max(0, taken - 1) :]):
        if step <= before:
            return int(before + 1 - step)
    return 0


def struck(suite: Suite, where: str, overrides: tuple[str, ...] = ()) -> Outcome:
    """A rank of n1 dies in the middle of something, and all ranks are started again."""
    job = suite.job(*overrides)
    step = {"checkpoint": 1, "relocation": 2}.get(where, 8)
    job.start_all(**job.fault(where, 3, step))
    job.wait_until(job.sign.exists, "struck")
    since = job.struck_at()
    taken = len(job.lines())
    detected = reported(job, since, "rank 3 on n1 ")
    recovered, lost = recovery(job, since, taken)
    suite.check(job, *overrides)
    seen = f"rank 3 on n1 {GONE}"
    return Outcome(f"a rank killed in the {where}", seen, detected, recovered, lost)


def out_of_memory(suite: Suite) -> Outcome:
    """A rank of n1 is refused memory: it says so, and the others say who is gone."""
    job = suite.job()
    job.start_all(**job.fault("memory", 3, 8))
    job.wait_until(job.sign.exists, "struck")
    since, taken = job.struck_at(), len(job.lines())
    job.wait_until(lambda: "Cannot allocate memory" in job.output(1), "told by the rank itself")
    detected = time.monotonic() - since
    recovered, lost = recovery(job, since, taken)
    suite.check(job)
    return Outcome("a rank out of memory", "Cannot allocate memory", detected, recovered, lost)


def launcher_killed(suite: Suite) -> Outcome:
    """The torchrun of n1 is killed and started again; its ranks do not outlive it."""
    job = suite.job()
    job.start_all()
    job.wait_for_step(7)
    agent = job.processes[1].pid
    os.kill(agent, signal.SIGKILL)
    since, taken = time.monotonic(), len(job.lines())
    job.wait_until(lambda: not job.cluster.pids(1), "ended with its torchrun", 5)
    detected = reported(job, since)
    job.start(1)
    recovered, lost = recovery(job, since, taken)
    suite.check(job)
    return Outcome("torchrun of a host killed, started again", GONE, detected, recovered, lost)


def host_lost(suite: Suite) -> Outcome:
    """n1 loses its power, without a goodbye, and comes back."""
    job = suite.job()
    job.start_all()
    job.wait_for_step(7)
    job.cluster.lose(1)
    since, taken = time.monotonic(), len(job.lines())
    detected = reported(job, since)
    assert TIMEOUT_S - 1 < detected < 2 * TIMEOUT_S
    job.cluster.heal(1)
    job.start(1)
    recovered, lost = recovery(job, since, taken)
    suite.check(job)
    return Outcome("a host loses power, comes back", GONE, detected, recovered, lost)


def link_cut(suite: Suite, seconds: float) -> Outcome:
    """The link of n1 carries nothing for a time that is shorter than the timeout."""
    job = suite.job()
    job.start_all()
    job.wait_for_step(7)
    job.cluster.cut(1)
    taken = len(job.lines())
    time.sleep(seconds)
    job.cluster.heal(1)
    since = time.monotonic()
    job.wait_for_more(taken + 1)  # one more may have been on its way
    recovered = time.monotonic() - since
    suite.check(job)
    assert "gone" not in job.output(0) + job.output(1)
    assert len(job.lines()) == STEPS
    return Outcome(f"a link cut for {seconds:g} s", "nothing", None, recovered)


def link_cut_for_good(suite: Suite) -> Outcome:
    """The link of n1 is cut until both hosts have given up; then the job goes on."""
    job = suite.job()
    job.start_all()
    job.wait_for_step(7)
    job.cluster.cut(1)
    since, taken = time.monotonic(), len(job.lines())
    detected = reported(job, since)
    job.wait_until(lambda: f"rank 0 on n0 {GONE}" in job.output(1), "reported on n1")
    job.cluster.heal(1)
    healed = time.monotonic()
    for host, process in job.processes.items():  # whose torchrun may have given up as well
        if process.poll() is not None:
            job.start(host)
    recovered, lost = recovery(job, healed, taken)
    suite.check(job)
    seen = f"rank 2 on n1, 3 on n1 {GONE}"
    return Outcome("a link cut for good, healed later", seen, detected, recovered, lost)


def slow_host(suite: Suite) -> Outcome:
    """n1 gets a tenth of the time: it is stopped for 18 ms out of 20."""
    job = suite.job("train.steps=45", "checkpoint.every=0", *LARGER)
    job.start_all()
    job.wait_for_step(2)
    began, start, ranks = job.last_step(), time.monotonic(), job.ranks(1)
    named = "rank 3 on n1 is slow"
    while named not in job.output(0):
        assert job.last_step() <= began + 21, job.outputs()
        for _ in range(20):
            for number, seconds in ((signal.SIGSTOP, 0.018), (signal.SIGCONT, 0.002)):
                for pid in ranks:
                    os.kill(pid, number)
                time.sleep(seconds)
    detected = time.monotonic() - start
    assert "n0 is slow" not in job.output(0)
    job.wait_until(lambda: "rank 3 on n1 keeps up again" in job.output(0), "well again")
    job.finish()
    return Outcome("a host at a tenth of its speed", named, detected)


def stopped(suite: Suite) -> Outcome:
    """SIGTERM on all hosts, as schedulers send it: all save and end, and the next start goes on."""
    job = suite.job()
    job.start_all()
    job.wait_for_step(7)
    for process in job.processes.values():
        process.send_signal(signal.SIGTERM)
    since = time.monotonic()
    for process in job.processes.values():
        process.wait(60)
    saved, taken = time.monotonic() - since, len(job.lines())
    suite.cluster.clear()
    job.keep_rendezvous()
    job.start_all()
    since = time.monotonic()
    job.wait_for_more(taken)
    recovered = time.monotonic() - since
    suite.check(job)
    assert len(job.lines()) == STEPS  # none was taken twice
    return Outcome("SIGTERM to all hosts", "saved, ended", saved, recovered)


def shrinks_and_grows(suite: Suite) -> Outcome:
    """With min_nodes=1 n0 goes on alone, and with n1 once that is back; alone it computes what two
    ranks compute that were never disturbed, from the same checkpoint."""
    job = suite.job("train.steps=1000", "checkpoint.every=20", options=("min_nodes=1",))
    job.start_all()
    job.wait_for_step(25)
    job.cluster.lose(1)
    since, taken = time.monotonic(), len(job.lines())
    detected = reported(job, since)
    recovered, lost = recovery(job, since, taken)
    job.wait_until(lambda: ranks_of(job)[-5:] == [2] * 5, "alone")
    job.cluster.heal(1)
    job.start(1)
    job.wait_until(lambda: ranks_of(job)[-5:] == [4] * 5, "together again")
    suite.cluster.clear()
    alone = [r for r, ranks in zip(job.records(), ranks_of(job), strict=True) if ranks == 2]
    first = alone[0]["step"]
    other = suite.job("train.steps=1000", "checkpoint.every=20", options=("nodes=1",))
    name = f"step-{first - 1:08}"
    shutil.copytree(job.run_dir / "checkpoints" / name, other.run_dir / "checkpoints" / name)
    other.start(0)
    other.wait_for_step(first + 9)
    suite.cluster.clear()
    expected, found = losses_of(other.records()), losses_of(alone)
    compared = sorted(expected.keys() & found.keys())
    assert len(compared) >= 5
    assert {s: expected[s] for s in compared} == {s: found[s] for s in compared}
    return Outcome("a host lost, min_nodes=1", GONE, detected, recovered, lost)


def ranks_of(job: HostJob) -> list[int]:
    """Ranks that took every recorded step."""
    speeds = [
        (record["speed/tokens_per_s"], record["speed/tokens_per_s_per_rank"])
        for record in job.records()
    ]
    return [round(total / per_rank) for total, per_rank in speeds]


def clocks_apart(suite: Suite) -> Outcome:
    """The clock of n1 is an hour ahead."""
    job = suite.job()
    job.start(0)
    job.start(1, CLOCK_OFF_S="3600")
    suite.check(job)
    return Outcome("clocks an hour apart", "nothing")


ALL: dict[str, Callable[[Suite], Outcome]] = {
    "forward": partial(struck, where="forward"),
    "backward": partial(struck, where="backward"),
    "optimizer": partial(struck, where="optimizer"),
    "checkpoint": partial(struck, where="checkpoint"),
    "relocation": partial(struck, where="relocation", overrides=RELOCATION),
    "memory": out_of_memory,
    "torchrun": launcher_killed,
    "host": host_lost,
    "short_cut": partial(link_cut, seconds=5),
    "cut": link_cut_for_good,
    "slow": slow_host,
    "sigterm": stopped,
    "shrink": shrinks_and_grows,
    "clocks": clocks_apart,
}
