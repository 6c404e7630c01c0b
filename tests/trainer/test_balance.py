"""Balancers by themselves: targets, schedules, what is refused, what is saved."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from tests.trainer.balance_loops import auxiliary, moved_bias
from trainer.balance.bias import LossFreeBias
from trainer.balance.losses import AuxiliaryLoss, ZLoss, balance_loss, counts, probabilities
from trainer.balance.schedule import Schedule
from trainer.balance.target import target_load

TOKENS, EXPERTS, TOP_K = 60, 6, 2


def routed(seed: int, absent: bool = True) -> tuple[Tensor, Tensor]:
    """Logits with a gradient, and their best choices, some of them "no expert"."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    ids_TK = logits_TE.topk(TOP_K).indices
    if absent:
        ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.2] = EXPERTS
    return logits_TE.requires_grad_(), ids_TK


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("target", [None, [1.0, 2.0, 3.0, 1.0, 0.5, 4.0]])
def test_auxiliary_loss_and_gradient(sigmoid: bool, target: list[float] | None) -> None:
    logits_TE, ids_TK = routed(0)
    want = auxiliary(logits_TE, ids_TK, target=target, sigmoid=sigmoid)
    (want_TE,) = torch.autograd.grad(want, logits_TE)
    target_E = torch.tensor(target or [1.0] * EXPERTS, dtype=torch.float64)
    mean_E = probabilities(logits_TE, sigmoid).mean(0)
    got = balance_loss(counts(ids_TK[None], EXPERTS), mean_E, target_E / target_E.sum())[0]
    (got_TE,) = torch.autograd.grad(got, logits_TE)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    torch.testing.assert_close(got_TE, want_TE, rtol=1e-10, atol=1e-14)


def test_loads_at_their_target_cost_one() -> None:
    target_E = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    loss = balance_loss(torch.tensor([50, 30, 20]), target_E, target_E)
    assert float(loss) == pytest.approx(1, rel=1e-12)
    assert float(balance_loss(torch.tensor([30, 50, 20]), target_E.roll(1), target_E)) > 1


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ("constant", [8, 8, 8, 8, 8]),
        ("linear", [8, 6, 4, 2, 2]),
        ("cosine", [8, 6.5, 3.5, 2, 2]),
        ("inverse", [8, 4, 8 / 3, 2, 1.6]),
        ("inverse_sqrt", [8, 8 / math.sqrt(2), 8 / math.sqrt(3), 4, 8 / math.sqrt(5)]),
    ],
)
def test_schedules(shape: str, want: list[float]) -> None:
    bends = {"steps": 4, "final": 2.0} if shape in ("linear", "cosine") else {}
    schedule = Schedule("balance.x.rate", 8.0, shape, **bends)  # type: ignore[arg-type]
    assert [schedule.at(step) for step in range(1, 6)] == pytest.approx(want)
    frozen = Schedule("balance.x.rate", 8.0, shape, until=3, **bends)  # type: ignore[arg-type]
    assert [frozen.at(step) for step in range(1, 6)] == pytest.approx([*want[:3], 0, 0])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: LossFreeBias(0), r"balance.loss_free.rate \(0\) must be > 0"),
        (lambda: LossFreeBias(update="best"), r"update \(best\) must be sign or proportional"),
        (lambda: LossFreeBias(schedule="step"), r"balance.loss_free.schedule \(step\) must be"),
        (lambda: LossFreeBias(schedule="linear"), r"balance.loss_free.steps \(None\) must be >= 2"),
        (lambda: LossFreeBias(steps=9), r"balance.loss_free.steps \(9\) .* are for"),
        (lambda: LossFreeBias(until=0), r"balance.loss_free.until \(0\) must be >= 1"),
        (lambda: LossFreeBias(target=[1, 0]), r"target \(\[1, 0\]\) must be numbers > 0"),
        (lambda: AuxiliaryLoss(-1), r"balance.aux_loss.coefficient \(-1\) must be > 0"),
        (lambda: AuxiliaryLoss(scope="all"), r"scope \(all\) must be one of micro_batch"),
        (lambda: AuxiliaryLoss(scope="sequence", final=-1.0), r"balance.sequence_loss.final"),
        (lambda: ZLoss(math.inf), r"balance.z_loss.coefficient \(inf\) must be > 0"),
    ],
)
def test_refusals(make: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()


class Router(nn.Module):
    """No more of an MoE block than a selection bias and a number of experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))
        self.experts = SimpleNamespace(num_experts=num_experts)


def balancing(num_experts: int, layers: int = 1, **options: Any) -> tuple[LossFreeBias, list[Any]]:
    """A balancer of layers by themselves, and their biases."""
    balancer = LossFreeBias(**options)
    balancer.blocks = [Router(num_experts) for _ in range(layers)]
    balancer.target_E = target_load("balance.loss_free", balancer.target, balancer.blocks[0])
    return balancer, [block.e_score_correction_bias for block in balancer.blocks]


@pytest.mark.parametrize("update", ["sign", "proportional"])
@pytest.mark.parametrize("recentre", [False, True])
def test_biases_move_as_defined(update: str, recentre: bool) -> None:
    options: dict[str, Any] = {"update": update, "recentre": recentre}
    balancer, biases = balancing(4, 2, rate=0.1, schedule="inverse", until=3, **options)
    want = [torch.zeros(4, dtype=torch.float64) for _ in range(2)]
    for step, counts_LE in enumerate(torch.randint(0, 50, (5, 2, 4)), 1):
        metrics = balancer.after_step(counts_LE)
        rate = 0.1 / step if step <= 3 else 0.0
        assert metrics["balance/loss_free_rate"] == pytest.approx(rate)
        if rate:
            want = [
                moved_bias(bias, counts_E, rate, update, recentre)
                for bias, counts_E in zip(want, counts_LE, strict=True)
            ]
        for bias, wanted in zip(biases, want, strict=True):
            torch.testing.assert_close(bias.double(), wanted, rtol=1e-5, atol=1e-7)
        again, _ = balancing(4, 2, rate=0.1, schedule="inverse", until=3, **options)
        again.load_state_dict(balancer.state_dict())
        assert again.step == step + 1


def test_a_target_is_reached() -> None:
    """Experts get rows in proportion to it."""
    target = [1.0, 2.0, 5.0]
    balancer, (bias_E,) = balancing(3, rate=0.05, schedule="inverse_sqrt", target=target)
    scores_TE = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(400):
        ids_T = (scores_TE + bias_E).argmax(1)
        counts_E = torch.bincount(ids_T, minlength=3)
        balancer.after_step(counts_E[None])
    torch.testing.assert_close(
        counts_E / 4000, torch.tensor(target) / sum(target), rtol=0.02, atol=0
    )


def test_rows_move_only_from_more_to_less_loaded_experts() -> None:
    """arXiv:2512.03915, for both updates and several choices: between two of its experts a token
    changes only to the one whose bias rose more, which had fewer rows."""
    for seed, update in ((0, "sign"), (1, "proportional")):
        balancer, (bias_E,) = balancing(8, rate=0.01, update=update)
        scores_TE = torch.rand(500, 8, generator=torch.Generator().manual_seed(seed)) ** 2
        before = (scores_TE + bias_E).topk(3).indices
        moves = 0
        for _ in range(200):
            counts_E = torch.bincount(before.flatten(), minlength=8)
            balancer.after_step(counts_E[None])
            after = (scores_TE + bias_E).topk(3).indices
            for old, new in zip(before.tolist(), after.tolist(), strict=True):
                left, joined = set(old) - set(new), set(new) - set(old)
                moves += len(left)
                if left:  # the worst of those that joined against the best of those left
                    assert min(counts_E[list(left)]) > max(counts_E[list(joined)]) or len(left) > 1
                    assert max(counts_E[list(left)]) > min(counts_E[list(joined)])
            before = after
        assert moves > 100


def test_the_dual_falls_until_loads_overshoot() -> None:
    """D(b) = sum of the best biased scores - mean(c) sum(b), the Lagrangian at its best choice:
    a proportional step from loads c to c' changes it by at most rate/mean * <c - m, c' - m> less,
    so it falls as long as loads stay on their side; it ends near the optimum of the linear
    programme that assigns tokens evenly."""
    tokens, experts = 240, 4
    scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(2)) ** 3
    mean = tokens / experts
    balancer, (bias_E,) = balancing(
        experts, rate=0.3, update="proportional", schedule="inverse_sqrt"
    )

    def dual() -> tuple[float, Tensor]:
        best = (scores_TE + bias_E).max(1)
        value = float(best.values.double().sum() - mean * bias_E.double().sum())
        return value, torch.bincount(best.indices, minlength=experts)

    value, counts_E = dual()
    values, fell = [value], 0
    for step in range(1, 600):
        balancer.after_step(counts_E[None])
        new, after_E = dual()
        along = float(((counts_E - mean) * (after_E - mean)).sum()) / mean
        assert new <= value - 0.3 / math.sqrt(step) * along + 1e-3
        if along >= 0:
            fell += 1
            assert new <= value + 1e-3
        value, counts_E = new, after_E
        values.append(value)
    of_token = np.kron(np.eye(tokens), np.ones(experts))
    of_expert = np.kron(np.ones(tokens), np.eye(experts))
    best = linprog(
        -scores_TE.double().numpy().ravel(),
        A_eq=np.concatenate([of_token, of_expert]),
        b_eq=np.concatenate([np.ones(tokens), np.full(experts, mean)]),
        method="highs",
    )
    assert fell > 50
    assert -best.fun - 1e-3 <= min(values) <= -best.fun + 0.002 * abs(best.fun)


def test_the_final_imbalance_is_bounded_by_close_calls() -> None:
    """Once an expert has been on either side of the mean, it is off by no more rows than change
    in one step, and those are tokens whose two best scores are within two rates."""
    rate, tokens, experts = 0.01, 400, 5
    balancer, (bias_E,) = balancing(experts, rate=rate)
    scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(3))
    mean = tokens / experts
    sides: list[set[float]] = [set() for _ in range(experts)]
    largest, checked = 0, 0
    ids_T = scores_TE.argmax(1)
    for _ in range(400):
        counts_E = torch.bincount(ids_T, minlength=experts)
        for expert, count in enumerate(counts_E.tolist()):
            sides[expert].add(math.copysign(1, count - mean))
            if len(sides[expert]) > 1:
                checked += 1
                assert abs(count - mean) <= largest + 1
        best_TK = (scores_TE + bias_E).topk(2).values
        close = int((best_TK[:, 0] - best_TK[:, 1] <= 2 * rate + 1e-6).sum())
        balancer.after_step(counts_E[None])
        after_T = (scores_TE + bias_E).argmax(1)
        moved = int((after_T != ids_T).sum())
        assert moved <= close
        largest, ids_T = max(largest, moved), after_T
    assert checked > 1000
