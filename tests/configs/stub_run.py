"""The entry with a stub for the run: `torchrun ... -m tests.configs.stub_run OVERRIDES`.

Every rank writes what it was given to `run.dir`; the run name "wrong" fails on all ranks and
"lonely" on rank 1 only.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path

from configs.schema import Config
from trainer import train


def run(config: Config) -> None:
    rank = os.environ.get("RANK", "0")
    if config.run.name == "wrong" or (config.run.name == "lonely" and rank == "1"):
        raise ValueError(f"data.sources: nothing to read on {config.run.name}")
    if config.run.name == "lonely":
        time.sleep(60)  # in a collective, say
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    (Path(config.run.dir) / f"rank{rank}.json").write_text(json.dumps(config.resolved))


def install() -> None:
    """Put the stub in the place of trainer.run."""
    stub = types.ModuleType("trainer.run")
    stub.run = run  # type: ignore[attr-defined]
    sys.modules["trainer.run"] = stub


if __name__ == "__main__":
    install()
    train.main()
