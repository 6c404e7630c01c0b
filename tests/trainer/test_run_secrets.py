"""No file of a run has a secret, and no line that it prints."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tests.trainer.test_run import ROOT, command, corpus, environment
from trainer.page.page import write_page

KEY, URL_PASSWORD = "hush-the-key", "hush-the-password"


class Keyed:
    """A logger with a key, as a user may have one; notes that it got it."""

    def __init__(self, api_key: str, endpoint: str, path: str) -> None:
        Path(path).write_text(f"{api_key == KEY} {URL_PASSWORD in endpoint}")

    def start(self, config: dict[str, Any], run_dir: Path) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self, summary: dict[str, Any]) -> None: ...


def test_no_file_of_a_run_has_a_secret(tmp_path: Path) -> None:
    """With a key from the environment and, carelessly, one in the command."""
    text, folder, got = corpus(tmp_path / "text"), tmp_path / "run", tmp_path / "got"
    overrides = [
        "train.steps=2",
        "logger=[console,wandb,tensorboard]",
        "+logger.mine._target_=tests.trainer.test_run_secrets.Keyed",
        "+logger.mine.api_key=${oc.env:MINE}",
        f"+logger.mine.endpoint=https://me:{URL_PASSWORD}@host/",
        f"+logger.mine.path={got}",
    ]
    done = subprocess.run(
        command(text, folder, 1, *overrides),
        cwd=ROOT,
        env={**environment(), "MINE": KEY},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert got.read_text() == "True True"  # what ran had them
    write_page([folder], tmp_path / "page.html")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "page.html", "complete.json"} <= names
    assert any(name.startswith("events.out") for name in names)
    assert any(name.endswith(".wandb") for name in names)
    assert "***" in (folder / "config.yaml").read_text()
    for content in [done.stdout.encode(), done.stderr.encode(), *(p.read_bytes() for p in files)]:
        assert KEY.encode() not in content and URL_PASSWORD.encode() not in content
