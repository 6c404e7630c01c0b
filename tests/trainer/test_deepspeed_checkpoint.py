"""Checkpoints go from engine to engine, at any EP size, number of ranks and ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.trainer.checkpoint_runs import extra_of, merge
from tests.trainer.deepspeed_runs import WORLD, make, saved, train_step
from trainer.checkpoint import Checkpointer
from trainer.engine import EngineBase, TorchEngine
from trainer.engine_deepspeed import DeepSpeedEngine
from trainer.optim import build_adamw, parameter_groups


def grouped(model: Any) -> torch.optim.Optimizer:
    """As a run makes it, with a learning rate for every group."""
    groups = parameter_groups(model, 0.1, decay_routers=False)
    for number, group in enumerate(groups):
        group["lr"] = 0.004 * (number + 1)
    return build_adamw(groups, 0.01, (0.9, 0.95), 1e-3)


def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)


def store(engine: Any, directory: str, step: int) -> dict[str, Tensor]:
    state = saved(engine)
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    checkpointer.save(step, engine.model, engine.optimizer, extra_of(engine))
    checkpointer.wait()
    return state


def load(engine: Any, directory: str) -> dict[str, Tensor]:
    """Load the newest checkpoint; everything that this rank would save now."""
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    path = checkpointer.resolve("auto")
    assert path is not None
    extra = checkpointer.load(path, engine.model, engine.optimizer)
    engine.load_state_dict(extra["engine"])
    return saved(engine)


def exchanged(
    family: str, chain: list[tuple[Any, int, int]], directory: str
) -> list[dict[str, Any]]:
    """Engines that take over from each other, one step each, and save.

    Args:
        chain: kind, EP and ZeRO stage of each engine.
    """
    results: list[dict[str, Any]] = []
    for number, (kind, ep, stage) in enumerate(chain):
        case = {"ep": ep, "zero_stage": stage, "clip": 0.5, "family": family}
        case["persist_below"] = 100 * (number % 2)  # vectors stay whole, or nothing does
        case["offload_optimizer"] = number % 3 == 1
        engine = make(case, kind, optimizer=grouped, schedule=falling, scale=1 + number)
        loaded = load(engine, directory) if number else {}
        metrics = train_step(engine, number).metrics
        results.append({"loaded": loaded, "metrics": metrics})
        results[-1]["saved"] = store(engine, directory, number + 1)
        if kind is DeepSpeedEngine:
            engine.zero.destroy()
    return results


def uninterrupted(family: str, steps: int) -> list[dict[str, Any]]:
    engine = make({"ep": 1, "clip": 0.5, "family": family}, TorchEngine, grouped, falling)
    metrics = [train_step(engine, step).metrics for step in range(steps)]
    return [{"metrics": m, "saved": saved(engine)} for m in metrics]


CHAINS: dict[str, list[tuple[type[EngineBase], int, int]]] = {  # kind, EP, ZeRO stage
    "gpt_oss": [  # experts have biases, which do not decay
        (TorchEngine, 4, 0),
        (DeepSpeedEngine, 2, 1),
        (DeepSpeedEngine, 4, 3),
        (TorchEngine, 2, 0),
        (DeepSpeedEngine, 1, 2),
        (DeepSpeedEngine, 2, 3),
        (TorchEngine, 1, 0),
    ],
    "ernie4_5_moe": [  # declares the selection bias as a parameter
        (DeepSpeedEngine, 4, 2),
        (DeepSpeedEngine, 2, 3),
        (TorchEngine, 1, 0),
    ],
}


@pytest.mark.parametrize("family", CHAINS)
def test_engines_take_over_from_each_other(family: str, tmp_path: Path) -> None:
    """At other EP sizes, bit for bit, moments and rates included, and the losses go on."""
    chain = CHAINS[family]
    by_rank = run_ranks(exchanged, WORLD, family, chain, str(tmp_path))
    (expected,) = run_ranks(uninterrupted, 1, family, len(chain))
    before: dict[str, Tensor] = {}
    for number, results in enumerate(zip(*by_rank, strict=True)):
        loaded = merge([result["loaded"] for result in results])
        assert loaded.keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in loaded.items())
        before = merge([result["saved"] for result in results])
        for name in ("train/loss", "train/grad_norm", "train/lr"):
            value = expected[number]["metrics"][name]
            assert results[0]["metrics"][name] == pytest.approx(value, rel=1e-5), (number, name)
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in before)
    final = expected[-1]["saved"]
    assert before.keys() == final.keys()
    for key, value in final.items():
        torch.testing.assert_close(before[key], value, rtol=0, atol=5e-6, msg=key)


def test_another_number_of_ranks(tmp_path: Path) -> None:
    chain = [(DeepSpeedEngine, 4, 1)]
    before = run_ranks(exchanged, WORLD, "qwen3_moe", chain, str(tmp_path))
    after = run_ranks(resumed, 2, str(tmp_path))
    state = merge([rank[-1]["saved"] for rank in before])
    for loaded in zip(*after, strict=True):
        assert merge(list(loaded)).keys() == state.keys()
        for key, value in merge(list(loaded)).items():
            assert torch.equal(value, state[key]), key


def resumed(directory: str) -> list[dict[str, Tensor]]:
    """What engines of several kinds hold after they have loaded."""
    states = []
    for ep, stage in ((1, 2), (2, 3)):
        case = {"ep": ep, "zero_stage": stage, "clip": 0.5}
        engine = make(case, optimizer=grouped, schedule=falling, scale=2)
        states.append(load(engine, directory))
        engine.zero.destroy()
    return states
