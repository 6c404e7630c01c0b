"""Every command of docs/launch.md passes its checks."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, shown

PREFIX = "python -m launch "
TEXT = (ROOT / "docs/launch.md").read_text().replace("\\\n", " ")
LINES = [line.strip() for line in TEXT.splitlines() if line.startswith(f"    {PREFIX}")]


@pytest.mark.parametrize("line", LINES)
def test_the_command_passes_its_checks(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown(*shlex.split(line.removeprefix(PREFIX)))
    assert list(tmp_path.iterdir()) == []


def test_there_are_commands_for_every_launcher() -> None:
    assert len(LINES) >= 6
    assert {"launcher=slurm", "launcher=kubernetes"} <= {w for line in LINES for w in line.split()}
