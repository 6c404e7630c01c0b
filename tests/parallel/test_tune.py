"""The choice of chunks: every candidate tried, the slowest rank decides, all ranks agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel import phases
from parallel.mesh import ParallelMesh
from parallel.planners import home_plan
from parallel.tune import ChunkTuner
from tests.parallel.test_layer import make_layer, make_tokens
from tests.ranks import run_ranks


def tuned(rank_costs: list[dict[int, float]]) -> tuple[list[int], int]:
    """Chunks tried and kept on this rank, whose clock runs as its table of costs says."""
    mesh = ParallelMesh.build(ep=len(rank_costs), device_type="cpu")
    layer = make_layer(mesh, 8, torch.arange(8) * len(rank_costs) // 8, home_plan)
    dispatch, costs = layer.path.dispatcher.dispatch, rank_costs[mesh.rank]
    tried: list[int] = []
    clock = [0.0]

    def costly(*args: Any) -> Any:
        tried.append(args[-1])
        clock[0] += costs[args[-1]]
        return dispatch(*args)

    vars(layer.path.dispatcher)["dispatch"] = costly
    phases._now = lambda: clock[0]  # in this rank's own process
    tuner = ChunkTuner([layer], mesh.dp_group)
    while not tuner.done:
        with tuner.try_step():
            layer(*make_tokens(mesh.rank, 5, 8, 2, "skewed"))
    with tuner.try_step():
        layer(*make_tokens(mesh.rank, 5, 8, 2, "skewed"))
    return tried, layer.path.num_chunks


@pytest.mark.parametrize(
    ("rank_costs", "tried", "best"),
    [
        ([{1: 1, 2: 5, 4: 2}] * 3 + [{1: 3, 2: 1, 4: 2.5}], [1, 1, 2, 4, 1, 2, 4], 4),
        ([{1: 1, 2: 2, 4: 3}] * 4, [1, 1, 2, 4, 1, 2, 4], 1),
        ([{1: 2, 2: 1}] * 2, [1, 1, 2, 1, 2], 2),
    ],
)
def test_the_slowest_rank_decides(
    rank_costs: list[dict[int, float]], tried: list[int], best: int
) -> None:
    for got, kept in run_ranks(tuned, len(rank_costs), rank_costs):
        assert got == [*tried, best]
        assert kept == best
