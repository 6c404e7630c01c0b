"""The two views of the ranks, and what does not fit them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from parallel.mesh import ParallelMesh
from parallel.model import parallelize
from placement.table import ExpertPlacement
from tests.families import tiny_config
from tests.ranks import run_ranks


def groups(ep: int, ranks_per_node: int) -> dict[str, Any]:
    mesh = ParallelMesh.build(ep=ep, ranks_per_node=ranks_per_node, device_type="cpu")
    return {
        "ep": dist.get_process_group_ranks(mesh.ep_group),
        "edp": dist.get_process_group_ranks(mesh.edp_group),
        "dp": dist.get_process_group_ranks(mesh.dp_group),
        "place": (mesh.ep_rank, mesh.edp_rank),
        "nodes": mesh.node_of_ep_ranks(),
    }


def test_ep_ranks_are_contiguous_and_groups_side_by_side() -> None:
    results = run_ranks(groups, 4, 2, 2)
    assert [r["ep"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["edp"] for r in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(r["dp"] == [0, 1, 2, 3] for r in results)
    assert [r["place"] for r in results] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [r["nodes"] for r in results] == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_an_ep_group_may_span_nodes() -> None:
    assert [r["nodes"] for r in run_ranks(groups, 4, 4, 2)] == [[0, 0, 1, 1]] * 4


def refusal(ep: int, ranks_per_node: int, home: list[int] | None) -> str:
    """The message of what is refused, on this rank."""
    try:
        mesh = ParallelMesh.build(ep=ep, ranks_per_node=ranks_per_node, device_type="cpu")
        model = AutoModelForCausalLM.from_config(tiny_config("mixtral", num_local_experts=6))
        placement = None
        if home is not None:
            rows = torch.tensor([home] * 2)
            if mesh.rank == 1:  # another table on one rank
                rows = rows.flip(1)
            placement = ExpertPlacement(rows, 2)
        parallelize(model, mesh, placement=placement)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("ep", "per_node", "home", "message"),
    [
        (3, 4, None, "mesh.ep (3) must divide the world size (4); use one of [1, 2, 4]"),
        (2, 3, None, "mesh.ranks_per_node (3) must divide the world size (4)"),
        (4, 4, None, "mesh.ep (4) must divide the number of experts (6)"),
        (1, 4, [0, 0, 0, 1, 1, 1], "placement is for (layers, experts, EP ranks) = (2, 6, 2)"),
        (2, 4, [0, 0, 0, 1, 1, 1], "placement: ranks [1] hold another table than rank 0"),
        (2, 4, None, ""),
    ],
)
def test_what_does_not_fit_is_refused(
    ep: int, per_node: int, home: list[int] | None, message: str
) -> None:
    for answer in run_ranks(refusal, 4, ep, per_node, home):
        assert answer.startswith(message) if message else answer == ""
