"""A manifest for kubectl: a JobSet or a PyTorchJob with one torchrun per pod and one pod per node.

Both have a first pod, which serves the rendezvous, and the others. Fields: JobSet
jobset.x-k8s.io/v1alpha2 (api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset),
PyTorchJob kubeflow.org/v1 (pkg/apis/kubeflow.org/v1 of kubeflow/training-operator).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from configs.launch_schema import Job, KubernetesValues
from launch.findings import (
    WRITTEN,
    Finding,
    file_finding,
    note,
    ok,
    pattern_findings,
    problem,
    write_file,
)
from launch.plan import Plan

KINDS = ("jobset", "pytorchjob")
NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"  # room for what the names of pods add
NAME_WORDS = "at most 40 lower-case letters, digits and -, from a letter on"
OBJECT = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
IMAGE = r"[a-z0-9][A-Za-z0-9._/:@-]*"
SIZE = r"[1-9]\d*(Mi|Gi)"
MEBIBYTES = {"Mi": 1, "Gi": 1024}
PORT = 29400
NOTICE_S = 30  # beyond what torchrun leaves its ranks
CONTAINER = "pytorch"  # the name that a PyTorchJob looks for


@dataclass(frozen=True)
class Kubernetes(KubernetesValues):
    """A manifest; kubectl applies it."""

    is_here: ClassVar[bool] = False
    sees_files: ClassVar[bool] = False

    def findings(self, plan: Plan) -> list[Finding]:
        """The manifest's values and its file."""
        found = []
        if self.kind not in KINDS:
            text = f"launcher.kind ({self.kind}) must be {' or '.join(KINDS)}"
            found.append(problem("values", text))
        found += pattern_findings({"launcher.name": self.name}, NAME, NAME_WORDS)
        objects = ("namespace", "claim", "secret")
        found += pattern_findings(
            {f"launcher.{name}": getattr(self, name) for name in objects},
            OBJECT,
            "lower-case letters, digits, - and .",
        )
        sizes = ("memory_per_rank", "shared_memory")
        found += pattern_findings(
            {f"launcher.{name}": str(getattr(self, name)) for name in sizes},
            SIZE,
            "a number and Mi or Gi, such as 16Gi",
        )
        found += pattern_findings({"launcher.mount": self.mount}, r"/[\w./-]+", "an absolute path")
        for name in ("cpus_per_rank", "user"):
            if getattr(self, name) < 1:
                text = f"launcher.{name} ({getattr(self, name)}) must be >= 1"
                found.append(problem("values", text))
        found.append(self._image())
        if plan.names and self.secret is None:
            text = f"env ({', '.join(plan.names)}) is given by name: name the Secret that has it"
            found.append(problem("env", f"{text}, launcher.secret=..."))
        if self.claim is None:
            text = "launcher.claim is null: checkpoints are lost with a pod, and a restart begins"
            found.append(note("paths", f"{text} from the start; name a PersistentVolumeClaim"))
        if plan.cuda:
            found.append(note("device", f"{plan.ranks_per_node} GPUs are asked for by every pod"))
        found.append(file_finding("launcher.file", self.file))
        found.append(note("kubectl", f"not applied: kubectl apply -f {self.file} does it"))
        return found

    def text(self, plan: Plan) -> str:
        """The manifest."""
        content = yaml.dump(self.manifest(plan), Dumper=_Dumper, sort_keys=False, width=10**6)
        return f"{WRITTEN}\n{content}"

    def launch(self, plan: Plan) -> int:
        """Write the manifest."""
        write_file(self.file, self.text(plan))
        print(f"written to {self.file}")
        return 0

    def manifest(self, plan: Plan) -> dict[str, Any]:
        """The manifest as an object."""
        metadata = {"name": self.name, "labels": {"app.kubernetes.io/name": "evenkeel"}}
        if self.namespace is not None:
            metadata["namespace"] = self.namespace
        is_set = self.kind == "jobset"
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2" if is_set else "kubeflow.org/v1",
            "kind": "JobSet" if is_set else "PyTorchJob",
            "metadata": metadata,
            "spec": self._job_set(plan) if is_set else self._pytorch_job(plan),
        }

    def _job_set(self, plan: Plan) -> dict[str, Any]:
        """One Job of the first pod and one of the others; if a pod is lost, all begin again."""

        def replicated(name: str, pods: int, is_host: bool) -> dict[str, Any]:
            endpoint = f"{self.name}-first-0-0.{self.name}:{plan.config.rdzv_port or PORT}"
            pod = self._pod(plan, endpoint, is_host) | {"restartPolicy": "Never"}
            job = {
                "completionMode": "Indexed",
                "completions": pods,
                "parallelism": pods,
                "backoffLimit": 0,
                "template": {"spec": pod},
            }
            return {"name": name, "replicas": 1, "template": {"spec": job}}

        jobs = [replicated("first", 1, True)]
        if plan.config.nodes > 1:
            jobs.append(replicated("others", plan.config.nodes - 1, False))
        return {
            "network": {"enableDNSHostnames": True, "subdomain": self.name},
            "failurePolicy": {"maxRestarts": plan.config.max_restarts},
            "replicatedJobs": jobs,
        }

    def _pytorch_job(self, plan: Plan) -> dict[str, Any]:
        """A master and workers, whose containers are started again where they are."""

        def replicas(pods: int, is_host: bool) -> dict[str, Any]:
            endpoint = f"{self.name}-master-0:{plan.config.rdzv_port or PORT}"
            spec = self._pod(plan, endpoint, is_host)
            return {
                "replicas": pods,
                "restartPolicy": "OnFailure",
                "template": {"spec": spec},
            }

        specs = {"Master": replicas(1, True)}
        if plan.config.nodes > 1:
            specs["Worker"] = replicas(plan.config.nodes - 1, False)
        return {
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": plan.config.max_restarts},
            "nprocPerNode": _Word(plan.ranks_per_node),
            "pytorchReplicaSpecs": specs,
        }

    def _pod(self, plan: Plan, endpoint: str, is_host: bool) -> dict[str, Any]:
        volumes: list[dict[str, Any]] = [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shared_memory}},
            {"name": "work", "emptyDir": {}},
        ]
        if self.claim is not None:
            volumes[1] = {"name": "work", "persistentVolumeClaim": {"claimName": self.claim}}
        return {
            "terminationGracePeriodSeconds": plan.config.grace_s + NOTICE_S,
            "automountServiceAccountToken": False,
            # the first process of a container would not end at SIGTERM by itself
            "shareProcessNamespace": True,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": self.user,
                "runAsGroup": self.user,
                "fsGroup": self.user,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [self._container(plan, endpoint, is_host)],
            "volumes": volumes,
        }

    def _container(self, plan: Plan, endpoint: str, is_host: bool) -> dict[str, Any]:
        words = plan.command("python", endpoint=endpoint, is_host=is_host, address="POD_IP")
        end = len(words) - len(plan.words)
        ours = ["--local-addr=$(POD_IP)" if w == "--local-addr=POD_IP" else w for w in words[:end]]
        amount: dict[str, Any] = {
            "cpu": _Word(self.cpus_per_rank * plan.ranks_per_node),
            "memory": f"{self._memory(plan)}Mi",
        }
        if plan.cuda:
            amount["nvidia.com/gpu"] = _Word(plan.ranks_per_node)
        return {
            "name": CONTAINER,
            "image": self.image,
            "command": [*map(_Word, ours), *map(_unexpanded, plan.words)],
            "workingDir": self.mount,
            "env": self._env(plan),
            "resources": {"requests": amount, "limits": amount},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [
                {"name": "work", "mountPath": self.mount},
                {"name": "shm", "mountPath": "/dev/shm"},
            ],
        }

    def _env(self, plan: Plan) -> list[dict[str, Any]]:
        """Values that are written, and names whose values a Secret has."""
        found: list[dict[str, Any]] = []
        if plan.config.job is Job.train:
            address = {"fieldRef": {"fieldPath": "status.podIP"}}
            found.append({"name": "POD_IP", "valueFrom": address})
        for name, value in plan.environment.items():
            found.append({"name": name, "value": _unexpanded(value)})
        for name in plan.names:
            source = {"secretKeyRef": {"name": self.secret, "key": name}}
            found.append({"name": name, "valueFrom": source})
        return found

    def _memory(self, plan: Plan) -> int:
        """Mebibytes of a pod: shared memory counts as the container's."""
        shared = _mebibytes(self.shared_memory)
        return plan.ranks_per_node * _mebibytes(self.memory_per_rank) + shared

    def _image(self) -> Finding:
        if self.image is None:
            text = "launcher.image is missing: build docker/Dockerfile, push it and name it"
            return problem("image", text)
        if not re.fullmatch(IMAGE, self.image):
            return problem("image", f"launcher.image ({self.image!r}) is no name of an image")
        tag = self.image.rpartition("/")[2].partition(":")[2]
        if "@" not in self.image and tag in ("", "latest"):
            text = f"{self.image}: without a fixed tag a restart may run another version"
            return note("image", text)
        return ok("image", self.image)


class _Word(str):
    """A string in quotes: YAML readers differ in what they take for a number or a truth value."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Word, lambda dumper, word: dumper.represent_scalar("tag:yaml.org,2002:str", word, style='"')
)


def _unexpanded(word: str) -> _Word:
    """A word that Kubernetes, which expands $(NAME) and makes $ of $$, gives on as it is."""
    return _Word(word.replace("$", "$$"))


def _mebibytes(size: str) -> int:
    """Of a size that the checks let through; 0 for another, which is shown beside its problem."""
    found = re.fullmatch(SIZE, size)
    return int(size[:-2]) * MEBIBYTES[found[1]] if found else 0
