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
from trainer.durable import sha256
from trainer.hf_checkpoint import HFCheckpoint
from trainer.hf_format import HFFormat
from trainer.upcycle.alike import check_alike, shape_of
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.layout import Layout, Matrix
from trainer.upcycle.recipe import LayerFFN, Recipe
from trainer.upcycle.routers import RouterInit
from trainer.upcycle.targets import Target

LAYER = re.compile(r"model\.layers\.(\d+)\.mlp\.(.+)")
EXPERT = re.compile(r"experts\.(\d+)\.(gate_up_proj|down_proj)")
SHARED = re.compile(r"(\w+)\.(gate|up|down)_proj\.weight")
BLOCK = 1 << 18  # values of a mean that are in memory in fp32 at a time
GATED = 2.0  # a sigmoid of 0 halves


class UpcycledModel:
    """Reads like a checkpoint of the MoE that a recipe makes of dense models.

    Tensors that no recipe changes keep their bytes; others are computed in fp32 and rounded once.
    They depend on the seed and their own name alone.

    Args:
        models: dense, of one architecture; as many as the recipe is for.

    Attributes:
        config: of the MoE.

    Raises:
        ValueError: for models that differ in more than their weights, for another number of them,
            and for a target without place for one of their tensors.
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
        self.seed, self.routing = seed, routing
        check_alike(models)
        self.layout: Layout = recipe.layout(shape_of(models))
        if len(models) != self.layout.num_models:
            raise ValueError(
                f"source: recipe={type(recipe).__name__.lower()} takes one model, not "
                f"{len(models)}; recipe=merge and innovator take several"
            )
        self.config: Any = target.config(models[0], self.layout, routing)
        own = target.has_factor and scale is Scale.auto
        self.factor = 1.0 if own else self.layout.factor(routing)
        if target.has_factor and not own:
            self.config.routed_scaling_factor = 1.0
        self.scale = scale
        self._form = HFFormat(self.config)
        self._refuse_lost()
        recipe.check(models)
        router.check(models, self.layout.num_rows)

    @property
    def checkpoints(self) -> list[HFCheckpoint]:
        """What the model is made of; the tokenizer is the first one's."""
        return [model.checkpoint for model in self.models]

    @property
    def family(self) -> str:
        return self.target.family

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense files."""
        return self.models[0].dtype

    @property
    def experts(self) -> str:
        """In words."""
        layout = self.layout
        shared = f", shared expert of {layout.shared_width}" if layout.shared_width else ""
        return f"{layout.num_experts} of width {layout.width}, top {layout.top_k}{shared}"

    @property
    def inexact(self) -> str:
        """Why the MoE does not begin as the dense model did; empty if it does."""
        return self.layout.inexact_for(self.routing, self.router.scores, self._whole_groups)

    @property
    def scores_collide(self) -> bool:
        """Whether plain transformers, run in bf16, give some tokens parts of several copies."""
        one_row_each = self.layout.num_rows == self.layout.num_experts
        return not (one_row_each or self._whole_groups or self.target.fp32_scores)

    @property
    def _whole_groups(self) -> bool:
        return bool(getattr(self.config, "n_group", 1) > 1)

    def noted(self) -> dict[str, Any]:
        """What was chosen, for the receipt, and the hashes of files besides the sources."""
        files = [*self.recipe.files, *self.router.files]
        hashes = {str(path): sha256(path) for path in files}
        factor = self.layout.factor(self.routing)
        return {"target": self.family, "factor": factor, "other_files": hashes}

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
        """The first dense model's own, or the mean of all."""
        first = self.models[0]
        if key not in first.names():
            assert key.endswith(".bias"), key
            return torch.zeros(self._form.parameters[key].shape)
        shape = self._form.parameters[key].shape
        averaged = self.models if self.layout.averages else self.models[:1]
        return self.target.convert(key, mean(averaged, key, shape), self.config)

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


def mean(models: Sequence[DenseModel], key: str, shape: torch.Size) -> Tensor:
    """Of a tensor of all models, in fp32 and rounded once; a block of rows at a time."""
    if len(models) == 1:
        return models[0].tensor(key)
    rows = max(1, BLOCK * shape[0] // shape.numel())
    blocks = [slice(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]
    made = torch.empty(shape, dtype=models[0].tensor(key, slice(0, 1)).dtype)
    for block in blocks:
        total = models[0].tensor(key, block).to(torch.float32, copy=True)
        for model in models[1:]:
            total += model.tensor(key, block)
        made[block] = total / len(models)
    return made


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Multiplied in fp32 and rounded once; the tensor itself for 1."""
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)
