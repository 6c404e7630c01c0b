"""Emulated nodes: network namespaces whose links are as slow as you like, on one Linux machine.

Every rank has a namespace of its own. Its port lets `intra` through to and from the other ranks of
its node and, beside that, `inter` to and from all others. It leads to the bridge of the node, which
leads to a core bridge through a link that lets `node` through, for all its ranks together. Links
work both ways at once. Bridges live in a namespace of their own, so interfaces and routes of the
machine are not touched. Needs root, iproute2 and a kernel with veth, bridge, htb and u32.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SUBNET = "10.77.0"
QUEUE_PACKETS = 20_000


@dataclass(frozen=True)
class Rates:
    """Of a rank to its node, of a rank to other nodes, and of a node to others."""

    intra: str
    inter: str
    node: str


class EmulationError(RuntimeError):
    """This machine cannot emulate nodes; the message says why."""


@contextmanager
def emulated_nodes(
    num_nodes: int, ranks_per_node: int, *, intra: str, inter: str, node: str, ttl_s: int = 900
) -> Iterator[list[list[str]]]:
    """Set nodes up; yields for every rank what to put before a command that runs there.

    Everything in the namespaces is killed, and they are removed, at the end or after `ttl_s`
    seconds, even if this process is gone by then. Each rank's interface is `eth0`.

    Args:
        intra, inter, node: rates such as 400mbit.

    Raises:
        EmulationError: without root or iproute2, or if the kernel refuses.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        raise EmulationError(
            "emulated nodes need root and the commands ip and tc (on Debian and Ubuntu: "
            "apt install iproute2)"
        )
    name = f"evk{os.getpid()}"
    switch, ranks = f"{name}s", [f"{name}r{r}" for r in range(num_nodes * ranks_per_node)]
    script = "; ".join(_removal(namespace) for namespace in (*ranks, switch))
    watchdog = subprocess.Popen(["sh", "-c", f"sleep {ttl_s}; {script}"], start_new_session=True)
    try:
        try:
            _build(switch, ranks, ranks_per_node, Rates(intra, inter, node))
        except subprocess.CalledProcessError as error:
            raise EmulationError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        yield [["ip", "netns", "exec", rank] for rank in ranks]
    finally:
        os.killpg(watchdog.pid, 9)
        watchdog.wait()
        subprocess.run(["sh", "-c", script], check=False, capture_output=True)


def _build(switch: str, ranks: list[str], ranks_per_node: int, rates: Rates) -> None:
    _run("ip", "netns", "add", switch)
    _bridge(switch, "core")
    for node in range(len(ranks) // ranks_per_node):
        _bridge(switch, f"node{node}")
        _in(switch, "ip", "link", "add", f"up{node}", "type", "veth", "peer", "name", f"down{node}")
        for port, bridge in ((f"up{node}", f"node{node}"), (f"down{node}", "core")):
            _in(switch, "ip", "link", "set", port, "master", bridge, "up")
            _limit(switch, port, rates.node)
    for rank, namespace in enumerate(ranks):
        _run("ip", "netns", "add", namespace)
        node, port = rank // ranks_per_node, f"port{rank}"
        near = [_address(r) for r in range(len(ranks)) if r // ranks_per_node == node]
        _in(namespace, "ip", "link", "add", "eth0", "type", "veth", "peer", port, "netns", switch)
        _in(switch, "ip", "link", "set", port, "master", f"node{node}", "up")
        _limit(switch, port, rates.inter, ("src", near, rates.intra))
        for device in ("lo", "eth0"):
            _in(namespace, "ip", "link", "set", device, "up")
        _in(namespace, "ip", "addr", "add", f"{_address(rank)}/24", "dev", "eth0")
        # bbr, where it is the default, paces itself; cubic fills the link
        route = ("dev", "eth0", "proto", "kernel", "scope", "link", "src", _address(rank))
        _in(namespace, "ip", "route", "change", f"{SUBNET}.0/24", *route, "congctl", "cubic")
        for key in ("tcp_slow_start_after_idle=0", "tcp_no_metrics_save=1"):
            _in(namespace, "sysctl", "-qw", f"net.ipv4.{key}")
        _limit(namespace, "eth0", rates.inter, ("dst", near, rates.intra))


def _address(rank: int) -> str:
    return f"{SUBNET}.{rank + 1}"


def _bridge(switch: str, name: str) -> None:
    _in(switch, "ip", "link", "add", name, "type", "bridge")
    _in(switch, "ip", "link", "set", name, "up")


def _limit(
    namespace: str, device: str, rate: str, near: tuple[str, list[str], str] | None = None
) -> None:
    """Let so much through, and another rate from or to some addresses.

    Packets without data, which only acknowledge, go first: behind bulk data in the same queue they
    would stop the other direction again and again.
    """
    tc, on = ("ip", "netns", "exec", namespace, "tc"), ("dev", device)
    _run(*tc, "qdisc", "add", *on, "root", "handle", "1:", "htb", "default", "20")
    for child, speed in (("1:10", "10gbit"), ("1:20", rate), ("1:30", near[2] if near else rate)):
        _run(*tc, "class", "add", *on, "parent", "1:", "classid", child, "htb", "rate", speed)
        queue = ("pfifo", "limit", str(QUEUE_PACKETS))
        _run(*tc, "qdisc", "add", *on, "parent", child, *queue)
    filters: list[tuple[tuple[str, ...], str]]
    filters = [(("u16", "0x0000", "0xff80", "at", "2"), "1:10")]  # IP packets below 128 bytes
    if near:
        filters += [(("ip", near[0], f"{address}/32"), "1:30") for address in near[1]]
    for order, (match, child) in enumerate(filters, start=1):
        place = (*on, "parent", "1:", "protocol", "ip", "prio", str(order))
        _run(*tc, "filter", "add", *place, "u32", "match", *match, "flowid", child)


def _removal(namespace: str) -> str:
    return f"ip netns pids {namespace} | xargs -r kill -9; ip netns del {namespace}"


def _in(namespace: str, *command: str) -> None:
    _run("ip", "netns", "exec", namespace, *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
