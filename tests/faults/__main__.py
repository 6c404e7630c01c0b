"""Every fault on emulated hosts, one after the other, as a table: `python -m tests.faults`.

Names of faults as arguments: only these. Needs root on Linux.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.faults.cluster import Cluster, missing
from tests.faults.scenarios import ALL, Outcome, Suite


def main() -> int:
    """Returns the exit code."""
    names = sys.argv[1:] or list(ALL)
    unknown = sorted({*names} - {*ALL})
    reason = f"unknown: {', '.join(unknown)}; there are {', '.join(ALL)}" if unknown else missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    failed = 0
    print("| fault | what is said | said after | next step after | steps taken again |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), 3) as cluster:
        suite = Suite(Path(folder), cluster)
        for name in names:
            try:
                print(line(ALL[name](suite)), flush=True)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"{name} FAILED: {error}", flush=True)
    return int(failed > 0)


def line(outcome: Outcome) -> str:
    seconds = [
        "" if value is None else f"{value:.1f} s"
        for value in (outcome.detected_s, outcome.recovered_s)
    ]
    return " | ".join(["| " + outcome.fault, outcome.seen, *seconds, f"{outcome.steps_lost} |"])


if __name__ == "__main__":
    sys.exit(main())
