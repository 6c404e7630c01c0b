"""Every fault on emulated hosts, one after the other, as a table: `python -m tests.faults`.

Names of scenarios as arguments: only these. Needs root on Linux.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.faults.cluster import missing
from tests.faults.scenarios import ALL, Outcome, Suite


def main() -> int:
    """Returns the exit code."""
    reason = missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    failed = 0
    print("| fault | what is said | said after | next step after | steps taken again |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, Suite(Path(folder)) as suite:
        for scenario in ALL:
            if sys.argv[1:] and name_of(scenario) not in sys.argv[1:]:
                continue
            try:
                print(line(scenario(suite)), flush=True)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"{name_of(scenario)} FAILED: {error}", flush=True)
    return int(failed > 0)


def name_of(scenario: object) -> str:
    if isinstance(scenario, partial):
        return str(next(iter(scenario.keywords.values())))
    return getattr(scenario, "__name__", "")


def line(outcome: Outcome) -> str:
    seconds = [
        "" if value is None else f"{value:.1f} s"
        for value in (outcome.detected_s, outcome.recovered_s)
    ]
    return " | ".join(["| " + outcome.fault, outcome.seen, *seconds, f"{outcome.steps_lost} |"])


if __name__ == "__main__":
    sys.exit(main())
