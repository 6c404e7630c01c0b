"""What is started: the job's module and overrides, its ranks, its environment, its command."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from configs.launch_schema import Device, Job, LaunchConfig
from configs.secrets import refuse_secrets
from launch.findings import Finding

MODULES = {
    Job.train: "trainer.train",
    Job.upcycle: "trainer.upcycle",
    Job.sweep: "placement.sweep",
}
RENDEZVOUS_ID = "evenkeel"
LAST_CALL_S = 10  # that min_nodes wait for more


class Launcher(Protocol):
    """Where ranks are started."""

    is_here: ClassVar[bool]  # on this machine
    sees_files: ClassVar[bool]  # the job has the files of this machine

    def findings(self, plan: Plan) -> list[Finding]:
        """What is right or wrong with the launcher's own values and this machine."""
        ...

    def text(self, plan: Plan) -> str:
        """The commands, or the content of the file, that `launch` runs or writes."""
        ...

    def launch(self, plan: Plan) -> int:
        """Do it; the exit code."""
        ...


@dataclass(frozen=True)
class Plan:
    """A job, ready to be started.

    Attributes:
        overrides: of the job; every one reaches it as one argument, unchanged. cuda: whether
            ranks compute on GPUs, one each.
    """

    config: LaunchConfig
    overrides: tuple[str, ...]
    ranks_per_node: int
    cuda: bool

    @property
    def num_ranks(self) -> int:
        return self.config.nodes * self.ranks_per_node

    @property
    def possible_ranks(self) -> list[int]:
        """Numbers of ranks that the job may run on, most first."""
        few = self.config.min_nodes or self.config.nodes
        return [n * self.ranks_per_node for n in range(self.config.nodes, few - 1, -1)]

    @property
    def module(self) -> str:
        return MODULES[self.config.job]

    @property
    def words(self) -> list[str]:
        """The overrides as the command has them: torchrun makes $ of $$ and fills in ${local_rank}.

        (string.Template in torch/distributed/elastic/utils/api.py.)
        """
        if self.config.job is not Job.train:
            return list(self.overrides)
        return [word.replace("$", "$$") for word in self.overrides]

    @property
    def names(self) -> list[str]:
        """Environment variables that are given by name: their values are never written."""
        return [entry for entry in self.config.env if "=" not in entry]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that are set for the job, and their values."""
        config, found = self.config, {}
        if config.job is Job.train:
            # without it a restarted rank reads the addresses of dead ranks (pytorch#135712)
            found["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            found["OMP_NUM_THREADS"] = str(config.threads)
        if config.interface is not None:
            found["GLOO_SOCKET_IFNAME"] = found["NCCL_SOCKET_IFNAME"] = config.interface
        if config.device is Device.cpu:
            found["CUDA_VISIBLE_DEVICES"] = ""
        for entry in config.env:
            name, has_value, value = entry.partition("=")
            if has_value:
                found[name] = value
        return found

    def options(self, *, is_host: bool | None) -> list[str]:
        """Options of torchrun, all but where the nodes meet.

        Args:
            is_host: whether the node's torchrun serves the rendezvous; None: if the endpoint is
                its own name.
        """
        config = self.config
        conf = {"join_timeout": config.join_timeout_s, "read_timeout": config.join_timeout_s}
        nodes = str(config.nodes)
        if config.min_nodes is not None:
            conf["last_call_timeout"] = LAST_CALL_S
            nodes = f"{config.min_nodes}:{nodes}"
        if is_host is not None:
            conf["is_host"] = int(is_host)
        return [
            f"--nnodes={nodes}",
            f"--nproc-per-node={self.ranks_per_node}",
            "--rdzv-backend=c10d",
            f"--rdzv-conf={','.join(f'{name}={value}' for name, value in conf.items())}",
            f"--max-restarts={config.max_restarts}",
            f"--shutdown-timeout={config.grace_s}",
        ]

    def command(
        self,
        python: str,
        *,
        endpoint: str,
        is_host: bool | None,
        rendezvous_id: str = RENDEZVOUS_ID,
        address: str | None = None,
    ) -> list[str]:
        """The command of a node, word by word."""
        if self.config.job is not Job.train:
            return [python, "-m", self.module, *self.words]
        meet = [f"--rdzv-endpoint={endpoint}", f"--rdzv-id={rendezvous_id}"]
        meet += [f"--local-addr={address}"] if address is not None else []
        options = [*self.options(is_host=is_host), *meet]
        torchrun = [python, "-m", "torch.distributed.run", *options]
        return [*torchrun, "-m", self.module, *self.words]


def make_plan(config: LaunchConfig, launcher: Launcher, overrides: tuple[str, ...]) -> Plan:
    """Decide on ranks and device.

    Raises:
        ValueError: if the ranks of other machines are not given, or an override spells a secret.
    """
    refuse_secrets(overrides)
    if config.job is not Job.train:
        return Plan(config, overrides, 1, config.device is Device.cuda)
    gpus = torch.cuda.device_count() if launcher.is_here else 0
    cuda = config.device is Device.cuda
    if config.device is Device.auto:
        cuda = gpus > 0 if launcher.is_here else True
    ranks = config.ranks_per_node
    if ranks is None:
        if not launcher.is_here:
            raise ValueError(
                "ranks_per_node is missing: the GPUs of other machines cannot be counted from "
                "here; give ranks_per_node=8, say"
            )
        ranks = max(1, gpus) if cuda else 1
    return Plan(config, overrides, ranks, cuda)


def this_python() -> str:
    """The interpreter that runs this."""
    return sys.executable
