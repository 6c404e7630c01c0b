"""Images and compose file: linted, and what they copy and start really works, without an engine."""

from __future__ import annotations

import configparser
import fnmatch
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.secrets import SECRET
from launch.__main__ import main
from tests.launch.jobs import BIN, ROOT

FILES = ["Dockerfile", "Dockerfile.cpu"]


def instructions(name: str) -> list[tuple[str, str]]:
    """Instruction and arguments of every line of a Dockerfile."""
    text = (ROOT / "docker" / name).read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [
        (line.partition(" ")[0], line.partition(" ")[2])
        for line in lines
        if not line.startswith("#")
    ]


def copied(name: str) -> list[str]:
    return [
        word for what, rest in instructions(name) if what == "COPY" for word in rest.split()[:-1]
    ]


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    found = subprocess.run([BIN / "hadolint", ROOT / "docker" / name], capture_output=True)
    assert found.returncode == 0, found.stdout.decode()


@pytest.mark.parametrize("name", FILES)
def test_the_image_is_pinned_layered_and_not_root(name: str) -> None:
    steps = instructions(name)
    bases = [rest for what, rest in steps if what == "FROM"]
    assert all(re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z-]+", base) for base in bases)
    users = [rest for what, rest in steps if what == "USER"]
    assert users and users[-1] == "1000:1000"
    at = {rest: number for number, (what, rest) in enumerate(steps) if what in ("COPY", "RUN")}
    torch = next(number for rest, number in at.items() if "${TORCH}" in rest)
    packages = next(number for rest, number in at.items() if "-r requirements.txt" in rest)
    sources = [
        number for rest, number in at.items() if rest in ("trainer trainer", "launch launch")
    ]
    assert torch < at["setup.cfg constraints.txt ./"] < packages < min(sources)
    last = [rest for what, rest in steps if what == "USER" or "--help > /dev/null" in rest]
    assert last[0] == "1000:1000" and "trainer.train --help" in last[-1]
    for what, rest in steps:
        assert what not in ("ENV", "ARG") or not SECRET.search(rest)
    args = dict(rest.split("=", 1) for what, rest in steps if what == "ARG")
    assert re.match(r'"torch==\d+\.\d+\.\d+(\+cpu --extra-index-url \S+)?"$', args["TORCH"])


@pytest.mark.parametrize("name", FILES)
def test_the_context_has_what_is_copied_and_nothing_else(name: str) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert rules[1] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert set(copied(name)) == allowed
    assert all((ROOT / path).exists() for path in allowed)
    assert any(fnmatch.fnmatch("**/__pycache__", rule) for rule in rules)


def test_what_is_copied_installs_and_starts(tmp_path: Path) -> None:
    """The steps of the image after its packages, in a folder of their own."""
    context, out = tmp_path / "context", tmp_path / "out"
    context.mkdir()
    for path in copied("Dockerfile"):
        if (ROOT / path).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / path, context / path, ignore=ignored)
        else:
            shutil.copy(ROOT / path, context)
    step = next(rest for what, rest in instructions("Dockerfile") if "requirements.txt" in rest)
    script = re.search(r'python -c "(.*?)" >', step)
    assert script is not None
    listed = subprocess.run(
        [sys.executable, "-c", script[1]], cwd=context, capture_output=True, text=True, check=True
    )
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert listed.stdout.split() == parser["options"]["install_requires"].split()
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=context, check=True, timeout=120)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    started = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch",
            "dry_run=true",
            "device=cpu",
            "--",
            "experiment=quickstart",
        ],
        cwd=out,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 0, started.stderr
    for package in ("launch", "trainer"):
        assert (tmp_path / "site" / package / "__init__.py").exists()
    assert (tmp_path / "site/trainer/page/page.html").exists()


def test_the_compose_file_starts_two_nodes_that_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    content: Any = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [])
    assert set(content["services"]) == {"node0", "node1"}
    commands = []
    for number, (name, service) in enumerate(sorted(content["services"].items())):
        assert name == service["hostname"]
        assert service["build"] == {"context": "..", "dockerfile": "docker/Dockerfile.cpu"}
        assert service["cap_drop"] == ["ALL"] and "privileged" not in service
        assert service["volumes"] == ["work:/workspace"]
        assert service["command"][:3] == ["python", "-m", "launch"]
        assert main(["dry_run=true", *service["command"][3:]]) == 0
        output = capfd.readouterr().out
        assert "2 x 2 = 4, on CPUs" in output
        commands.append(output.splitlines()[-1])
        assert f"is_host={int(number == 0)}" in commands[-1]
    assert all("--rdzv-endpoint=node0:29400" in command for command in commands)
    assert "node0" in json.dumps(content["services"]["node1"]["depends_on"])
