"""The command `python -m trainer.report RUN [--compare OTHER]`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from trainer.page.page import write_page

EXIT_REFUSED = 2
FULL_ERROR = "HYDRA_FULL_ERROR"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of a run; returns the exit code: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report",
        description="Write one HTML page about a training run, for any browser, without network.",
    )
    parser.add_argument("run", type=Path, help="folder of the run (run.dir)")
    parser.add_argument("--compare", type=Path, help="folder of another run, shown beside it")
    parser.add_argument("--output", type=Path, help="file to write; default: in the run's folder")
    given = parser.parse_args(arguments)
    run_dirs = [given.run] if given.compare is None else [given.run, given.compare]
    path = given.output or given.run / _name(given.compare)
    try:
        write_page(run_dirs, path)
    except (ValueError, OSError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(f"report: {path.resolve().as_uri()}")
    return 0


def _name(other: Path | None) -> str:
    return "report.html" if other is None else f"compare-{other.resolve().name}.html"
