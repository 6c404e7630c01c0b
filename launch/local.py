"""Ranks on this machine: torchrun, in the place of the process that launches."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from configs.launch_schema import Job, LocalValues
from launch.findings import Finding, names_findings, note, ok, port_finding, problem
from launch.plan import Plan, this_python

PORT = 29400


@dataclass(frozen=True)
class Local(LocalValues):
    """This machine, or its part of several."""

    is_here: ClassVar[bool] = True
    sees_files: ClassVar[bool] = True

    def findings(self, plan: Plan) -> list[Finding]:
        """Where nodes meet, the port, the GPUs, the environment."""
        found = names_findings(plan.names)
        if plan.config.job is not Job.train:
            return found
        found += self._nodes(plan)
        if plan.cuda:
            found.append(_gpus(plan))
        elif torch.cuda.device_count():
            found.append(ok("device", "CPUs; device=cpu hides the GPUs"))
        else:
            found.append(ok("device", "CPUs; there is no GPU here"))
        return found

    def text(self, plan: Plan) -> str:
        """The command of this node, or of every node."""
        if self.node_rank is not None or plan.config.nodes == 1:
            return self._line(plan, self.node_rank or 0)
        lines = []
        for node in range(plan.config.nodes):
            lines += [f"# node {node}", self._line(plan, node)]
        return "\n".join(lines)

    def launch(self, plan: Plan) -> int:
        """Become the job: its signals and its exit code are the ones of this process.

        With several nodes and no number of this one nothing is started.
        """
        if plan.config.nodes > 1 and self.node_rank is None:
            print(
                "nothing was started: run each command on its node, or this one there with "
                "launcher.node_rank=0, 1, ..."
            )
            return 0
        words = self._words(plan, self.node_rank or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(words[0], words, {**os.environ, **plan.environment})

    def _words(self, plan: Plan, node: int) -> list[str]:
        nodes, port = plan.config.nodes, plan.config.rdzv_port
        if nodes == 1:
            endpoint = f"localhost:{port or 0}"
            return plan.command(this_python(), endpoint=endpoint, is_host=True)
        address = self.address if node == (self.node_rank or 0) else None
        return plan.command(
            this_python(),
            endpoint=f"{self.rdzv_host or self.host}:{port or PORT}",
            is_host=node == 0 and self.rdzv_host is None,
            address=address or (self.host if node == 0 else None),
        )

    def _line(self, plan: Plan, node: int) -> str:
        variables = [f"{name}={value}" for name, value in plan.environment.items()]
        prefix = ["env", *variables] if variables else []
        return shlex.join([*prefix, *self._words(plan, node)])

    def _nodes(self, plan: Plan) -> list[Finding]:
        nodes, port = plan.config.nodes, plan.config.rdzv_port
        if nodes == 1:
            return [port_finding(port)] if port is not None else []
        if self.host is None:
            text = f"launcher.host is missing: {nodes} nodes meet on the first; give its name"
            return [problem("nodes", text)]
        if self.node_rank is None:
            return [note("nodes", "launcher.node_rank is null: commands are shown, none is run")]
        if not 0 <= self.node_rank < nodes:
            text = f"launcher.node_rank ({self.node_rank}) must be >= 0 and < nodes ({nodes})"
            return [problem("nodes", text)]
        if self.node_rank == 0 and self.rdzv_host is None:
            return [port_finding(port or PORT)]
        key = "host" if self.rdzv_host is None else "rdzv_host"
        name = getattr(self, key)
        try:
            socket.getaddrinfo(name, port or PORT)
        except OSError as error:
            return [problem("nodes", f"launcher.{key} ({name}): {error}; give its address")]
        return [ok("nodes", f"{name} is known here")]


def _gpus(plan: Plan) -> Finding:
    gpus, ranks = torch.cuda.device_count(), plan.ranks_per_node
    if ranks > gpus:
        text = f"ranks_per_node ({ranks}) must be <= the GPUs of this machine ({gpus})"
        return problem("device", f"{text}; lower it, or use device=cpu")
    return ok("device", f"{ranks} of the {gpus} GPUs of this machine")
