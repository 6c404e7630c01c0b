"""Audit the installed packages: `make audit`, and a part of .ci/run.

- They fit each other (`pip check`).
- Every one is pinned in constraints.txt, at its version.
- None has a known vulnerability. One request to osv.dev asks for all; without an answer that is
  said, and is no failure.

Exceptions are the table of docs/safety.md: an id of an advisory, or a package that is not pinned.
Exit code: 0, or 1 with a line for everything that is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SERVICE = "https://api.osv.dev/v1/querybatch"
TIMEOUT_S = 3.0
NOT_PINNED = "not pinned"
ROW = re.compile(
    r"\| `(?P<id>[^`]+)` \| `(?P<package>[^`]+)` \| (?P<reason>.+?) \| (?P<until>.+?) \|"
)


@dataclass(frozen=True)
class Excepted:
    """A row of the table: an advisory's id or `not pinned`, packages (`nvidia-*`), why, until."""

    id: str
    package: str
    reason: str
    until: datetime.date | None


def read_exceptions(path: Path) -> list[Excepted]:
    """The rows of the table.

    Raises:
        ValueError: for a date that is none.
    """
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = ROW.fullmatch(line.strip())
        if row is None:
            continue
        try:
            always = row["until"] == "always"
            until = None if always else datetime.date.fromisoformat(row["until"])
        except ValueError as error:
            raise ValueError(
                f"{path}: until ({row['until']}) must be YYYY-MM-DD or always"
            ) from error
        found.append(Excepted(row["id"], row["package"], row["reason"], until))
    return found


def read_pins(path: Path) -> dict[str, str]:
    """Versions by package, of the lines that hold for this interpreter."""
    pins: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate():
                pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    return pins


def installed() -> dict[str, str]:
    """Versions of the packages of this environment."""
    return {str(canonicalize_name(one.metadata["Name"])): one.version for one in distributions()}


def unpinned(packages: Mapping[str, str], pins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Packages that are not what constraints.txt says, and a line about each."""
    for name, version in sorted(packages.items()):
        if name not in pins:
            yield name, f"{name} {version} is installed and not pinned in constraints.txt"
        elif version != pins[name]:
            yield name, f"{name} {version} is installed, constraints.txt has {pins[name]}"


def advisories(packages: Mapping[str, str], service: str) -> list[tuple[str, str]]:
    """Package and advisory id of every known vulnerability, in the form of osv.dev.

    Raises:
        OSError: if the service does not answer.
        ValueError: for an answer that cannot be read.
    """
    names = sorted(packages)
    queries = [
        {
            "package": {"name": name, "ecosystem": "PyPI"},
            "version": packages[name].partition("+")[0],  # 2.13.0+cpu is a build of 2.13.0
        }
        for name in names
    ]
    request = urllib.request.Request(
        service, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        results = json.load(answer)["results"]
    if len(results) != len(names):
        raise ValueError(f"{len(results)} results for {len(names)} packages")
    return [
        (name, vulnerability["id"])
        for name, result in zip(names, results, strict=True)
        for vulnerability in result.get("vulns", [])
    ]


def audit(
    packages: Mapping[str, str], pins: Mapping[str, str], table: list[Excepted], service: str
) -> list[str]:
    """What is wrong, one line each; prints the rest."""
    found = [(NOT_PINNED, name, line) for name, line in unpinned(packages, pins)]
    consulted = True
    try:
        for name, advisory in advisories(packages, service):
            line = f"{name} {packages[name]} has the vulnerability {advisory}"
            found.append((advisory, name, f"{line}: https://osv.dev/vulnerability/{advisory}"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        consulted = False
        print(f"advisories not consulted: {error}")
    wrong: list[str] = []
    used: set[Excepted] = set()
    for kind, name, line in found:
        rows = (row for row in table if row.id == kind and fnmatch(name, row.package))
        row = next(rows, None)
        if row is None:
            wrong.append(line)
            continue
        used.add(row)
        if row.until is not None and row.until < datetime.date.today():
            wrong.append(f"{line}; its exception ended on {row.until}")
        else:
            print(f"excepted: {line} ({row.reason})")
    for row in table:
        if consulted and row not in used and row.id != NOT_PINNED:
            print(f"exception of no use, remove it: {row.id} of {row.package}")
    if consulted:
        print(f"advisories consulted for {len(packages)} packages")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Audit the installed packages.")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--exceptions", type=Path, default=ROOT / "docs/safety.md")
    parser.add_argument("--service", default=SERVICE, help="answers as osv.dev does")
    options = parser.parse_args()
    check = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"],
        capture_output=True,
        text=True,
    )
    wrong = check.stdout.splitlines() if check.returncode else []
    pins, table = read_pins(options.constraints), read_exceptions(options.exceptions)
    wrong += audit(installed(), pins, table, options.service)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
