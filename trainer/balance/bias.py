"""Loss-free balancing: a bias decides the choice of experts, never their weights.

E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks
from trainer.balance.base import Balancer
from trainer.balance.schedule import Schedule
from trainer.balance.target import check_target, target_load

SELECTION_BIAS = "e_score_correction_bias"
UPDATES = ("sign", "proportional")


class LossFreeBias(Balancer):
    """Loss-free balancing by a selection bias (arXiv:2408.15664; theory: arXiv:2512.03915).

    After every applied step n, with c the rows per expert over the global batch and m what each
    is to have: b += rate_n * sign(m - c), or b += rate_n * (m - c) / m. The bias gets no
    gradient. For families whose router has one.

    Args:
        rate: change of the bias in the first step. update: sign or proportional.
        schedule: constant, linear, cosine, inverse (rate / n) or inverse_sqrt. steps, final: of
            linear and cosine. until: last step that changes the bias; None for no end.
        recentre: keep the mean of a layer's biases at 0; a common shift changes no choice.
        target: what experts are to have, in proportion; None for alike.

    Raises:
        ValueError: for a value out of bounds.
    """

    def __init__(
        self,
        rate: float = 1e-3,
        update: str = "sign",
        schedule: str = "constant",
        steps: int | None = None,
        final: float = 0.0,
        until: int | None = None,
        recentre: bool = False,
        target: Sequence[float] | None = None,
    ) -> None:
        if update not in UPDATES:
            raise ValueError(f"balance.loss_free.update ({update}) must be {' or '.join(UPDATES)}")
        check_target("balance.loss_free", target)
        key = "balance.loss_free.rate"
        self.rate = Schedule(key, rate, schedule, steps, final, until)
        self.update, self.recentre, self.target = update, recentre, target
        self.step = 1

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        missing = [name for name, block in moe_blocks(model) if selection_bias(block) is None]
        if missing:
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise ValueError(
                f"balance: loss-free balancing needs a router with a selection bias "
                f"({SELECTION_BIAS}); {kind} has none in {missing[0]}. Use balance=aux_loss"
            )
        self.blocks = [block for _, block in moe_blocks(model)]
        self.target_E = target_load("balance.loss_free", self.target, self.blocks[0])

    @torch.no_grad()
    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        rate, ranges = self.rate.at(self.step), []
        for block, counts_E in zip(self.blocks, counts_LE.double(), strict=True):
            bias = selection_bias(block)
            assert bias is not None
            update_E = rate * self.direction(counts_E)
            if rate and self.recentre:
                update_E -= (bias.double().cpu().view(-1) + update_E).mean()
            bias += update_E.to(bias).view_as(bias)
            ranges.append(float(bias.max() - bias.min()))
        self.step += 1
        metrics = {"balance/bias_range": max(ranges)}
        if not self.rate.is_constant:
            metrics["balance/loss_free_rate"] = rate
        return metrics

    def direction(self, counts_E: Tensor) -> Tensor:
        """Where the bias goes, float64 [E]: up for experts that have too few rows."""
        wanted_E = counts_E.sum() * self.target_E
        lack_E = wanted_E - counts_E
        return lack_E.sign() if self.update == "sign" else lack_E / wanted_E.clamp(min=1e-300)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}  # the biases are part of the model

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state.get("step", 1)


def selection_bias(block: nn.Module) -> Tensor | None:
    """The bias that a router adds to its scores for the choice of experts, if it has one."""
    for module in block.modules():
        bias = getattr(module, SELECTION_BIAS, None)
        if isinstance(bias, Tensor):
            return bias
    return None
