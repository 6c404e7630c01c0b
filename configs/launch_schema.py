"""The values of `python -m launch`: typed, documented, checked before anything is started.

The text under a field is its documentation, as in configs/schema.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from configs.rules import out_of_bounds
from configs.secrets import SECRET

LAUNCH_GROUPS = ("launcher",)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Job(Enum):
    """What is started."""

    train = "train"
    upcycle = "upcycle"
    sweep = "sweep"


class Device(Enum):
    """What ranks compute on."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


@dataclass
class LaunchConfig:
    """One job: what is started, on how many nodes and ranks, and by which launcher."""

    job: Job = Job.train
    """train: trainer.train on all ranks. upcycle: trainer.upcycle, one process. sweep:
    placement.sweep, one process."""
    nodes: int = 1
    """Machines."""
    min_nodes: int | None = None
    """Machines that suffice, with launcher=local: training goes on with these when others are
    lost, and with all again when they are back. null: nodes."""
    ranks_per_node: int | None = None
    """Ranks on a machine, one per GPU. null: one per GPU of this machine, or 1 without GPUs; other
    machines cannot be counted from here, so slurm and kubernetes need it for job=train."""
    device: Device = Device.auto
    """auto: GPUs, except with launcher=local on a machine without any. cpu: hide the GPUs."""
    threads: int = 1
    """Threads of a rank (OMP_NUM_THREADS), with job=train."""
    max_restarts: int = 3
    """Times that torchrun starts all ranks again after one has died; training goes on from the
    newest complete checkpoint."""
    rdzv_port: int | None = None
    """Port where the nodes meet. null: any free one on a single node, one made of the job's
    number with slurm, else 29400."""
    join_timeout_s: int = 600
    """Seconds that a node waits for the others."""
    grace_s: int = 120
    """Seconds that ranks have for their step and a checkpoint once they are told to stop."""
    interface: str | None = None
    """Network interface between nodes, such as eth0 (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME).
    null: as the libraries choose."""
    env: list[str] = field(default_factory=list)
    """Environment variables of the job. NAME: taken from this environment, or a Secret with
    kubernetes; its value is never written. "NAME=VALUE": written out, so not for secrets."""
    dry_run: bool = False
    """Check, show what would be done and stop."""
    force: bool = False
    """Go on although a check found a problem."""
    launcher: Any = MISSING
    """Where the ranks are started."""


@dataclass(frozen=True)
class LocalValues:
    """launcher=local: this machine, or its part of several."""

    host: str | None = None
    """Name or address of the first node, where several nodes meet."""
    rdzv_host: str | None = None
    """Host that runs `python -m launch.store`, where nodes meet instead: one that does not train,
    so that the loss of any training node is survived. null: host."""
    node_rank: int | None = None
    """Number of this node, from 0, to run its part of several. null: show every node's command."""
    address: str | None = None
    """Name or address of this node for the others. null: host on the first node, else the name
    that the machine gives itself."""


@dataclass(frozen=True)
class SlurmValues:
    """launcher=slurm: an sbatch script."""

    file: str = "evenkeel.sbatch"
    """Script that is written."""
    submit: bool = False
    """Submit it with sbatch."""
    name: str = "evenkeel"
    """Name of the job."""
    time: str = "24:00:00"
    """Limit of the run: [DAYS-]HOURS:MINUTES:SECONDS. grace_s before it the ranks save and the job
    is queued again."""
    partition: str | None = None
    """Partition. null: the cluster's default."""
    account: str | None = None
    """Account. null: the user's default."""
    cpus_per_rank: int = 8
    """Cores of a rank: its data loading and the communication need some."""
    memory: str = "0"
    """Memory of a node, such as 200G. 0: all of it."""
    logs: str = "logs"
    """Folder of the logs, one a node and one of the script; it is made with the script."""
    python: str | None = None
    """Interpreter on the nodes. null: the path of this one."""
    rdzv_host: str | None = None
    """Host that runs `python -m launch.store`: one that does not train, so that the loss of any
    training node is survived. null: the first node of the job."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that the script begins with, such as "module load cuda"."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as "--reservation=moe"."""


@dataclass(frozen=True)
class KubernetesValues:
    """launcher=kubernetes: a manifest for kubectl."""

    file: str = "evenkeel.yaml"
    """Manifest that is written."""
    kind: str = "jobset"
    """jobset (jobset.x-k8s.io/v1alpha2) or pytorchjob (kubeflow.org/v1)."""
    name: str = "evenkeel"
    """Name of the job: lower-case letters, digits and -."""
    namespace: str | None = None
    """Namespace. null: that of kubectl's context."""
    image: str | None = None
    """Image with Evenkeel, such as one built from docker/Dockerfile, with a fixed tag; needed."""
    claim: str | None = None
    """PersistentVolumeClaim for data and results. null: none, and what a pod writes is lost."""
    mount: str = "/workspace"
    """Where the claim is mounted; relative paths of the job begin there."""
    secret: str | None = None
    """Secret whose keys are the variables that env gives by name."""
    cpus_per_rank: int = 8
    """Cores of a rank."""
    memory_per_rank: str = "32Gi"
    """Memory of a rank, without the shared memory."""
    shared_memory: str = "8Gi"
    """Size of /dev/shm, through which ranks of a node exchange data."""
    user: int = 1000
    """Number of the user and group that the containers run as."""


def check_launch(config: LaunchConfig) -> None:
    """Refuse values that are out of bounds or do not fit each other.

    Raises:
        ValueError: with one line per problem, each naming key, value, bound and remedy.
    """
    problems = [*out_of_bounds(config), *_one_process(config), *_few_nodes(config), *_env(config)]
    if problems:
        raise ValueError("\n".join(problems))


def _one_process(config: LaunchConfig) -> Iterator[str]:
    if config.job is Job.train:
        return
    for key in ("nodes", "ranks_per_node"):
        value = getattr(config, key)
        if value not in (None, 1):
            yield f"{key} ({value}): job={config.job.name} is one process; leave it out"


def _few_nodes(config: LaunchConfig) -> Iterator[str]:
    few = config.min_nodes
    if few is None:
        return
    if config.job is not Job.train:
        yield f"min_nodes ({few}): job={config.job.name} is one process; leave it out"
    elif few > config.nodes:
        yield f"min_nodes ({few}) must be <= nodes ({config.nodes})"


def _env(config: LaunchConfig) -> Iterator[str]:
    for entry in config.env:
        name, has_value, value = entry.partition("=")
        if not VARIABLE.fullmatch(name):
            yield f"env ({name!r}) must be made of letters, digits and _"
        elif has_value and SECRET.search(name):
            yield (
                f"env ({name}=...): the value of what looks like a secret would be written out; "
                f"give its name alone: env=[{name}]"
            )
        elif "\n" in value or "\0" in value:
            yield f"env ({name}): its value must be one line; give its name alone: env=[{name}]"
