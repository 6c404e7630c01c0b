"""launcher=kubernetes: manifests against schemas, words through Kubernetes' expansion, pods run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from configs.launch_schema import Job, LaunchConfig
from launch.__main__ import main
from launch.kubernetes import Kubernetes
from launch.plan import Plan
from tests.launch.jobs import (
    CPU,
    HOSTILE,
    ended,
    environment,
    free_port,
    refused,
    run,
    shown,
    through_torchrun,
    tiny_job,
    written,
)
from tests.trainer.test_run import metrics

KINDS = ["jobset", "pytorchjob"]
# Outer fields and their types. api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset:
JOBSET = {
    "spec": {
        "replicatedJobs": list,
        "network": {
            "enableDNSHostnames": bool,
            "subdomain": str,
            "publishNotReadyAddresses": bool,
        },
        "successPolicy": {"operator": str, "targetReplicatedJobs": list},
        "failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": list},
        "suspend": bool,
        "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
        "managedBy": str,
        "ttlSecondsAfterFinished": int,
    }
}
REPLICATED_JOB = {
    "name": str,
    "groupName": str,
    "template": dict,
    "replicas": int,
    "dependsOn": list,
}
# pkg/apis/kubeflow.org/v1/{pytorch,common}_types.go of kubeflow/training-operator:
REPLICAS = {"replicas": int, "template": dict, "restartPolicy": str}
PYTORCHJOB = {
    "spec": {
        "runPolicy": {
            "cleanPodPolicy": str,
            "ttlSecondsAfterFinished": int,
            "activeDeadlineSeconds": int,
            "backoffLimit": int,
            "schedulingPolicy": dict,
        },
        "elasticPolicy": dict,
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
        "nprocPerNode": str,
    }
}


def fits(content: Any, known: Any, where: str = "") -> None:
    """Every field is known and of its type."""
    if isinstance(known, type):
        assert type(content) is known, f"{where}: {content!r}"
        return
    for name, value in content.items():
        assert name in known, f"{where}.{name}"
        fits(value, known[name], f"{where}.{name}")


def kubernetes(kind: str, **values: Any) -> Kubernetes:
    return Kubernetes(kind=kind, image="registry.example/evenkeel:0.1.0", **values)


def plan(job: Job = Job.train, nodes: int = 3, cuda: bool = True, **values: Any) -> Plan:
    config = LaunchConfig(job=job, nodes=nodes, **values)
    return Plan(config, HOSTILE, 8 if job is Job.train else 1, cuda)


def read(launcher: Kubernetes, of: Plan) -> dict[str, Any]:
    return yaml.safe_load(launcher.text(of))


def jobs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [one["template"] for one in manifest["spec"]["replicatedJobs"]]


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Specifications of the first pod and of the others."""
    if manifest["kind"] == "JobSet":
        return [job["spec"]["template"]["spec"] for job in jobs(manifest)]
    return [one["template"]["spec"] for one in manifest["spec"]["pytorchReplicaSpecs"].values()]


def expanded(word: str, variables: dict[str, str]) -> str:
    """What a container gets of a word of its command.

    As third_party/forked/golang/expansion/expand.go of kubernetes/kubernetes documents: $(NAME) of
    a known NAME is its value, of an unknown one stays; $$ is $; any other $ stays.
    """
    out, at = "", 0
    while at < len(word):
        if word[at] == "$" and word[at + 1 : at + 2] == "$":
            out, at = out + "$", at + 2
        elif word[at] == "$" and word[at + 1 : at + 2] == "(" and ")" in word[at:]:
            end = word.index(")", at)
            name = word[at + 2 : end]
            out, at = out + variables.get(name, word[at : end + 1]), end + 1
        else:
            out, at = out + word[at], at + 1
    return out


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("job", list(Job))
@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_fits_the_schemas(kind: str, job: Job, nodes: int) -> None:
    launcher = kubernetes(kind, claim="results", secret="keys", namespace="moe")
    of = plan(job, nodes if job is Job.train else 1, env=["MY_KEY", "NCCL_DEBUG=INFO"])
    manifest = read(launcher, of)
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    inner = {"spec": manifest["spec"]}
    if kind == "jobset":
        assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        fits(inner, JOBSET)
        for one in manifest["spec"]["replicatedJobs"]:
            fits(one, REPLICATED_JOB)
        wholes = [{"apiVersion": "batch/v1", "kind": "Job", **one} for one in jobs(manifest)]
    else:
        assert manifest["apiVersion"] == "kubeflow.org/v1"
        fits(inner, PYTORCHJOB)
        wholes = [{"apiVersion": "v1", "kind": "Pod", "spec": pod} for pod in pods(manifest)]
        names = {container["name"] for pod in pods(manifest) for container in pod["containers"]}
        assert names == {"pytorch"}  # the operator refuses others
    for whole in wholes:
        metadata = {"name": "x", **manifest["metadata"]}
        kubernetes_validate.validate({**whole, "metadata": metadata}, "1.32", strict=True)
    assert len(pods(manifest)) == (2 if job is Job.train and nodes > 1 else 1)


def test_the_strict_check_is_strict() -> None:
    manifest = read(kubernetes("jobset"), plan())
    (job, _) = jobs(manifest)
    job["spec"]["template"]["spec"]["container"] = []
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, "1.32", strict=True)
    with pytest.raises(AssertionError, match=r"spec\.failurePolicy\.maxRestart"):
        fits({"spec": {"failurePolicy": {"maxRestart": 3}}}, JOBSET)


@pytest.mark.parametrize("job", list(Job))
@pytest.mark.parametrize("kind", KINDS)
def test_every_word_reaches_the_job_unchanged(kind: str, job: Job) -> None:
    of = plan(job, 3 if job is Job.train else 1, env=["NAME=$(HOME) $$ yes"])
    variables = {"HOME": "/root", "POD_IP": "10.0.0.7"}
    for pod in pods(read(kubernetes(kind), of)):
        (container,) = pod["containers"]
        words = [expanded(word, variables) for word in container["command"]]
        arrived = words[-len(HOSTILE) :]
        assert (through_torchrun(arrived) if job is Job.train else arrived) == list(HOSTILE)
        assert ("--local-addr=10.0.0.7" in words) == (job is Job.train)
        values = {one["name"]: expanded(one["value"], variables) for one in container["env"][1:]}
        assert values["NAME"] == "$(HOME) $$ yes" if job is Job.train else True


def test_words_are_strings_for_every_reader_of_yaml() -> None:
    """YAML 1.1 and 1.2 differ in bare words such as yes and 1e3; in quotes nothing is guessed."""
    text = kubernetes("jobset").text(plan(env=["A=1e3", "B=no"]))
    listed = [line.strip() for line in text.splitlines() if line.strip().startswith("- ")]
    commands = [line for line in listed if not line.startswith(("- name:", "- ALL"))]
    assert len(commands) > 2 * len(HOSTILE)
    assert all(line.startswith('- "') and line.endswith('"') for line in commands)
    assert 'value: "1e3"' in text and 'value: "no"' in text


HOSTS = {"jobset": "evenkeel-first-0-0.evenkeel", "pytorchjob": "evenkeel-master-0"}


def test_both_kinds_run_the_same_commands() -> None:
    commands = {
        kind: [pod["containers"][0]["command"] for pod in pods(read(kubernetes(kind), plan()))]
        for kind in KINDS
    }
    one, two = HOSTS.values()
    for theirs, ours in zip(commands["jobset"], commands["pytorchjob"], strict=True):
        assert f"--rdzv-endpoint={one}:29400" in theirs
        assert [word.replace(one, two) for word in theirs] == ours


def test_the_pods_of_a_manifest_train(tmp_path: Path) -> None:
    """Their commands are run here, with the names that a cluster would resolve filled in."""
    port = free_port(20000, 30000)
    words = ["launcher=kubernetes", "launcher.image=evenkeel:0.1.0", "max_restarts=0", *CPU]
    words += [f"launcher.file={tmp_path}/job.yaml", "nodes=2", "ranks_per_node=1"]
    assert main([*words, f"rdzv_port={port}", "--", *tiny_job(tmp_path)]) == 0
    manifest = yaml.safe_load(written(tmp_path / "job.yaml"))
    processes = []
    for pod in reversed(pods(manifest)):
        (container,) = pod["containers"]
        command = [expanded(word, {"POD_IP": "127.0.0.1"}) for word in container["command"]]
        command = [sys.executable, *(w.replace(HOSTS["jobset"], "127.0.0.1") for w in command[1:])]
        given = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        processes.append(run(command, tmp_path, environment(**given)))
    outputs = ended(*processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert metrics(tmp_path / "run")[-1]["step"] == 6
    assert json.loads((tmp_path / "run/summary.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_pods_are_safe_and_have_what_they_need(kind: str) -> None:
    launcher = kubernetes(kind, claim="results", secret="keys", memory_per_rank="4Gi")
    for pod in pods(read(launcher, plan(env=["MY_KEY"], grace_s=60))):
        (container,) = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] > 60
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        limits = container["resources"]["limits"]
        assert limits == {"cpu": "64", "memory": f"{8 * 4096 + 8192}Mi", "nvidia.com/gpu": "8"}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes[mounts["/workspace"]]["persistentVolumeClaim"] == {"claimName": "results"}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        env = {one["name"]: one for one in container["env"]}
        assert env["MY_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "MY_KEY"}
        assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]["value"] == "1"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("launcher.image=null", "launcher.image is missing: build docker/Dockerfile"),
        ("launcher.image='a b'", "launcher.image ('a b') is no name of an image"),
        ("launcher.kind=pod", "launcher.kind (pod) must be jobset or pytorchjob"),
        ("launcher.name=My_Job", "launcher.name ('My_Job') must be made of at most 40"),
        ("launcher.claim=a/b", "launcher.claim ('a/b') must be made of lower-case"),
        ("launcher.mount=work", "launcher.mount ('work') must be made of an absolute path"),
        ("launcher.shared_memory=8GB", "launcher.shared_memory ('8GB') must be made of a number"),
        ("launcher.user=0", "launcher.user (0) must be >= 1"),
        ("env=[MY_KEY]", "env (MY_KEY) is given by name: name the Secret"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    value: str,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    words = ["launcher=kubernetes", "launcher.image=evenkeel:0.1.0", "ranks_per_node=2", value]
    refused(*words, "--", "experiment=quickstart")
    assert expected in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["launcher=kubernetes", "launcher.image=evenkeel:0.1.0", "ranks_per_node=2"]
    shown(*words, "--", "experiment=quickstart")
    assert "kind: JobSet" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []
