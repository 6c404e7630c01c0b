"""What the tests of launchers share: a tiny job, hostile words, launching as a user does."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.utils import macros

from launch.__main__ import main
from launch.findings import WRITTEN
from tests.trainer.test_run import TINY, corpus, ranks_of

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CPU = ["device=cpu"]
HOSTILE = (  # nobody's overrides, but every one must arrive as it is
    "run.name=a; rm -rf ~",
    "x=$(touch broken)",
    "x=`touch broken`",
    "x=${HOME}$HOME$(HOME)$$(HOME)$$$${local_rank}${run.name}",
    "x='single' \"double\" \\back\\\\",
    "x=two\nlines\n#SBATCH --exclusive\nEOF",
    "--leading=dash",
    "-rf",
    "--",
    "",
    " x = *?[a-z]~ ",
    "x={a,b}!!&&||>out",
    "x=%j %x #comment: - yes",
    "x=\t\x07é漢字",
    "yes",
    "1e3",
    "HOST:PORT",
    "--rdzv-endpoint=HOST:PORT",
    "--rdzv-id=ID",
    "--local-addr=POD_IP",
)
DUMP = """\
#!/usr/bin/env python3
import json, os, sys
node = os.environ.get("SLURM_NODEID", "0")
seen = {"words": sys.argv[1:], "environment": dict(os.environ)}
open(os.path.join(os.path.dirname(sys.argv[0]), f"seen{node}.json"), "w").write(json.dumps(seen))
"""


def script(path: Path, text: str) -> Path:
    """An executable file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def free_port(first: int, last: int) -> int:
    """A port in [first, last) that nobody listens on."""
    for port in random.sample(range(first, last), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def through_torchrun(words: Sequence[str]) -> list[str]:
    """What a rank gets of the words that its torchrun got."""
    return macros.substitute(list(words), "0")


def tiny_job(folder: Path, *overrides: str) -> list[str]:
    """Overrides of a job of a few steps on text in the folder; results go to its folder `run`."""
    text = folder / "text"
    if not text.exists():
        corpus(text)
    files = f"data.sources.text.paths={text}/*.txt"
    return [*TINY, files, f"run.dir={folder}/run", "checkpoint.export=false", *overrides]


def environment(**more: str) -> dict[str, str]:
    """Of a user's shell, with this checkout's packages."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400", **more}


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`python -m launch WORDS`, in a folder."""
    return run([sys.executable, "-m", "launch", *words], folder, environment())


def run(command: Sequence[str], folder: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    """A command whose output is kept; `ended` waits for it."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(*processes: subprocess.Popen[str]) -> list[str]:
    """The outputs of processes that end; one that does not is killed with its ranks."""
    try:
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                for pid in [*ranks_of(process), process.pid]:
                    os.kill(pid, signal.SIGKILL)
                process.communicate()


def refused(*words: str) -> None:
    """A launch in this process that is refused."""
    assert main(words) == 2


def shown(*words: str) -> None:
    """A launch in this process that only shows."""
    assert main(["dry_run=true", *words]) == 0


def written(path: Path) -> str:
    """The content of a file that a launcher wrote."""
    text = path.read_text(encoding="utf-8")
    assert WRITTEN in text.splitlines()[:2]
    return text
