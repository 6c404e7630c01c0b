"""Chunks, two levels, borrowed weights that are dropped: the same numbers in every combination."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.planners import home_plan
from tests.parallel.test_layer import TOKENS, RandomPlanner, check_case, placement_row

OPTIONS: dict[str, dict[str, Any]] = {
    "2 chunks": {"num_chunks": 2},
    "5 chunks": {"num_chunks": 5},
    "refetch": {"refetch": True},
    "nodes": {"ranks_per_node": 2},
    "nodes of uneven groups": {"ranks_per_node": 3},
    "two levels": {"ranks_per_node": 2, "two_level": True},
    "two levels, one rank per node": {"ranks_per_node": 1, "two_level": True},
    "two levels, 3 chunks": {"ranks_per_node": 2, "two_level": True, "num_chunks": 3},
    "all": {"ranks_per_node": 2, "two_level": True, "num_chunks": 4, "refetch": True},
}


def case(world: int, ep: int, planner: Any, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "ep": ep,
        "num_experts": 8,
        "top_k": 3,
        "home_E": placement_row("shuffled", 8, ep),
        "planner": planner,
        "tokens": TOKENS[world],
        "hot": "skewed",
        "options": options,
        **more,
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("planner", [home_plan, RandomPlanner(3)])
@pytest.mark.parametrize(("world", "ep"), [(4, 4), (8, 8), (8, 4), (2, 1)])
def test_layer_equals_oracle(world: int, ep: int, planner: Any, options: dict[str, Any]) -> None:
    check_case(case(world, ep, planner, options))
