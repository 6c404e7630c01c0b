"""The placement table: slot order, moves, files, bad tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from placement.table import ExpertPlacement, Move


def strided() -> ExpertPlacement:
    return ExpertPlacement(torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]]), 2)


def test_contiguous_and_slot_order() -> None:
    placement = ExpertPlacement.contiguous(2, 6, 3)
    assert placement.home_LE.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert placement.experts_of(1, 2) == [4, 5]
    assert strided().experts_of(0, 1) == [1, 3]
    assert strided().experts_of(1, 1) == [0, 1]


def test_moves_lead_from_one_table_to_the_other() -> None:
    start, end = ExpertPlacement.contiguous(2, 4, 2), strided()
    home_LE = start.home_LE.clone()
    for move in start.moves_to(end):
        assert home_LE[move.layer, move.expert] == move.source
        home_LE[move.layer, move.expert] = move.destination
    assert torch.equal(home_LE, end.home_LE)
    assert start.moves_to(end)[0] == Move(layer=0, expert=1, source=0, destination=1)
    assert end.moves_to(end) == []


def test_file_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    strided().save(path)
    loaded = ExpertPlacement.load(path)
    assert torch.equal(loaded.home_LE, strided().home_LE)
    assert loaded.digest() == strided().digest()
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "home": [[1, 0, 0, 1], [1, 1, 0, 0]]}))
    with pytest.raises(ValueError, match="does not match its digest"):
        ExpertPlacement.load(path)
    path.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ValueError, match="format 2 is newer than 1"):
        ExpertPlacement.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a readable placement file"):
        ExpertPlacement.load(path)


@pytest.mark.parametrize(
    ("table", "ranks", "message"),
    [
        ([[0, 0, 0, 1]], 2, r"layer 0 gives the ranks \[3, 1\] experts; .* exactly 2"),
        ([[0, 1, 2, 1]], 2, r"layer 0 names a rank outside 0..1"),
        ([[0, 1, 0]], 2, r"num_ranks \(2\) must divide the number of experts \(3\)"),
    ],
)
def test_bad_tables(table: list[list[int]], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertPlacement(torch.tensor(table), ranks)


def test_tables_of_other_shapes_have_no_moves() -> None:
    with pytest.raises(ValueError, match="cannot move"):
        strided().moves_to(ExpertPlacement.contiguous(2, 4, 4))
