"""The upcycled model: every tensor made when it is asked for, from the dense files.

N routed experts, H hidden, f neurons of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from configs.upcycle_schema import Routing, Scale
from trainer.hf_format import HFFormat
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.layout import Layout, Matrix
from trainer.upcycle.recipe import LayerFFN, Recipe
from trainer.upcycle.routers import RouterInit
from trainer.upcycle.targets import Target

LAYER = re.compile(r"model\.layers\.(\d+)\.mlp\.(.+)")
EXPERT = re.compile(r"experts\.(\d+)\.(gate_up_proj|down_proj)")
SHARED = re.compile(r"(\w+)\.(gate|up|down)_proj\.weight")
GATED = 2.0  # a sigmoid of 0 halves


class UpcycledModel:
    """Reads like a checkpoint of the MoE that a recipe makes of dense models.

    Tensors that no recipe changes keep their bytes; others are computed in fp32 and rounded once.
    They depend on the seed and their own name alone.

    Args:
        models: dense, of one architecture; tensors outside the FFN are the mean of theirs.

    Attributes:
        config: of the MoE.
    """

    def __init__(
        self,
        models: Sequence[DenseModel],
        recipe: Recipe,
        target: Target,
        *,
        routing: Routing = Routing.renormalised,
        scale: Scale = Scale.auto,
        router: RouterInit,
        seed: int = 0,
    ) -> None:
        self.models, self.recipe, self.target, self.router = models, recipe, target, router
        self.seed = seed
        self.layout: Layout = recipe.layout(models[0].shape)
        self.config: Any = target.config(models[0], self.layout, routing)
        own = target.has_factor and scale is Scale.auto
        self.factor = 1.0 if own else self.layout.factor(routing)
        if target.has_factor and not own:
            self.config.routed_scaling_factor = 1.0
        self.scale = scale
        self._form = HFFormat(self.config)
        self._refuse_lost()

    def logical_keys(self) -> list[str]:
        """Every key that `read` knows."""
        return list(self._form.parameters)

    keys = logical_keys

    def __getitem__(self, key: str) -> Tensor:
        return self.read(key)

    def read(self, key: str) -> Tensor:
        """A tensor of the MoE by its logical key, in the dtype of the dense files."""
        match = LAYER.fullmatch(key)
        if match is None:
            return self._copied(key)
        layer, name = int(match.group(1)), match.group(2)
        ffn = LayerFFN(self.models, layer, self.seed)
        if expert := EXPERT.fullmatch(name):
            return self._expert(ffn, int(expert.group(1)), expert.group(2))
        if name == "gate.weight":
            rows = self.router.rows(ffn, self.layout.num_rows)
            return rows[torch.tensor(self.layout.row_of_N)]
        extra = self.target.extra(key, self._form.parameters[key].shape)
        if extra is not None:
            return extra
        shared = SHARED.fullmatch(name)
        assert shared is not None and shared.group(1) == self.target.shared, key
        return self._shared(ffn, Matrix(shared.group(2)))

    def _expert(self, ffn: LayerFFN, expert: int, name: str) -> Tensor:
        if name == "down_proj":
            down = self.recipe.expert(ffn, expert, Matrix.down)
            return scaled(down, self.factor**0.5 if self._spreads else self.factor)
        gate, up = (self.recipe.expert(ffn, expert, m) for m in (Matrix.gate, Matrix.up))
        return torch.cat([gate, scaled(up, self.factor**0.5) if self._spreads else up])

    @property
    def _spreads(self) -> bool:
        return self.scale is not Scale.down

    def _shared(self, ffn: LayerFFN, matrix: Matrix) -> Tensor:
        if not self.layout.shared_width:
            taken = ffn.take(matrix, slice(0, 0))
            return taken.contiguous()
        tensor = self.recipe.shared(ffn, matrix)
        gated = self.target.shared_gate and matrix is Matrix.down
        return scaled(tensor, GATED) if gated else tensor

    def _copied(self, key: str) -> Tensor:
        """The dense model's own; of several the mean."""
        first = self.models[0]
        if key not in first.names():
            assert key.endswith(".bias"), key
            return torch.zeros(self._form.parameters[key].shape)
        tensor = first.tensor(key)
        if len(self.models) > 1:
            total = tensor.to(torch.float32, copy=True)
            for model in self.models[1:]:
                total += model.tensor(key)
            tensor = (total / len(self.models)).to(tensor.dtype)
        return self.target.convert(key, tensor, self.config)

    def _refuse_lost(self) -> None:
        """Every tensor of the dense model must be in the MoE.

        Raises:
            ValueError: naming the first that is not.
        """
        lost = self.models[0].names() - set(self._form.parameters)
        lost = {name for name in lost if not (name.endswith(".bias") and self._is_zero(name))}
        if lost:
            raise ValueError(
                f"{self.target.family} has no place for {len(lost)} tensors of "
                f"{self.models[0].config.model_type}, first {sorted(lost)[0]}"
            )

    def _is_zero(self, name: str) -> bool:
        return not self.models[0].tensor(name).any()


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Multiplied in fp32 and rounded once; the tensor itself for 1."""
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)
