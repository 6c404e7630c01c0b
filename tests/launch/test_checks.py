"""Checks before a launch: every problem at once, layouts as the mesh makes them, no secrets."""

from __future__ import annotations

import math
import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from configs.compose import load_launch
from configs.describe import launch_help_text
from configs.launch_schema import KubernetesValues, LocalValues, SlurmValues, check_launch
from configs.schema import ClusterConfig
from launch import store
from launch.__main__ import main
from launch.layout import Layout
from launch.training import jobs_of
from parallel.mesh import ParallelMesh
from placement.topology import Topology
from tests.launch.jobs import CPU, refused, shown, tiny_job
from tests.ranks import run_ranks

QUICK = "experiment=quickstart"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def nodes_of_groups(ep: int) -> tuple[int, list[int]]:
    mesh = ParallelMesh.build(ep=ep, ranks_per_node=2)
    return mesh.edp_rank, mesh.node_of_ep_ranks()


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_groups_lie_where_the_mesh_puts_them(ep: int) -> None:
    layout = Layout(nodes=2, ranks_per_node=2, ep=ep)
    for group, nodes in run_ranks(nodes_of_groups, 4, ep):
        ranks = layout.groups()[group]
        assert layout.nodes_of(ranks) == sorted(set(nodes))
        assert [rank // 2 for rank in ranks] == nodes


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 8), (2, 4), (3, 4), (4, 6)])
def test_pairs_are_those_of_the_topology(nodes: int, per_node: int) -> None:
    topology = Topology.even(nodes, per_node, intra_gbps=9, inter_gbps=1, flops=1)
    speed_RR = topology.bytes_per_s_RR()
    for ep in [size for size in range(1, nodes * per_node + 1) if nodes * per_node % size == 0]:
        layout = Layout(nodes, per_node, ep)
        pairs = [(a, b) for group in layout.groups() for a in group for b in group if a < b]
        within = sum(speed_RR[a, b] == 9e9 / 8 for a, b in pairs)
        assert layout.pairs_within() == (within, len(pairs))
        spans = [len({topology.node_of_R[rank] for rank in group}) for group in layout.groups()]
        assert layout.most_nodes() == max(spans)


def test_a_layout_in_words() -> None:
    cluster = ClusterConfig(intra_gbps=3600, inter_gbps=400)
    assert Layout(8, 8, 16).lines("GPUs", cluster) == {
        "nodes x ranks": "8 x 8 = 64, on GPUs",
        "EP x EDP": "16 x 4",
        "EP groups": "ranks 0-15, 16-31, 32-47, 48-63",
        "pairs in groups": (
            f"{4 * 2 * math.comb(8, 2)} of {4 * math.comb(16, 2)} within nodes (3600 Gbit/s), "
            f"{4 * 64} of {4 * math.comb(16, 2)} between nodes (400 Gbit/s)"
        ),
    }
    assert (
        Layout(8, 8, 8).lines("GPUs", cluster)["EP groups"] == "ranks 0-7, 8-15, 16-23, ..., 56-63"
    )


def test_every_problem_is_shown_at_once(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen(1)
        port = busy.getsockname()[1]
        refused(
            *("ranks_per_node=3", f"rdzv_port={port}", "device=cuda", "env=[NO_SUCH_NAME]"),
            *("--", QUICK, "mesh.ep=2", "train.batch_size=31", "run.dir=file/run"),
            *("data=text", "data.sources.text.paths=[nothing/*.txt]", "stats.path=stats.npz"),
        )
    output, error = capfd.readouterr()
    for expected in (
        "mesh.ep (2) must divide the world size (3); use 1",
        "train.batch_size (31) must be",
        "run.dir (file/run): ",
        "nothing/*.txt matches no file",
        "stats.path (stats.npz) is not there",
        "must be <= the GPUs of this machine (0); lower it, or use device=cpu",
        f"rdzv_port ({port}): Address already in use",
        "env (NO_SUCH_NAME) is not set here",
        "0.0 GiB free on",
    ):
        assert expected in output, expected
    assert output.count("│ problem │") == int(error.split("found ")[1].split()[0])
    assert sorted(path.name for path in folder.iterdir()) == ["file"]


def test_force_goes_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["ranks_per_node=2", *CPU, "--", QUICK, "train.batch_size=31"]
    refused(*words)
    shown("force=true", *words)
    output = capfd.readouterr().out
    assert "train.batch_size (31)" in output and "torch.distributed.run" in output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nodes=0"], "error: nodes (0) must be >= 1"),
        (["rdzv_port=70000"], "error: rdzv_port (70000) must be >= 1, < 65536"),
        (["node=2"], "error: node: no such key; did you mean nodes?"),
        (["launcher=slrum"], "error: launcher=slrum: no such choice; did you mean slurm?"),
        (["launcher.hosts=a"], "error: launcher.hosts: no such key; did you mean launcher.host?"),
        (["launcher.node_rank=a"], "error: launcher.node_rank ('a') must be int or null"),
        (["job=sweeps"], "error: job (sweeps) must be train or upcycle or sweep"),
        (["job=sweep", "nodes=2"], "error: nodes (2): job=sweep is one process; leave it out"),
        (["launcher=slurm"], "error: ranks_per_node is missing: the GPUs of other machines"),
        ([QUICK], "(overrides of the job follow --, which is missing)"),
        (["env=[A-B]"], "error: env ('A-B') must be made of letters, digits and _"),
    ],
)
def test_values_that_are_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    refused(*words)
    shown_text = capfd.readouterr()
    assert expected in shown_text.err and shown_text.out == ""


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "my_secret", "DB_PASSWORD", "AUTH"])
def test_the_value_of_a_secret_is_never_shown(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    refused(f"env=['{name}=hush']")
    shown_text = capfd.readouterr()
    assert f"give its name alone: env=[{name}]" in shown_text.err
    assert "hush" not in shown_text.err + shown_text.out


def test_overrides_that_spell_a_secret(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(*CPU, "force=true", "--", QUICK, "+logger.mine.api_key=hush")
    shown_text = capfd.readouterr()
    assert "write '+logger.mine.api_key=${oc.env:NAME}'" in shown_text.err
    assert "hush" not in shown_text.err + shown_text.out
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["launcher.node_rank=0"], "launcher.host is missing: 2 nodes meet on the first"),
        (
            ["launcher.host=n0", "launcher.node_rank=2"],
            "launcher.node_rank (2) must be >= 0 and < nodes (2)",
        ),
        (["launcher.host=no.such.host.invalid", "launcher.node_rank=1"], "give its address"),
    ],
)
def test_nodes_that_cannot_meet(
    folder: Path, capfd: pytest.CaptureFixture[str], values: list[str], expected: str
) -> None:
    refused("nodes=2", "ranks_per_node=1", *CPU, *values, "--", QUICK)
    assert expected in capfd.readouterr().out


def test_every_number_of_ranks_is_checked(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["nodes=3", "min_nodes=1", "ranks_per_node=2", "launcher.host=n0", *CPU]
    refused(*words, "--", *tiny_job(folder))
    output = capfd.readouterr().out
    assert "on 6 ranks: train.batch_size (8) must be a multiple of" in output
    assert "on 4 ranks" not in output and "on 2 ranks" not in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["min_nodes=3", "nodes=2"], "min_nodes (3) must be <= nodes (2)"),
        (["min_nodes=0"], "min_nodes (0) must be >= 1"),
        (["min_nodes=1", "job=sweep"], "min_nodes (1): job=sweep is one process; leave it out"),
        (
            ["min_nodes=1", "nodes=2", "ranks_per_node=2", "launcher=slurm"],
            "min_nodes (1): this launcher starts jobs of all nodes alone; leave it out",
        ),
    ],
)
def test_fewer_nodes_that_cannot_be(
    folder: Path, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    refused(*words, "--", *tiny_job(folder))
    found = capfd.readouterr()
    assert said in found.out + found.err


def test_all_jobs_of_a_sweep_are_checked(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["ranks_per_node=2", *CPU, "--", "-m", QUICK]
    shown(*words, "balance=auto,none", "seed=0,1")
    assert "4 jobs compose and fit 2 ranks" in capfd.readouterr().out
    refused(*words, "train.batch_size=32,31")
    assert "train.batch_size (31) must be" in capfd.readouterr().out
    refused(*words, "--cfg")
    assert "--cfg: of the job's flags only -m can be launched" in capfd.readouterr().out
    assert jobs_of(["-m", "a=1,2", "b=3"]) == [["a=1", "b=3"], ["a=2", "b=3"]]


def test_ranks_are_the_ones_that_will_be(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The configuration is composed as on a rank of the job: its batches are divided by ranks."""
    shown("launcher=slurm", "nodes=2", "ranks_per_node=8", "--", QUICK, "cluster=h100_2x8")
    output = capfd.readouterr().out
    assert "2 x 8 = 16, on GPUs" in output and "composes and fits 16 ranks" in output
    assert "8 x 2" in output and "groups of 8 stay within a node" in output
    assert "WORLD_SIZE" not in os.environ
    refused("launcher=slurm", "nodes=3", "ranks_per_node=8", "--", QUICK)


def test_models_that_are_not_here(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tiny_job(folder)
    files = next(word for word in text if word.startswith("data.sources"))
    words = ["model=hf", "data=text", files, "train.steps=2", "train.batch_size=2"]
    words += ["train.micro_batch_size=1", "train.seq_len=8"]
    shown("ranks_per_node=2", *CPU, "--", *words, "model.source=some/model")
    output = capfd.readouterr().out
    assert "model.source (some/model) is no folder here: the job fetches it from the hub" in output
    assert "not known before the model is read" in output
    refused("ranks_per_node=2", *CPU, "--", *words, "model.source=/no/such/model")
    assert "model.source (/no/such/model) is not there" in capfd.readouterr().out
    refused("ranks_per_node=2", *CPU, "--", QUICK, "model.family=llama")
    assert "llama has no such field" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["job=sweep", "--", "-m", "placement=contiguous,random"], "2 cells compose"),
        (["job=upcycle", "--", "source=a/b", "target_dir=moe"], "the job fetches it from the hub"),
        (
            ["job=upcycle", "launcher=slurm", "--", "source=a/b", "target_dir=moe"],
            "#SBATCH --nodes=1",
        ),
    ],
)
def test_jobs_of_one_process(
    folder: Path, capfd: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    shown(*words)
    output = capfd.readouterr().out
    assert expected in output
    assert "torch.distributed.run" not in output and "OMP_NUM_THREADS" not in output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["job=sweep", "--", "planer=home"], "planer: no such key; did you mean planner?"),
        (["job=upcycle", "--", "target_dir=moe"], "missing values: source"),
        (["job=upcycle", "--", "source=./none", "target_dir=moe"], "source (./none) is no folder"),
        (["job=upcycle", "--", "verify"], "verify takes one folder"),
    ],
)
def test_jobs_of_one_process_that_are_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    refused(*words)
    assert expected in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "values"),
    [("local", LocalValues), ("slurm", SlurmValues), ("kubernetes", KubernetesValues)],
)
def test_files_and_classes_have_the_same_defaults(name: str, values: Any) -> None:
    config = load_launch(f"launcher={name}")
    check_launch(config)
    launcher = instantiate(config.launcher)
    assert isinstance(launcher, values)
    assert launcher == type(launcher)()


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capfd.readouterr().out
    assert output == launch_help_text() + "\n"
    for text in ("launcher.rdzv_host  (", "ranks_per_node  (int | null, >= 1", "*local", "slurm"):
        assert text in output


def test_the_store_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    assert store.main([]) == 2 and store.main(["a"]) == 2
    assert capfd.readouterr().err.count("usage: python -m launch.store PORT") == 2


def test_gpus_are_counted(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shown("--", QUICK)
    output = capfd.readouterr().out
    assert "1 x 2 = 2, on GPUs" in output and "2 of the 2 GPUs of this machine" in output
    refused("ranks_per_node=4", "--", QUICK)
    assert "ranks_per_node (4) must be <= the GPUs of this machine (2)" in capfd.readouterr().out
