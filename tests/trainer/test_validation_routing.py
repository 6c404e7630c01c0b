"""Balance and change of routing on validation tokens, against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.mesh import ParallelMesh
from tests.ranks import run_ranks
from trainer.routing import ValidationRouting

EXPERTS, LAYERS = 5, 2


def routings() -> list[list[list[tuple[int, Tensor]]]]:
    """Of two validations, two ranks, two forwards and two layers; some choices are no expert."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        ranks = []
        for rank in range(2):
            forwards = []
            for _ in range(2):
                for layer in range(LAYERS):
                    tokens = 7 + rank
                    ids_TK = torch.rand(tokens, EXPERTS + 1, generator=generator).argsort(1)[:, :2]
                    forwards.append((layer, ids_TK.to(torch.int32)))
            ranks.append(forwards)
        made.append(ranks)
    return made


def measured() -> list[dict[str, float]]:
    mesh, routing = ParallelMesh.build(ep=2, device_type="cpu"), ValidationRouting()
    return [routing.measure(ranks[mesh.rank], EXPERTS, mesh) for ranks in routings()]


def test_against_loops() -> None:
    want, before = [], None
    for ranks in routings():
        counts = [[0] * EXPERTS for _ in range(LAYERS)]
        choices = []
        pairs = [[0] * EXPERTS for _ in range(EXPERTS)]
        for forwards in ranks:
            for (_, first), (_, second) in zip(forwards[::2], forwards[1::2], strict=True):
                for a, b in zip(first.tolist(), second.tolist(), strict=True):
                    for i in set(a) - {EXPERTS}:
                        for j in set(b) - {EXPERTS}:
                            pairs[i][j] += 1
            for layer, ids_TK in forwards:
                for row in ids_TK.tolist():
                    choices.append(row)
                    for expert in row:
                        if expert < EXPERTS:
                            counts[layer][expert] += 1
        ratios = [max(row) / (sum(row) / EXPERTS) - 1 for row in counts]
        found = {
            "validation/max_violation": sum(ratios) / LAYERS,
            "validation/dead_experts": float(sum(row.count(0) for row in counts)),
            "validation/rows": float(sum(map(sum, counts))),
            "validation/affinity": sum(map(max, pairs)) / sum(map(sum, pairs)),
        }
        if before is not None:
            here = [set(row) - {EXPERTS} for row in choices]
            kept = [len(a & set(b)) for a, b in zip(here, before, strict=True)]
            found["validation/routing_change"] = 1 - sum(kept) / sum(map(len, here))
        before = choices
        want.append(found)
    for got in run_ranks(measured, 2):
        for one, wanted in zip(got, want, strict=True):
            assert one == pytest.approx(wanted, rel=1e-6)
