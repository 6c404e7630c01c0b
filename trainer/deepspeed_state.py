"""Masters and moments that ZeRO has split over ranks, as the tensors of our checkpoints.

A rank holds a piece of some parameters, cut from their elements in order, in flat tensors that
DeepSpeed owns. Whole tensors are gathered one by one to be saved; to load, a rank reads those of
which it holds a piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from trainer.checkpoint_files import MODEL, OPTIMIZER
from trainer.state import buffers, expert_slices, layout_of, parameters
from trainer.training_state import (
    create_optimizer_state,
    optimizer_numbers,
    set_optimizer_numbers,
)


class Piece(NamedTuple):
    """What this rank holds of one parameter.

    Attributes:
        start: in the parameter's elements. values: masters and moments by prefix of their keys,
            flat, as views; empty tensors if it holds none.
    """

    start: int
    values: dict[str, Tensor]


class ZeroState:
    """The training state of a model under DeepSpeed's ZeRO; see `TrainingState`.

    Args:
        zero: DeepSpeed's engine. origin: the group that each of its groups was part of.
    """

    def __init__(self, zero: Any, model: nn.Module, mesh: ParallelMesh, origin: list[int]) -> None:
        self.model, self.mesh, self.origin = model, mesh, origin
        self.zero = zero.optimizer
        self.inner: torch.optim.Optimizer = zero.optimizer.optimizer
        self.stage = zero.zero_optimization_stage()

    def layout(self) -> dict[str, Tensor]:
        """The whole model on the meta device; masters are fp32 whatever it computes in."""
        layout: dict[str, Tensor] = {}
        for name, parameter, layer in parameters(self.model):
            layout.update(layout_of(name, shape_of(parameter), torch.float32, layer))
        layout.update({name: buffer.to("meta") for name, buffer in buffers(self.model)})
        return layout

    @torch.no_grad()
    def tensors(self, copy: bool) -> dict[str, Tensor]:
        """Everything, gathered into CPU memory; what several ranks could save, one of them does.

        Args:
            copy: always done.
        """
        self._create_moments()
        state: dict[str, Tensor] = {}
        for index, (name, parameter, layer) in enumerate(parameters(self.model)):
            group = self.mesh.dp_group if layer is None else self.mesh.edp_group
            for prefix, whole in self._gathered(parameter, group).items():
                if index % dist.get_world_size(group) == dist.get_rank(group):
                    state.update(_keyed(prefix, name, whole.cpu(), layer))
        state |= {MODEL + name: buffer.cpu().clone() for name, buffer in buffers(self.model)}
        return state | self._numbers()

    @torch.no_grad()
    def to_fill(self) -> dict[str, Tensor]:
        """Whole tensors in CPU memory, those of which this rank holds a piece."""
        self._create_moments()
        state: dict[str, Tensor] = {}
        for name, parameter, layer in parameters(self.model):
            for prefix, value in self._piece(parameter).values.items():
                if len(value):
                    state.update(_keyed(prefix, name, whole_like(parameter, "cpu"), layer))
        state |= {MODEL + name: buffer for name, buffer in buffers(self.model)}
        return state | self._numbers()

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter, layer in parameters(self.model):
            start, values = self._piece(parameter)
            for prefix, value in values.items():
                if len(value):
                    keys = _keyed(prefix, name, whole_like(parameter, "meta"), layer)
                    parts = [tensors[key].flatten() for key in keys]
                    value.copy_(torch.cat(parts)[start : start + len(value)])
        rates = tensors[f"{OPTIMIZER}lr"][self.origin]
        set_optimizer_numbers(self.inner, {**tensors, f"{OPTIMIZER}lr": rates})
        self._refresh_parameters()

    def _numbers(self) -> dict[str, Tensor]:
        numbers = optimizer_numbers(self.inner)
        rates = torch.empty(max(self.origin) + 1, dtype=torch.float64)
        rates[self.origin] = numbers["lr"]
        return {OPTIMIZER + key: value for key, value in {**numbers, "lr": rates}.items()}

    def _gathered(self, parameter: nn.Parameter, group: dist.ProcessGroup) -> dict[str, Tensor]:
        """Whole master and moments of a parameter, by prefix, on every rank of its group."""
        start, values = self._piece(parameter)
        gathered = {}
        for prefix, value in values.items():
            whole = whole_like(parameter, self.mesh.device).zero_()
            whole.view(-1)[start : start + len(value)] = value.to(whole.device)
            dist.all_reduce(whole, group=group)  # zeros elsewhere: exact
            gathered[prefix] = whole
        return gathered

    def _piece(self, parameter: Any) -> Piece:
        """Of a master and its moments, which lie alike in flat tensors."""
        if self.stage == 3:
            index, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.zero._get_param_partition_rank(parameter) * size
            size = max(0, min(size, parameter.ds_numel - start))  # the last pieces are padded
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            index, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        else:
            index, offset, start, size = 0, 0, 0, 0
        master = self._masters()[index]
        flat = {MODEL: master.detach()} | {
            f"{OPTIMIZER}{field}.": value
            for field, value in self.inner.state.get(master, {}).items()
            if value.dim()
        }
        return Piece(
            start, {prefix: value[offset : offset + size] for prefix, value in flat.items()}
        )

    def _masters(self) -> list[Tensor]:
        """The flat tensors that the inner optimizer updates."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.single_partition_of_fp32_groups

    def _create_moments(self) -> None:
        """As the first step would; DeepSpeed keeps gradients beside masters that it offloads."""
        masters = self._masters()
        gradients = [master.grad for master in masters]
        if self.stage == 3:  # between steps the inner optimizer has no parameters
            self.zero._set_fp32_optimizer_param_groups()
        create_optimizer_state(self.inner)
        if self.stage == 3:
            self.zero._clear_fp32_optimizer_param_groups()
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient

    def _refresh_parameters(self) -> None:
        """Give the model the masters' values, as after a step."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for index in range(len(self._masters())):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        whole = self.zero.persistent_parameters
        if whole:
            whole[0].all_gather(whole)


def shape_of(parameter: Any) -> torch.Size:
    """Of the parameter, also while ZeRO 3 has taken its elements away."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def whole_like(parameter: nn.Parameter, device: torch.device | str) -> Tensor:
    """An uninitialised tensor for a whole master or moment."""
    return torch.empty(shape_of(parameter), dtype=torch.float32, device=device)


def _keyed(
    prefix: str, name: str, whole: Tensor, layer: ExpertParallel | None
) -> dict[str, Tensor]:
    """A parameter or a moment by its key, a stack of experts one by one; views."""
    parts = {name: whole} if layer is None else expert_slices(name, whole, layer)
    return {prefix + key: part for key, part in parts.items()}
