"""A few emulated hosts on this machine: network namespaces on one switch, each with a name, an
address and a limited link that can be cut.

Needs Linux, root and the tools `ip`, `tc`, `bridge` and `unshare`; `missing()` says what there is
not. The switch is in a namespace of its own, so the machine's own network is never touched. A
process that outlives this one removes everything if this one dies.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
NET = "10.77.0"
TOOLS = ("ip", "tc", "bridge", "unshare")
ON_HOST = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def missing() -> str | None:
    """Why hosts cannot be emulated here; None if they can."""
    if sys.platform != "linux":
        return "emulated hosts are network namespaces of Linux"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"emulated hosts need {', '.join(lacking)} (Debian: iproute2, util-linux)"
    name = f"ek{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _do("ip", "netns", "del", name)
    return None


_numbers = itertools.count()


class Cluster:
    """Hosts n0, n1, ... at 10.77.0.1, ...; a context manager.

    Args:
        folder: for the hosts' common /etc/hosts. hosts: their number. mbit: of every host's link,
            each way.
    """

    def __init__(self, folder: Path, hosts: int = 2, mbit: int = 1000) -> None:
        self.size, self.names = hosts, folder / "hosts"
        self.prefix = f"ek{os.getpid()}c{next(_numbers)}"
        self.switch = f"{self.prefix}s"
        lines = ["127.0.0.1 localhost", *(f"{address(i)} n{i}" for i in range(hosts))]
        self.names.write_text("\n".join(lines) + "\n")
        spaces = [*map(self.space, range(hosts)), self.switch]
        self._guard = subprocess.Popen(
            [sys.executable, __file__, *spaces], stdin=subprocess.PIPE, start_new_session=True
        )
        _do("ip", "netns", "add", self.switch)
        _do("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        _do("ip", "-n", self.switch, "link", "set", "br0", "up")
        for host in range(hosts):
            self._add(host, mbit)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()  # which it waits for
        self._guard.wait()

    def start(
        self, host: int, words: Sequence[str], log: Path, **variables: str
    ) -> subprocess.Popen[bytes]:
        """Run a command on a host; its output is appended to the log."""
        enter = ["ip", "netns", "exec", self.space(host), "unshare", "-u", "-m"]
        named = ["sh", "-c", ON_HOST, "_", f"n{host}", str(self.names)]
        with log.open("ab") as out:
            return subprocess.Popen(
                [*enter, *named, *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400", **variables},
                cwd=self.names.parent,
                start_new_session=True,
            )

    def pids(self, host: int) -> list[int]:
        """Processes of a host."""
        return pids_of(self.space(host))

    def clear(self) -> None:
        """Kill every process of every host, and heal every link."""
        for host in range(self.size):
            kill_all(self.space(host))
            self.heal(host)

    def cut(self, host: int) -> None:
        """Drop all frames from and to a host; neither side is told."""
        _do("ip", "netns", "exec", self.switch, *f"bridge link set dev p{host} state 0".split())

    def heal(self, host: int) -> None:
        """Undo `cut`."""
        _do("ip", "netns", "exec", self.switch, *f"bridge link set dev p{host} state 3".split())

    def lose(self, host: int) -> None:
        """Power loss: its link first, so that no goodbye leaves it, then all of its processes."""
        self.cut(host)
        kill_all(self.space(host))

    def space(self, host: int) -> str:
        """Name of the network namespace of a host."""
        return f"{self.prefix}n{host}"

    def _add(self, host: int, mbit: int) -> None:
        space, port = self.space(host), f"p{host}"
        _do("ip", "netns", "add", space)
        _do("ip", "-n", space, *f"link add eth0 type veth peer name {port}".split())
        _do("ip", "-n", space, "link", "set", port, "netns", self.switch)
        _do("ip", "-n", self.switch, *f"link set {port} master br0 up".split())
        _do("ip", "-n", space, "link", "set", "lo", "up")
        _do("ip", "-n", space, "link", "set", "eth0", "up")
        _do("ip", "-n", space, "addr", "add", f"{address(host)}/24", "dev", "eth0")
        bucket = max(4000, mbit * 125)  # bytes: a millisecond of traffic
        for where, device in ((space, "eth0"), (self.switch, port)):
            limit = f"tbf rate {mbit}mbit burst {bucket} limit 64000000"
            _do(
                "ip",
                "netns",
                "exec",
                where,
                *f"tc qdisc add dev {device} root".split(),
                *limit.split(),
            )


def address(host: int) -> str:
    return f"{NET}.{host + 1}"


def pids_of(space: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def kill_all(space: str) -> None:
    """Kill what runs in a namespace, until nothing does."""
    for _ in range(100):
        pids = pids_of(space)
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"


def guard(spaces: Sequence[str]) -> None:
    """Wait until the process at the other end closes or dies; then remove its namespaces."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    for space in spaces:
        kill_all(space)
        subprocess.run(["ip", "netns", "del", space], capture_output=True)


if __name__ == "__main__":
    guard(sys.argv[1:])
