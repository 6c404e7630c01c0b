"""What checks find, and the small checks that every launcher shares."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

WRITTEN = "# Written by python -m launch, which writes over it."


class State(Enum):
    """How bad it is."""

    ok = "ok"
    note = "note"
    problem = "problem"


@dataclass(frozen=True)
class Finding:
    """One line about one thing."""

    name: str
    state: State
    text: str


def ok(name: str, text: str) -> Finding:
    """Something that is as it should be."""
    return Finding(name, State.ok, text)


def note(name: str, text: str) -> Finding:
    """Something to know, or that cannot be known here."""
    return Finding(name, State.note, text)


def problem(name: str, text: str) -> Finding:
    """Something that stops the launch."""
    return Finding(name, State.problem, text)


def port_finding(port: int) -> Finding:
    """Whether a server can listen on a port of this machine."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(1)
        except OSError as error:
            text = f"rdzv_port ({port}): {error.strerror}; choose another or leave it out"
            return problem("port", text)
    return ok("port", f"{port} is free")


def names_findings(names: Iterable[str]) -> list[Finding]:
    """Whether the variables that the job takes from this environment are set in it."""
    missing = [name for name in names if name not in os.environ]
    return [problem("env", f"env ({name}) is not set here; export it") for name in missing]


def pattern_findings(values: dict[str, str | None], pattern: str, words: str) -> list[Finding]:
    """Values that hold characters which the file they go into gives a meaning."""
    return [
        problem("values", f"{key} ({value!r}) must be made of {words}")
        for key, value in values.items()
        if value is not None and not re.fullmatch(pattern, value)
    ]


def file_finding(key: str, file: str) -> Finding:
    """Whether a file can be written without losing another one."""
    path = Path(file)
    try:
        if path.exists() and WRITTEN not in path.read_text(encoding="utf-8").splitlines()[:2]:
            text = f"{key} ({file}) exists and is not of python -m launch; name another"
            return problem("file", text)
    except (OSError, UnicodeDecodeError):
        return problem("file", f"{key} ({file}) exists and cannot be read; name another")
    return folder_finding(key, str(path.absolute().parent))


def folder_finding(key: str, folder: str) -> Finding:
    """Whether a folder can be made, or written into."""
    parent = existing_parent(folder)
    if not parent.is_dir():
        return problem("paths", f"{key} ({folder}): {parent} is a file, not a folder; name another")
    if not os.access(parent, os.W_OK | os.X_OK):
        return problem("paths", f"{key} ({folder}): {parent} cannot be written; name another")
    return ok("paths", f"{key} ({folder}) can be written")


def existing_parent(folder: str) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return path


def write_file(file: str, text: str) -> None:
    """Write a file whole or not at all."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
