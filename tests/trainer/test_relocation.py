"""Relocation changes nothing else: the losses after it are those of a run without it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.compose import load
from parallel.model import moe_layers
from parallel.planners import Quota, Replicated, Sticky
from parallel.two_level import TwoLevelDispatcher
from placement.table import ExpertPlacement
from tests.ranks import run_ranks
from tests.trainer.relocation_runs import batch, make_engine, random_table, step
from tests.trainer.test_run import TINY, corpus, metrics
from trainer.checkpoint_files import placement_of
from trainer.run import run
from trainer.trainer import Trainer

CLIP = 0.3


def losses(case: dict[str, Any], moves: dict[int, int]) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step.

    Args:
        moves: before which step experts move to which random table.
    """
    case = dict(case)
    steps, num_experts = case.pop("steps", 4), case.get("model", {}).get("num_experts", 8)
    engine = make_engine(max_grad_norm=CLIP, **case)
    results = []
    for number in range(steps):
        if number in moves:
            engine.eval_step(batch(engine, number))  # some layers stay gathered after this
            table = random_table(moves[number], num_experts, engine.mesh.ep_size)
            assert engine.relocate(table).experts > 0
            for index, (_, layer) in enumerate(moe_layers(engine.model)):
                assert layer.local_experts == table.experts_of(index, engine.mesh.ep_rank)
        found = step(engine, number)
        results.append((found["train/loss"], found["train/grad_norm"]))
    return results


def both(world: int, case: dict[str, Any], moves: dict[int, int]) -> tuple[Any, Any]:
    """Results of a run with relocations and of one without; clipping is active, losses change."""
    moved, plain = (run_ranks(losses, world, case, which)[0] for which in (moves, {}))
    assert min(norm for _, norm in plain) > CLIP
    assert all(a != b for a, b in pairwise(plain))
    return moved, plain


@pytest.mark.parametrize(
    ("world", "ep"),
    [
        (2, 2),
        pytest.param(4, 4, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_the_next_twenty_one_losses_bit_for_bit(world: int, ep: int) -> None:
    moved, plain = both(world, {"ep": ep, "steps": 22}, {1: 1})
    assert moved == plain


EXACT: dict[str, tuple[int, dict[str, Any]]] = {
    "stacks split within experts": (4, {"ep": 2, "model": {"num_experts": 6}}),
    "gathered after an evaluation": (4, {"ep": 2, "reshard_after_forward": False}),
    "two nodes": (4, {"ep": 4, "ranks_per_node": 2, "layers": {"dispatcher": TwoLevelDispatcher}}),
    "biases": (2, {"ep": 2, "family": "gpt_oss", "model": {"intermediate_size": 32}}),
    "recomputed, in two chunks": (2, {"ep": 2, "recompute": True, "layers": {"num_chunks": 2}}),
}


@pytest.mark.parametrize("name", EXACT)
def test_bit_for_bit(name: str) -> None:
    world, case = EXACT[name]
    moved, plain = both(world, case, {0: 1, 2: 2})
    assert moved == plain


ROUNDED: dict[str, tuple[float, int, dict[str, Any]]] = {
    "top 3": (1e-6, 2, {"model": {"num_experts_per_tok": 3}}),
    "top 3, float64": (1e-12, 2, {"model": {"num_experts_per_tok": 3}, "dtype": torch.float64}),
    "four chunks": (1e-6, 4, {"layers": {"num_chunks": 4}}),
    "quota": (1e-6, 2, {"planner": Quota()}),
    "quota, float64": (1e-12, 2, {"planner": Quota(), "dtype": torch.float64}),
    "sticky": (1e-6, 2, {"planner": Sticky(Quota(), slack=0.02)}),
    "replicated": (1e-6, 2, {"planner": Replicated(slots=1, window=4)}),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_to_rounding(name: str) -> None:
    tolerance, ep, case = ROUNDED[name]
    moved, plain = both(ep, {"ep": ep, **case}, {0: 1, 2: 2})
    for a, b in zip(moved, plain, strict=True):
        assert a == pytest.approx(b, rel=tolerance)


def trained(text: str, folder: str, table: ExpertPlacement) -> int:
    """A whole run in which the trainer moves experts after its second step; how many it moved."""
    moved = 0

    class Moving(Trainer):
        def _step(self) -> Any:
            nonlocal moved
            stats = super()._step()
            if self.progress.step == 2:
                moved = self.relocate(table)
            return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.run.Trainer", Moving)
        files = f"data.sources.text.paths={text}/*.txt"
        changes = "train.steps=3", "checkpoint.export=false", "train.generate=0"
        run(load(*TINY, files, f"run.dir={folder}", *changes))
    return moved


def test_the_trainer_moves_experts_and_saves_their_homes(tmp_path: Path) -> None:
    text, table = corpus(tmp_path / "text"), random_table(4, 8, 2)
    changed = int((table.home_LE != ExpertPlacement.contiguous(2, 8, 2).home_LE).sum())
    assert run_ranks(trained, 2, str(text), str(tmp_path / "run"), table) == [changed, changed]
    assert len(metrics(tmp_path / "run")) == 3
    checkpoint = tmp_path / "run/checkpoints/step-00000003"
    assert placement_of(checkpoint).digest() == table.digest()
    training = checkpoint / "training.json"
    training.write_text("{}".ljust(training.stat().st_size))
    with pytest.raises(ValueError, match="has no placement; name one in the configuration"):
        placement_of(checkpoint)
