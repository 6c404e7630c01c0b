"""Fixtures of the trainer's tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.trainer.checkpoint_runs import SAVED, uninterrupted


@pytest.fixture(scope="session")
def saved_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Directory and results of every run in SAVED."""
    runs = {}
    for name, (world, case) in SAVED.items():
        directory = str(tmp_path_factory.mktemp("checkpoints"))
        runs[name] = directory, run_ranks(uninterrupted, world, case, directory)
    return runs
