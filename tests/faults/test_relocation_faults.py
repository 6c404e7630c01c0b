"""A rank that dies while experts move costs the steps since the last checkpoint, nothing else."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import relocate as relocate_module
from parallel.model import moe_layers
from tests.ranks import run_ranks
from tests.trainer.checkpoint_runs import save, snapshot
from tests.trainer.relocation_runs import LAYERS, make_engine, random_table, step
from trainer.checkpoint import Checkpointer, newest
from trainer.checkpoint_files import placement_of
from trainer.engine import TorchEngine
from trainer.ranks import RollCall

WORLD, EP, SAVED, STEPS = 4, 2, 2, 5
MOVES = {1: random_table(1, 8, EP), 3: random_table(2, 8, EP)}  # before these steps

CODES = 1, -9, 1, 1  # how the ranks end


def train(engine: TorchEngine, first: int, last: int, folder: str | None = None) -> list[float]:
    """Losses of some steps; experts move on the way, and one checkpoint is saved."""
    checkpointer = Checkpointer(folder, mesh=engine.mesh) if folder else None
    losses = []
    for number in range(first, last):
        if number == SAVED and checkpointer is not None:
            table = MOVES[1]
            placement = {"num_ranks": table.num_ranks, "home": table.home_LE.tolist()}
            save(engine, checkpointer, number, placement=placement)
            checkpointer.wait()
        if number in MOVES:
            engine.relocate(MOVES[number])
        losses.append(step(engine, number)["train/loss"])
    return losses


def undisturbed() -> dict[str, Any]:
    engine = make_engine(EP)
    losses = train(engine, 0, SAVED)
    return {"saved": snapshot(engine), "losses": losses + train(engine, SAVED, STEPS)}


def one_rank_dies(folder: str, signs: str) -> None:
    """Rank 1 dies during the second relocation, while a message of it is under way."""
    engine, roll_call = make_engine(EP), RollCall()
    train(engine, 0, 3, folder)
    post, posted = relocate_module.post, []

    def dying(*args: Any) -> Any:
        works = post(*args)
        posted.append(works)
        if dist.get_rank() == 1 and len(posted) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return works

    pytest.MonkeyPatch().setattr(relocate_module, "post", dying)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        engine.relocate(MOVES[3])
    assert time.monotonic() - start < 30
    for index, (_, layer) in enumerate(moe_layers(engine.model)):  # it does not claim to be whole
        assert layer.local_experts == MOVES[1].experts_of(index, engine.mesh.ep_rank)
    Path(signs, str(dist.get_rank())).write_text(str(roll_call.missing()))
    os._exit(1)  # as a run does then


def restarted(folder: str) -> dict[str, Any]:
    """Go on from the newest checkpoint under the table that it was saved with."""
    path = newest(Path(folder))
    assert path is not None
    engine = make_engine(EP, table=placement_of(path))
    checkpointer = Checkpointer(folder, mesh=engine.mesh)
    extra = checkpointer.load(path, engine.model, engine.optimizer)
    engine.load_state_dict(extra["engine"])
    homes = [layer.local_experts for _, layer in moe_layers(engine.model)]
    loaded = snapshot(engine)
    return {
        "homes": homes,
        "ep rank": engine.mesh.ep_rank,
        "loaded": loaded,
        "losses": train(engine, SAVED, STEPS),
    }


@pytest.mark.slow
def test_a_rank_dies_while_experts_move(tmp_path: Path) -> None:
    folder, signs = str(tmp_path / "checkpoints"), tmp_path / "signs"
    signs.mkdir()
    with pytest.raises(AssertionError) as failure:
        run_ranks(one_rank_dies, WORLD, folder, str(signs))
    ends = [f"rank {rank} left no result (exit code {code})" for rank, code in enumerate(CODES)]
    assert str(failure.value) == "\n".join(ends)
    named = str([f"1 on {socket.gethostname()}"])
    assert {path.name: path.read_text() for path in signs.iterdir()} == dict.fromkeys("023", named)
    whole = run_ranks(undisturbed, WORLD)
    for rank, found in enumerate(run_ranks(restarted, WORLD, folder)):
        expected = [MOVES[1].experts_of(layer, found["ep rank"]) for layer in range(LAYERS)]
        assert found["homes"] == expected
        assert found["loaded"].keys() == whole[rank]["saved"].keys()
        for key, value in whole[rank]["saved"].items():
            assert torch.equal(found["loaded"][key], value), key
        assert found["losses"] == whole[rank]["losses"][SAVED:]
