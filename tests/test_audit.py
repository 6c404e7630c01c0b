"""The audit of packages, against a service on this machine that answers as osv.dev does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tools.audit import audit, read_exceptions, read_pins

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"numpy": "2.0.0", "torch": "2.13.0+cpu", "rich": "15.0.0"}
PINS = {"numpy": "2.0.0", "torch": "2.13.0+cpu", "rich": "15.0.0"}
NOBODY = "http://127.0.0.1:9/v1/querybatch"


@contextmanager
def service(known: dict[tuple[str, str], list[str]], answer: bytes | None = None) -> Iterator[str]:
    """Knows vulnerabilities by (package, version); or always gives the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
            results: list[dict[str, Any]] = []
            for query in queries:
                assert query["package"]["ecosystem"] == "PyPI"
                ids = known.get((query["package"]["name"], query["version"]), [])
                results.append({"vulns": [{"id": one} for one in ids]} if ids else {})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer or json.dumps({"results": results}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/querybatch"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def table(folder: Path, *rows: str) -> Path:
    path = folder / "safety.md"
    path.write_text("\n".join(["| id | package | reason | until |", "|---|---|---|---|", *rows]))
    return path


def test_vulnerabilities_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    known = {
        ("numpy", "2.0.0"): ["GHSA-1", "PYSEC-2"],
        ("torch", "2.13.0"): ["GHSA-3"],  # of every build of it
        ("rich", "14.0.0"): ["GHSA-4"],
    }
    with service(known) as url:
        wrong = audit(PACKAGES, PINS, [], url)
    found = [line.partition(": https")[0] for line in wrong]
    assert found == [
        "numpy 2.0.0 has the vulnerability GHSA-1",
        "numpy 2.0.0 has the vulnerability PYSEC-2",
        "torch 2.13.0+cpu has the vulnerability GHSA-3",
    ]
    assert "advisories consulted for 3 packages" in capsys.readouterr().out


def test_exceptions_are_listed_end_and_go_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_exceptions(
        table(
            tmp_path,
            "| `GHSA-1` | `numpy` | never calls it | 2999-12-31 |",
            "| `GHSA-2` | `torch` | had no fix | 2020-01-31 |",
            "| `GHSA-1` | `torch` | of another package | always |",
        )
    )
    with service({("numpy", "2.0.0"): ["GHSA-1"], ("torch", "2.13.0"): ["GHSA-2"]}) as url:
        wrong = audit(PACKAGES, PINS, rows, url)
    assert len(wrong) == 1 and wrong[0].endswith("GHSA-2; its exception ended on 2020-01-31")
    out = capsys.readouterr().out
    assert "excepted: numpy 2.0.0 has the vulnerability GHSA-1" in out and "(never calls it)" in out
    assert "exception of no use, remove it: GHSA-1 of torch" in out


@pytest.mark.parametrize("answer", [None, b"<html>", b'{"results": []}', b"[]"])
def test_without_an_answer_that_is_said(
    answer: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_exceptions(table(tmp_path, "| `GHSA-1` | `numpy` | never calls it | always |"))
    if answer is None:
        assert audit(PACKAGES, PINS, rows, NOBODY) == []
    else:
        with service({}, answer) as url:
            assert audit(PACKAGES, PINS, rows, url) == []
    out = capsys.readouterr().out
    assert "advisories not consulted: " in out
    assert "advisories consulted" not in out and "of no use" not in out


def test_packages_that_drift_are_named(tmp_path: Path) -> None:
    rows = read_exceptions(table(tmp_path, "| `not pinned` | `nvidia-*` | come along | always |"))
    packages = {"nvidia-nccl": "2.1", "numpy": "2.0.1", "sneaked": "1.0"}
    assert audit(packages, PINS, rows, NOBODY) == [
        "numpy 2.0.1 is installed, constraints.txt has 2.0.0",
        "sneaked 1.0 is installed and not pinned in constraints.txt",
    ]


def test_pins_are_those_of_this_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text(
        '# a comment\nA_b.c==1.0 ; python_version >= "3.0"\na-b-c==0.9 ; python_version < "3.0"\n'
    )
    assert read_pins(path) == {"a-b-c": "1.0"}


def test_dates_that_are_none(tmp_path: Path) -> None:
    path = table(tmp_path, "| `GHSA-1` | `numpy` | never calls it | soon |")
    with pytest.raises(ValueError, match=r"until \(soon\) must be YYYY-MM-DD or always"):
        read_exceptions(path)


def test_this_environment(tmp_path: Path) -> None:
    """As CI runs it; then with a vulnerability in a package that is here."""
    command = [sys.executable, str(ROOT / "tools/audit.py"), "--service"]
    done = subprocess.run([*command, NOBODY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pins = read_pins(ROOT / "constraints.txt")
    with service({("pyyaml", pins["pyyaml"]): ["GHSA-5"]}) as url:
        done = subprocess.run([*command, url], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: pyyaml {pins['pyyaml']} has the vulnerability GHSA-5")
