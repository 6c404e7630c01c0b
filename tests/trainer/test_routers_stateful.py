"""Routers that keep something from step to step: ReLU's coefficient, and replay's files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.compose import load
from placement.trace import Trace, load_trace
from tests.ranks import run_ranks
from tests.trainer.test_routers import EXPERTS, TOP_K, fitted
from tests.trainer.test_run import TINY, corpus, metrics
from trainer.routers.relu import Relu, l1_loss
from trainer.routers.replay import Replay
from trainer.run import run


def test_relu_takes_what_is_positive() -> None:
    logits_TE = torch.randn(20, EXPERTS, dtype=torch.float64, requires_grad=True)
    for most in (None, 3):
        router = fitted(Relu(most=most))
        scores_TE = router.scores(logits_TE)
        ids_TK = router.choose(0, scores_TE, scores_TE.detach(), True)
        weights_TK = router.weigh(scores_TE, ids_TK)
        for logits, ids, weights in zip(
            logits_TE.tolist(), ids_TK.tolist(), weights_TK, strict=True
        ):
            positive = sorted(
                (e for e in range(EXPERTS) if logits[e] > 0), key=lambda e: -logits[e]
            )
            positive = positive[: most or EXPERTS]
            chosen = [e for e in ids if e < EXPERTS]
            assert chosen == positive and ids[len(chosen) :] == [EXPERTS] * (len(ids) - len(chosen))
            want = [logits[e] for e in positive]
            assert weights.tolist()[: len(want)] == want and not weights[len(want) :].any()


def test_relu_loss_and_gradient() -> None:
    logits_TE = torch.randn(15, EXPERTS, dtype=torch.float64, requires_grad=True)
    want: Any = 0.0
    for expert in range(EXPERTS):
        share = sum(1 for row in logits_TE.tolist() if row[expert] > 0) / 15 * EXPERTS / TOP_K
        want = want + sum(row[expert] for row in logits_TE if row[expert] > 0) * share / 15
    got = l1_loss(fitted(Relu()).scores(logits_TE), TOP_K)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    (got_TE,), (want_TE,) = (torch.autograd.grad(each, logits_TE) for each in (got, want))
    torch.testing.assert_close(got_TE, want_TE, rtol=1e-12, atol=1e-15)


def test_relu_coefficient_follows_the_rows() -> None:
    router, counts_LE = fitted(Relu(0.1, growth=2.0)), torch.ones(3, EXPERTS, dtype=torch.int64)
    seen = []
    for rows in (5, 1, 1, 2):  # per token, of the wanted 2
        router.before_step(EXPERTS)
        metrics = router.after_step(counts_LE * rows)
        assert metrics["router/experts_per_token"] == rows
        seen.append(metrics["router/relu_coefficient"])
    assert seen == pytest.approx([0.1, 0.2, 0.1, 0.05])
    assert router.coefficient == pytest.approx(0.05)
    again = fitted(Relu())
    again.load_state_dict(json.loads(json.dumps(router.state_dict())))
    assert (again.coefficient, again.step) == (router.coefficient, 5)


def test_relu_reaches_the_familys_number(tmp_path: Path) -> None:
    """From half of the experts at the start to two, and stays there."""
    lines = trained(tmp_path, "router=relu", "balance=none", "router.coefficient=1.0e-5", steps=80)
    used = [line["router/experts_per_token"] for line in lines]
    assert used[0] > 3 and 1.6 < sum(used[-40:]) / 40 < 2.6
    assert all(line["balance/relu_loss"] > 0 for line in lines)


def trained(tmp_path: Path, *overrides: str, steps: int = 6) -> list[dict[str, Any]]:
    """A run of the tiny model; its metrics."""
    text, folder = tmp_path / "text", tmp_path / str(len(list(tmp_path.iterdir())))
    text = text if text.exists() else corpus(text)
    run_ranks(whole_run, 2, str(text), str(folder), steps, *overrides)
    return metrics(folder)


def whole_run(text: str, folder: str, steps: int, *overrides: str) -> None:
    files = f"data.sources.text.paths={text}/*.txt"
    changes = f"train.steps={steps}", "train.log_every=1", "checkpoint.export=false"
    run(load(*TINY, files, f"run.dir={folder}", *changes, *overrides))


def test_a_replayed_run_is_the_recorded_one(tmp_path: Path) -> None:
    """Under another planner, with losses that count the same rows."""
    plain = trained(tmp_path, "train.record_routing_every=1", "planner=home")
    folder = next(tmp_path.glob("*/routing"))
    again = trained(tmp_path, "router=replay", f"router.path={folder}", "planner=quota")
    for before, after in zip(plain, again, strict=True):
        assert after["train/loss"] == pytest.approx(before["train/loss"], rel=1e-5)
        assert after["moe/rows"] == before["moe/rows"]
        assert after["moe/max_violation"] == before["moe/max_violation"]


def replaying(folder: Path, **trace: Any) -> Any:
    """A replay router of one rank at its first step, of a file with these changes."""
    tokens = np.arange(12)
    fields: dict[str, Any] = {
        "ids_TLK": np.tile(np.array([[[0, 1], [2, 3]]]), (12, 1, 1)),
        "num_experts": EXPERTS,
        "source_T": tokens // 6,
        "token_T": tokens,
    }
    folder.mkdir(exist_ok=True)
    Trace(**{**fields, **trace}).save(folder / "step-00000001.npz")
    router: Any = fitted(Replay(str(folder)))
    router.num_layers, router.mesh = 2, SimpleNamespace(rank=1)
    return router


def test_replay_takes_the_ranks_own_tokens(tmp_path: Path) -> None:
    ids_TLK = np.random.default_rng(0).random((12, 2, EXPERTS)).argsort(2)[:, :, :TOP_K]
    router = replaying(tmp_path / "routing", ids_TLK=ids_TLK)
    router.before_step(6)
    for number in range(2):  # micro-batches of three tokens
        router.token_T = np.arange(6 + 3 * number, 9 + 3 * number)
        for layer in range(2):
            found = router.choose(layer, torch.zeros(3, EXPERTS), torch.zeros(3, EXPERTS), True)
            assert found.tolist() == ids_TLK[router.token_T, layer].tolist()


@pytest.mark.parametrize(
    ("trace", "why"),
    [
        (
            {"num_experts": 9},
            r"\(layers, experts, choices\) = \(2, 9, 2\), this one has \(2, 8, 2\)",
        ),
        ({"ids_TLK": np.zeros((12, 1, 1), int)}, r"\(1, 8, 1\), this one"),
        ({"token_T": None}, "is of a model with"),
        (
            {"token_T": np.arange(12)[::-1].copy()},
            "micro-batch 0 of step 1 on rank 1 has other",
        ),
    ],
)
def test_replay_refuses_other_models_and_batches(
    trace: dict[str, Any], why: str, tmp_path: Path
) -> None:
    router = replaying(tmp_path / "routing", **trace)
    with pytest.raises(ValueError, match=why):
        router.before_step(6)
        router.token_T = np.arange(6, 9)
        router.choose(0, torch.zeros(3, EXPERTS), torch.zeros(3, EXPERTS), True)


def test_replay_refuses_missing_and_torn_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"router.path \(.*\) must be the folder routing/"):
        Replay(str(tmp_path / "absent"))
    router = replaying(tmp_path / "routing")
    router.step = 2
    with pytest.raises(ValueError, match="step 2 was not recorded"):
        router.before_step(6)
    file = tmp_path / "routing" / "step-00000001.npz"
    file.write_bytes(file.read_bytes()[:-40])
    router.step = 1
    with pytest.raises(ValueError):
        router.before_step(6)
    with pytest.raises(ValueError):
        load_trace(file)
