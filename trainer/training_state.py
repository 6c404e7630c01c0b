"""What a run goes on from: model and optimizer, as tensors by key."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.checkpoint_files import MODEL, OPTIMIZER
from trainer.state import logical_layout, model_state, optimizer_state


class TrainingState(Protocol):
    """Model and optimizer as tensors by key, with the prefixes of `trainer.checkpoint_files`."""

    def layout(self) -> dict[str, Tensor]:
        """The whole model on the meta device, as `trainer.state.logical_layout`."""
        ...

    def tensors(self, copy: bool) -> dict[str, Tensor]:
        """What this rank saves; if `copy`, in CPU memory of its own."""
        ...

    def to_fill(self) -> dict[str, Tensor]:
        """What this rank loads into."""
        ...

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `to_fill` returned, now filled."""
        ...


class LiveState:
    """Training state whose tensors are the very ones that a model and an optimizer work with."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def layout(self) -> dict[str, Tensor]:
        return logical_layout(self.model)

    def tensors(self, copy: bool) -> dict[str, Tensor]:
        live = self.to_fill()
        return {key: value.to("cpu", copy=True) for key, value in live.items()} if copy else live

    def to_fill(self) -> dict[str, Tensor]:
        create_optimizer_state(self.optimizer)
        moments = optimizer_state(self.model, self.optimizer) | optimizer_numbers(self.optimizer)
        return {
            **{MODEL + key: tensor for key, tensor in model_state(self.model).items()},
            **{OPTIMIZER + key: tensor for key, tensor in moments.items()},
        }

    def take(self, tensors: dict[str, Tensor]) -> None:
        set_optimizer_numbers(self.optimizer, tensors)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | TrainingState) -> TrainingState:
    """The training state of a model and its optimizer, or the one that is given instead."""
    return (
        LiveState(model, optimizer) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    )


@torch.no_grad()
def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that the optimizer's first step makes, filled with zeros.

    Does nothing if all have it. Parameters do not change; gradients are cleared.
    """
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"] if p.requires_grad]
    if all(p in optimizer.state for p in parameters):
        return
    rates = [group["lr"] for group in groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    for values in optimizer.state.values():
        for value in values.values():
            value.zero_()


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state beside that per element: the step count, learning rate of every group.

    Raises:
        ValueError: if the step count differs between parameters.
    """
    numbers: dict[str, list[Tensor]] = {}
    for values in optimizer.state.values():
        for field, value in values.items():
            assert isinstance(value, Tensor), f"{field} = {value!r} would not be saved"
            if value.dim() == 0:
                numbers.setdefault(field, []).append(value)
    for field, values in numbers.items():
        different = torch.stack(values).unique()
        if len(different) > 1:
            raise ValueError(
                f"optimizer {type(optimizer).__name__}: {field} differs between parameters "
                f"({different.tolist()}); every parameter must take part in every step"
            )
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return {
        "lr": torch.tensor(rates, dtype=torch.float64),
        **{field: values[0].clone() for field, values in numbers.items()},
    }


def set_optimizer_numbers(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Put back what `optimizer_numbers` returned, from keys with the optimizer's prefix."""
    for group, rate in zip(optimizer.param_groups, state[f"{OPTIMIZER}lr"].tolist(), strict=True):
        group["lr"] = rate
    for values in optimizer.state.values():
        for field, value in values.items():
            if value.dim() == 0:
                value.copy_(state[OPTIMIZER + field])
