"""A rank that computes slowly is named with its host, once, and so is its recovery."""

from __future__ import annotations

import math
import socket
import time
from typing import Any

import pytest
from torch import Tensor

from parallel import grouped
from parallel.mesh import ParallelMesh
from tests.ranks import run_ranks
from tests.trainer.relocation_runs import batch, make_engine
from trainer.slow_ranks import WINDOW, SlowRanks

HOSTS = ["n0", "n0", "n1", "n1"]


def told(row_s_NR: list[list[float]]) -> list[list[str]]:
    """What a rank hears in every step, which all ranks must hear alike."""
    mesh = ParallelMesh.build(ep=1)
    watch = SlowRanks(HOSTS, mesh)
    return [watch.step(row_s_R[mesh.rank]) for row_s_R in row_s_NR]


def run(row_s_NR: list[list[float]]) -> list[tuple[int, str]]:
    heard = run_ranks(told, 4, row_s_NR)
    assert all(other == heard[0] for other in heard)
    return [(number, line) for number, lines in enumerate(heard[0], 1) for line in lines]


def test_a_slow_rank_is_named_within_twenty_steps_and_only_once() -> None:
    lines = run([[1e-6, 1.2e-6, 1.1e-6, 2e-6]] * 40)
    assert lines == [
        (
            2 * WINDOW,
            "rank 3 on n1 is slow, and all others wait for it: a row of its experts' products "
            "takes 2 us, 1.8 times the median rank's",
        )
    ]


@pytest.mark.parametrize("start", range(WINDOW))
def test_it_takes_at_most_twenty_steps_wherever_it_begins(start: int) -> None:
    lines = run([[1e-6] * 4] * start + [[1e-6, 5e-6, 1e-6, 1e-6]] * 20)
    assert len(lines) == 1
    assert lines[0][0] - start <= 20


def test_a_slow_host_has_all_of_its_ranks_named() -> None:
    lines = run([[1e-6, 1e-6, 3e-6, 3e-6]] * 2 * WINDOW)
    assert [line.split(" is slow")[0] for _, line in lines] == ["rank 2 on n1", "rank 3 on n1"]


def test_a_rank_that_recovers_is_named_again() -> None:
    slow, well = [1e-6, 4e-6, 1e-6, 1e-6], [1e-6] * 4
    lines = run([slow] * 2 * WINDOW + [well] * 2 * WINDOW + [slow] * 2 * WINDOW)
    assert [number for number, _ in lines] == [2 * WINDOW, 3 * WINDOW, 6 * WINDOW]
    assert lines[1][1] == "rank 1 on n0 keeps up again"


def test_single_slow_steps_and_single_slow_windows_say_nothing() -> None:
    hiccup, well = [1e-6, 1e-6, 1e-3, 1e-6], [1e-6] * 4
    assert run(([hiccup] * 2 + [well] * (WINDOW - 2)) * 4) == []
    assert run(([hiccup] * WINDOW + [well] * WINDOW) * 3) == []


def test_ranks_without_rows_are_left_out() -> None:
    assert run([[math.nan, 1e-6, 1e-6, 1e-6]] * 2 * WINDOW) == []
    assert run([[math.nan] * 4] * 2 * WINDOW) == []
    lines = run([[math.nan, 1e-6, 1e-6, 5e-6], [1e-6, math.nan, 1e-6, 5e-6]] * WINDOW)
    assert [line.split(" is")[0] for _, line in lines] == ["rank 3 on n1"]


def with_slow_products(slow_rank: int) -> tuple[list[str], float]:
    """Steps of a real engine, where products take a rank longer, and waiting takes the others.

    A row takes the others long enough that it does not matter who shares a core with whom.
    """
    engine = make_engine(2)
    add: Any = grouped._Products.add

    def paced(self: Any, rows: slice, stack: Tensor, rows_S: list[int]) -> Tensor:
        time.sleep(sum(rows_S) * (8e-4 if engine.mesh.rank == slow_rank else 2e-4))
        return add(self, rows, stack, rows_S)

    pytest.MonkeyPatch().setattr(grouped._Products, "add", paced)
    watch = SlowRanks([socket.gethostname()] * 4, engine.mesh)
    lines: list[str] = []
    for number in range(2 * WINDOW):
        lines += watch.step(engine.train_step([batch(engine, number)]).row_s)
    return lines, watch.ratio


def test_a_real_step_tells_who_is_slow_and_not_who_waits() -> None:
    for lines, ratio in run_ranks(with_slow_products, 4, 2):
        assert [line.split(" is slow")[0] for line in lines] == [
            f"rank 2 on {socket.gethostname()}"
        ]
        assert ratio > 2
