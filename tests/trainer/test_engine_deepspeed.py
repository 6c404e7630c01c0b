"""The DeepSpeed engine against plain training on one process and against the torch engine."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from configs.compose import composed
from configs.schema import check
from parallel.model import moe_blocks
from tests.ranks import run_ranks
from tests.trainer.deepspeed_runs import (
    ADAMW,
    SGD,
    STEPS,
    WORLD,
    make,
    masters,
    plain,
    result_of,
    saved,
    train_step,
)
from trainer.deepspeed_adopt import import_deepspeed
from trainer.engine import TorchEngine
from trainer.engine_deepspeed import DeepSpeedEngine

PARITY = [
    {"ep": ep, "zero_stage": stage, **optimizer}
    for ep in (1, 2, 4)
    for stage in (1, 2, 3)
    for optimizer in (ADAMW, SGD)
]
VARIANTS = [
    {"ep": 2, "zero_stage": stage, **SGD, **variant}
    for stage in (1, 2, 3)
    for variant in (
        {"family": "deepseek_v3"},  # shared experts, computed while tokens travel
        {"recompute": True},
        {"refetch": True},
        {"offload_optimizer": True},
        {"persist_below": 100},  # vectors stay whole under ZeRO 3
    )
    if stage == 3 or "persist_below" not in variant
]
BALANCED = [
    {"ep": 2, "zero_stage": stage, **SGD, "steps": 2, "family": family, "balancer": balancer}
    for stage in (1, 2, 3)
    for family, balancer in (
        ("qwen3_moe", "auxiliary"),
        ("ernie4_5_moe", "bias"),  # declares its bias as a parameter
        ("glm4_moe", "bias"),
    )
]


def all_cases(cases: list[dict[str, Any]], kind: Any = DeepSpeedEngine) -> list[dict[str, Any]]:
    """One after the other on one rank: DeepSpeed is imported once."""
    results = []
    for case in cases:
        engine = make(case, kind)
        results.append(result_of(engine, case["steps"]))
        if kind is DeepSpeedEngine:
            engine.zero.destroy()
    return results


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    """Results of all ranks by case."""
    cases = [*PARITY, *VARIANTS, *BALANCED]
    by_rank = run_ranks(all_cases, WORLD, cases, timeout_s=300)
    return {str(case): list(r) for case, r in zip(cases, zip(*by_rank, strict=True), strict=True)}


@pytest.fixture(scope="module")
def torch_runs() -> dict[str, list[dict[str, Any]]]:
    by_rank = run_ranks(all_cases, WORLD, BALANCED[:3], TorchEngine)
    cases = [without_stage(case) for case in BALANCED[:3]]
    return {case: list(r) for case, r in zip(cases, zip(*by_rank, strict=True), strict=True)}


def without_stage(case: dict[str, Any]) -> str:
    return str({**case, "zero_stage": 0})


@pytest.mark.parametrize("case", [*PARITY, *VARIANTS], ids=str)
def test_parity_with_one_process(runs: Any, case: dict[str, Any]) -> None:
    """Any placement, a moving planner, uneven tokens, micro-batches, clipping that is active."""
    family = case.get("family", "qwen3_moe")
    expected = plain(family, case["optimizer"], case["clip"], case["steps"])
    keys = set()
    for result in runs[str(case)]:
        for metrics, loss, norm in zip(
            result["metrics"], expected["losses"], expected["norms"], strict=True
        ):
            assert metrics["train/loss"] == pytest.approx(loss, rel=1e-6)
            assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
        nats, tokens = result["validation"].tolist()
        assert nats / tokens == pytest.approx(expected["validation"], rel=1e-6)
        for key, value in result["state"].items():
            torch.testing.assert_close(value, expected["state"][key], rtol=0, atol=5e-6, msg=key)
        keys |= set(result["state"])
    assert keys == set(expected["state"])


@pytest.mark.parametrize("case", BALANCED, ids=str)
def test_balancers_as_in_the_torch_engine(runs: Any, torch_runs: Any, case: dict[str, Any]) -> None:
    theirs = torch_runs[without_stage(case)]
    expected = {key: value for result in theirs for key, value in result["state"].items()}
    for result, other in zip(runs[str(case)], theirs, strict=True):
        for mine, reference in zip(result["metrics"], other["metrics"], strict=True):
            assert mine.keys() == reference.keys()
            for name in mine.keys() - {"moe/planner_ms"}:
                assert mine[name] == pytest.approx(reference[name], rel=1e-5), name
        for key, value in result["state"].items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=5e-6, msg=key)


def spoil(logits: Tensor) -> Tensor:
    """The loss of a token becomes infinite, gradients stay finite."""
    spoilt = logits.clone()
    spoilt[..., : logits.shape[-1] // 2] = -math.inf
    return spoilt


def spoilt_runs() -> list[tuple[list[bool], bool, dict[str, Tensor]]]:
    """Per ZeRO stage: which steps were applied, whether the bad one left all as it was, and
    parameters at the end; last without the bad step.
    """
    results = []
    for stage, with_bad in ((1, True), (2, True), (3, True), (3, False)):
        engine = make({"ep": 2, "zero_stage": stage, **ADAMW})
        finite, unchanged = [train_step(engine, 0).finite], True
        if with_bad:
            before = saved(engine)
            if engine.mesh.rank == 1:
                hook = engine.model.lm_head.register_forward_hook(lambda *a: spoil(a[2]))
            finite.append(train_step(engine, 1).finite)
            if engine.mesh.rank == 1:
                hook.remove()
            unchanged = all(torch.equal(v, before[k]) for k, v in saved(engine).items())
        finite.append(train_step(engine, 2).finite)
        results.append((finite, unchanged, masters(engine)))
        engine.zero.destroy()
    return results


def test_steps_that_are_not_finite_change_nothing() -> None:
    for *runs_with_bad, (_, _, expected) in run_ranks(spoilt_runs, WORLD):
        for finite, unchanged, state in runs_with_bad:
            assert finite == [True, False, True]
            assert unchanged
            for key in state.keys() & expected.keys():
                torch.testing.assert_close(state[key], expected[key], rtol=0, atol=5e-6, msg=key)


def bf16_runs() -> list[dict[str, Any]]:
    """The torch engine, ZeRO 2 and ZeRO 3 in bf16."""
    results = []
    for stage in (0, 2, 3):
        kind = DeepSpeedEngine if stage else TorchEngine
        engine = make({"ep": 2, "zero_stage": stage, "bf16": True, **ADAMW}, kind)
        routed: list[torch.dtype] = []
        _, block = moe_blocks(engine.model)[0]
        block.gate.register_forward_hook(lambda *a, seen=routed: seen.append(a[2][0].dtype))
        metrics = [train_step(engine, step).metrics for step in range(STEPS)]
        state = masters(engine)
        results.append({"metrics": metrics, "routed": set(routed), "state": state})
        if stage:
            engine.zero.destroy()
    return results


def test_bf16_keeps_fp32_masters_and_routes_in_fp32() -> None:
    for reference, *results in run_ranks(bf16_runs, WORLD):
        for result in results:
            assert result["routed"] == {torch.float32}
            assert {value.dtype for value in result["state"].values()} == {torch.float32}
            rounded = [v.bfloat16().float().equal(v) for v in result["state"].values()]
            assert not any(rounded)
            for mine, theirs in zip(result["metrics"], reference["metrics"], strict=True):
                for name in ("train/loss", "train/grad_norm"):
                    assert mine[name] == pytest.approx(theirs[name], rel=5e-3)


def test_experts_do_not_move() -> None:
    with pytest.raises(ValueError, match="relocate: engine=deepspeed cannot move experts"):
        DeepSpeedEngine.relocate(None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["engine.zero_stage=0"], "engine.zero_stage (0) must be 1, 2 or 3"),
        (["train.precision=bf16"], "use engine.zero_stage=2, or use engine=torch"),
        (["train.compile=true"], "train.compile (true) is not supported by engine=deepspeed"),
        (["train.dispatch_chunks=0"], "train.dispatch_chunks (0, chosen in the first steps) is"),
        (["relocate.every=10", "stats.every=1"], "relocate.every (10) is not supported by engine"),
        (["optim.only_routers=true"], "optim.only_routers (true) is not supported by engine"),
        (["planner=sticky"], "planner (Sticky) is not supported by engine=deepspeed"),
        (["planner=replicated"], "planner (Replicated) is not supported by engine=deepspeed"),
        (["balance=[auto,coupling]"], "balance (coupling) is not supported by engine=deepspeed"),
        (["balance=[auto,merge_experts]"], "balance (merge_experts) is not supported by engine"),
    ],
)
def test_what_is_refused_at_once(overrides: list[str], expected: str) -> None:
    config = OmegaConf.to_object(
        composed("experiment=quickstart", "engine=deepspeed", "train.dispatch_chunks=1", *overrides)
    )
    with pytest.raises(ValueError) as caught:
        check(config, 1)  # type: ignore[arg-type]
    assert expected in str(caught.value)
    assert "or use engine=torch" in str(caught.value)


def test_missing_and_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"pip install evenkeel\[deepspeed\], or use engine=torch"):
        import_deepspeed(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="0.20.0"))
    with pytest.raises(ValueError, match=r"needs deepspeed 0\.19\.8, here is 0\.20\.0"):
        import_deepspeed(torch.device("cuda"))
