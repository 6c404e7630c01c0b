"""The DeepSpeed engine: ZeRO 1, 2 or 3 over all ranks, over EDP for experts, with EP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallel.mesh import ParallelMesh
from parallel.relocate import Relocation
from placement.table import ExpertPlacement
from trainer.balance.base import Balancer
from trainer.deepspeed_adopt import (
    adopt,
    freeze_into_buffers,
    group_name,
    import_deepspeed,
    initialize,
    route_in_fp32,
    settings,
    split_groups,
)
from trainer.deepspeed_state import ZeroState
from trainer.engine import EngineBase


class DeepSpeedEngine(EngineBase):
    """DeepSpeed's ZeRO optimizers under our layers, with the same results as `TorchEngine`.

    Args:
        model, balancers, recompute: see `EngineBase`.
        make_optimizer: from the model to its optimizer over parameters that are still whole.
        make_schedule: from the optimizer to its learning-rate schedule, stepped once a step.
        max_grad_norm: clip above this norm; 0 for never.
        zero_stage: splits over ranks optimizer state (1), gradients (2), parameters (3).
        offload_optimizer: keep optimizer state in CPU memory and update there.
        bucket_elements: elements that travel together.
        persist_below: parameters of fewer elements stay whole under zero_stage 3.

    Raises:
        ValueError: if DeepSpeed is not installed. What it cannot do is refused earlier, by
            `configs.engine_rules`.
    """

    def __init__(
        self,
        model: Any,
        mesh: ParallelMesh,
        *,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        make_schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
        balancers: list[Balancer],
        bf16: bool = False,
        recompute: bool = False,
        compile: bool = False,
        max_grad_norm: float = 1.0,
        tune_chunks: bool = False,
        zero_stage: int = 1,
        offload_optimizer: bool = False,
        bucket_elements: int = 50_000_000,
        persist_below: int = 100_000,
    ) -> None:
        assert zero_stage in (1, 2, 3) and not (
            compile or tune_chunks or (bf16 and zero_stage == 1)
        )
        deepspeed = import_deepspeed(mesh.device)
        super().__init__(model, mesh, balancers=balancers, bf16=bf16, recompute=recompute)
        freeze_into_buffers(model)
        if bf16:
            route_in_fp32(model)
        adopt(model, mesh, zero_stage)
        optimizer = make_optimizer(model)
        origin = split_groups(optimizer, model, group_name(mesh))
        self.zero = initialize(
            deepspeed,
            model,
            optimizer,
            settings(
                stage=zero_stage,
                bf16=bf16,
                max_grad_norm=max_grad_norm,
                offload_optimizer=offload_optimizer,
                bucket_elements=bucket_elements,
                persist_below=persist_below,
            ),
        )
        self.schedule = make_schedule(optimizer)
        self.optimizer: ZeroState = ZeroState(self.zero, model, mesh, origin)

    def state_dict(self) -> dict[str, Any]:
        """As of every engine: the schedule's numbers of groups are those of whole groups."""
        state, origin = super().state_dict(), self.optimizer.origin
        first = [origin.index(group) for group in sorted(set(origin))]
        return {**state, "schedule": _of_groups(state["schedule"], first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        schedule = _of_groups(state["schedule"], self.optimizer.origin)
        super().load_state_dict({**state, "schedule": schedule})

    def relocate(self, new: ExpertPlacement) -> Relocation:
        raise ValueError("relocate: engine=deepspeed cannot move experts; use engine=torch")

    def _backward(self, micro_batches: list[dict[str, Tensor]], num_tokens: int) -> Tensor:
        total_loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for index, batch in enumerate(micro_batches):
            self.zero.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss = self._loss(self.zero, batch)
            total_loss += loss.detach()
            # DeepSpeed multiplies by its loss scale, 1 / ranks. It looks at gradients alone: of a
            # loss that is not finite they must not be either.
            finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
            factor = finite * self.mesh.world_size / num_tokens
            self.zero.backward(loss * factor, scale_wrt_gas=False)
        return total_loss

    def _gradient_norm(self) -> float:
        """Also updates the parameters, unless the norm is not finite."""
        self.zero.step()
        return float(self.zero.get_global_grad_norm())

    def _apply(self, finite: bool) -> None:
        assert finite == self.zero.was_step_applied()


def _of_groups(schedule: dict[str, Any], groups: list[int]) -> dict[str, Any]:
    """The state of a schedule for some of its groups; all lists in it have an entry per group."""
    return {
        key: [value[group] for group in groups] if isinstance(value, list) else value
        for key, value in schedule.items()
    }
