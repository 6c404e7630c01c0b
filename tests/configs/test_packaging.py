"""Packages, pins and the set-up script."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDERS = ("configs", "launch", "parallel", "placement", "trainer")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[Requirement]:
    lines = [line.strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_package_is_listed() -> None:
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setup_cfg()["options"]["packages"].split()) == found


def test_every_requirement_is_pinned_once_for_every_python() -> None:
    pins = requirements((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    parser = setup_cfg()
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    needed = {requirement.name for text in texts for requirement in requirements(text)}
    for python in PYTHONS:
        active = [
            pin.name
            for pin in pins
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        ]
        assert len(active) == len(set(active)), f"two pins of one package on {python}"
        assert needed - {name.replace("-", "_") for name in active} - {*active} == {"torch"}
    assert all(str(pin.specifier).startswith("==") for pin in pins)


def test_pins_satisfy_the_requirements() -> None:
    pins = requirements((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    parser = setup_cfg()
    for requirement in requirements(parser["options"]["install_requires"]):
        for pin in pins:
            if pin.name.replace("-", "_") == requirement.name.replace("-", "_"):
                assert requirement.specifier.contains(str(pin.specifier)[2:]), requirement.name


def set_up(folder: Path, python3: str | None, **environment: str) -> tuple[int, str]:
    """Run the script in an empty copy of the project where `python3` is this shell script."""
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools/setup_env.sh", folder / "tools")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    commands = folder / "bin"
    commands.mkdir()
    for name in ("cat", "cksum", "dirname", "git", "grep", "rm"):
        (commands / name).symlink_to(shutil.which(name) or "/usr/bin/true")
    if python3 is not None:
        (commands / "python3").write_text(f"#!/bin/sh\n{python3}\n")
        (commands / "python3").chmod(0o755)
    result = subprocess.run(
        ["/bin/sh", folder / "tools/setup_env.sh", "run"],
        env={"PATH": str(commands), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("python3", "expected"),
    [
        (None, "python3 is missing"),
        ("echo 3.9", "python3 is Python 3.9"),
        ("echo 3.14", "python3 is Python 3.14"),
        (
            'case "$2" in *ensurepip*) exit 1;; esac; echo 3.12',
            "python3 (3.12) has no venv module: install it (on Debian and Ubuntu: apt install "
            "python3.12-venv)",
        ),
    ],
)
def test_set_up_says_what_is_missing(tmp_path: Path, python3: str | None, expected: str) -> None:
    code, said = set_up(tmp_path, python3)
    assert code == 1
    assert expected in said and "needed: Python 3.10, 3.11, 3.12 or 3.13" in said
    assert not (tmp_path / ".venv").exists()


def test_set_up_names_the_interpreter_that_was_asked_for(tmp_path: Path) -> None:
    code, said = set_up(tmp_path, "echo 3.12", PYTHON="/nowhere/python")
    assert code == 1 and "/nowhere/python is missing" in said


FAKE_VENV = r"""
case "$1" in
    -m) # makes an environment whose python writes down what it was asked to install
        mkdir -p .venv/bin
        cat >.venv/bin/python <<'END'
#!/bin/sh
case "$*" in
    *freeze*) echo torch==2.13.0+cpu ;;
    *install*) echo "$*" >>asked ;;
    *) echo 3.12 ;;
esac
END
        chmod +x .venv/bin/python ;;
    *) echo 3.12 ;;
esac
"""


def test_set_up_installs_torch_first_and_keeps_it(tmp_path: Path) -> None:
    path = os.defpath + ":/bin:/usr/bin"
    script = f"PATH={path}\n{FAKE_VENV}"
    code, said = set_up(tmp_path, script, TORCH="torch==2.13.0 --index-url somewhere")
    assert code == 0, said
    first, second = (tmp_path / "asked").read_text().splitlines()
    assert first.endswith("install --quiet torch==2.13.0 --index-url somewhere")
    assert second.endswith("-c constraints.txt -c .venv/torch.txt --editable .")
    assert (tmp_path / ".venv/torch.txt").read_text() == "torch==2.13.0+cpu\n"


def test_set_up_runs_once_until_the_pins_change(tmp_path: Path) -> None:
    code, said = set_up(tmp_path, f"PATH={os.defpath}:/bin:/usr/bin\n{FAKE_VENV}")
    assert code == 0, said

    def again() -> int:
        subprocess.run(
            ["/bin/sh", tmp_path / "tools/setup_env.sh", "run"],
            env={"PATH": str(tmp_path / "bin")},
            capture_output=True,
            check=True,
            timeout=60,
        )
        return len((tmp_path / "asked").read_text().splitlines())

    assert again() == 2
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n")
    assert again() == 4
