"""What the layers share over the micro-batches of one optimizer step: borrowed experts.

S native slots of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from parallel.borrow import Loan

_current: ContextVar[OptimizerStep | None] = ContextVar("optimizer_step", default=None)


@contextmanager
def optimizer_step() -> Iterator[OptimizerStep]:
    """Gradients of borrowed experts go home while the backward pass runs, and wait there in fp32.

    Call `finish` after the last backward pass, before the gradients are used. Without this
    context a layer adds them to its parameters' own gradients before its backward pass ends.
    """
    step = OptimizerStep()
    token = _current.set(step)
    try:
        yield step
    finally:
        _current.reset(token)


def current_step() -> OptimizerStep | None:
    """The optimizer step that runs, if its caller takes care of borrowed gradients."""
    return _current.get()


class OptimizerStep:
    """Loans that are kept over micro-batches, and gradients that came home."""

    def __init__(self) -> None:
        self._kept: dict[nn.Module, list[Loan]] = {}
        self._on_the_way: list[tuple[nn.Module, Loan]] = []
        self._totals: dict[nn.Module, dict[int, dict[str, Tensor]]] = {}

    def kept(self, experts: nn.Module) -> list[Loan]:
        """Loans of one layer that stay for the whole step."""
        return self._kept.setdefault(experts, [])

    def start_last_micro_batch(self) -> None:
        """From now on gradients of kept loans set out after their last use."""
        for loans in self._kept.values():
            for loan in loans:
                loan.keep = False

    def expect(self, experts: nn.Module, loan: Loan) -> None:
        """Gradients of a loan have set out."""
        self._on_the_way.append((experts, loan))

    def collect(self) -> None:
        """Add up, at home, the gradients that have set out."""
        arrived, self._on_the_way = self._on_the_way, []
        for experts, loan in arrived:
            totals = self._totals.setdefault(experts, {})
            for slot, gradients in loan.collect().items():
                for name, gradient in gradients.items():
                    if name in totals.setdefault(slot, {}):
                        totals[slot][name] += gradient
                    else:
                        totals[slot][name] = gradient

    def finish(self, layers: Sequence[nn.Module], edp_group: dist.ProcessGroup) -> None:
        """Add all returned gradients to those of the native parameters, whole or sharded.

        Args:
            layers: the experts of every layer, in the same order on all ranks.
            edp_group: the ranks that hold the same experts and may have lent different ones.
        """
        for loans in self._kept.values():
            for loan in loans:
                if not loan.returned:
                    loan.return_gradients()
        self.collect()
        if dist.get_world_size(edp_group) > 1:
            self._sum_over(edp_group, layers)
        for experts in layers:
            for slot, gradients in sorted(self._totals.get(experts, {}).items()):
                for name, gradient in gradients.items():
                    add_to_slot(getattr(experts, name), slot, gradient)

    def _sum_over(self, edp_group: dist.ProcessGroup, layers: Sequence[nn.Module]) -> None:
        """Sum what the ranks of an expert-data-parallel group got back for the same experts."""
        slots = [num_slots(experts) for experts in layers]
        any_parameter = next(layers[0].parameters())
        lent = torch.zeros(len(layers), max(slots), dtype=torch.int32, device=any_parameter.device)
        for index, experts in enumerate(layers):
            for slot in self._totals.get(experts, {}):
                lent[index, slot] = 1
        dist.all_reduce(lent, op=dist.ReduceOp.MAX, group=edp_group)
        for index, slot in lent.nonzero().tolist():
            mine = self._totals.setdefault(layers[index], {}).setdefault(slot, {})
            for name, parameter in layers[index].named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                if name not in mine:
                    dtype = torch.promote_types(parameter.dtype, torch.float32)
                    mine[name] = torch.zeros(
                        parameter.shape[1:], dtype=dtype, device=parameter.device
                    )
                dist.all_reduce(mine[name], group=edp_group)


def num_slots(experts: nn.Module) -> int:
    return next(experts.parameters(recurse=False)).shape[0]


def add_to_slot(parameter: Any, slot: int, gradient: Tensor) -> None:
    """Add one expert's gradient to that of a stack [S, ...], whole or a shard of this rank."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    local = parameter.grad
    if isinstance(local, DTensor):
        (placement,), mesh = local.placements, local.device_mesh
        assert isinstance(placement, Shard)
        local = local.to_local()
        first = mesh.get_local_rank() * local.shape[placement.dim]
        if placement.dim == 0:
            slot -= first
            if not 0 <= slot < len(local):
                return
        else:
            gradient = gradient.narrow(placement.dim - 1, first, local.shape[placement.dim])
    local[slot] += gradient.to(local.dtype)
