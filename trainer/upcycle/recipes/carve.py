"""The neurons of a dense FFN dealt out to smaller experts: less computed per token than before.

At random or by balanced k-means (LLaMA-MoE, arXiv:2406.16554), or by what is active together on
text (CMoE, arXiv:2502.04416).

n neurons, t tokens, H hidden, N clusters, K marks of a token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from placement.batches import assign_by_cost
from trainer.upcycle.calibration import Tokens, ffn_inputs, text_tokens
from trainer.upcycle.clusters import balanced_kmeans
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.layout import DenseShape, Layout, Matrix, check_choice, check_experts
from trainer.upcycle.recipe import LayerFFN, Recipe

METHODS = ("random", "kmeans", "activation")
ROWS = ("up", "gate")
ROUNDS = 20  # of k-means, at most


@dataclass(frozen=True)
class Carve(Recipe):
    """Every neuron in one expert.

    Args:
        num_experts: routed experts, all of one width. top_k: of them per token.
        method: random; kmeans: neurons with similar rows together; activation: neurons that are
            active on the same tokens together.
        shared_experts: widths of a routed expert that the shared expert has, of the neurons that
            are active most often (activation).
        rows: that kmeans compares, up or gate.
        calibration: text file (activation). sequences: of it that are read. length: of one, in
            tokens. marks: neurons that count as active on a token.
    """

    num_experts: int = 8
    top_k: int = 2
    method: str = "random"
    shared_experts: int = 0
    rows: str = "up"
    calibration: str | None = None
    sequences: int = 8
    length: int = 512
    marks: int = 10

    def layout(self, dense: DenseShape) -> Layout:
        check_experts(self.num_experts, self.top_k)
        check_choice("recipe.method", self.method, METHODS)
        check_choice("recipe.rows", self.rows, ROWS)
        self._check_activation(dense)
        pieces = self.num_experts + self.shared_experts
        if dense.width % pieces:
            raise ValueError(
                f"recipe.num_experts ({self.num_experts}) + recipe.shared_experts "
                f"({self.shared_experts}) must divide the number of neurons ({dense.width})"
            )
        width = dense.width // pieces
        some = f"a token reaches the neurons of {self.top_k} of {self.num_experts} experts"
        return Layout(
            self.num_experts,
            self.top_k,
            width=width,
            row_of_N=tuple(range(self.num_experts)),
            shared_width=self.shared_experts * width,
            parts=self.num_experts,
            inexact=some if self.top_k < self.num_experts else "",
        )

    @property
    def files(self) -> list[Path]:
        return [Path(self.calibration)] if self.calibration else []

    def check(self, models: Sequence[DenseModel]) -> None:
        if self.method == "activation":
            self.text(models[0])

    def text(self, model: DenseModel) -> Tokens:
        """What the model is run on."""
        path, number = model.checkpoint.path, self.sequences
        return text_tokens(path, self.calibration, sequences=number, length=self.length)

    def expert(self, ffn: LayerFFN, expert: int, matrix: Matrix) -> Tensor:
        return ffn.take(matrix, self._neurons(ffn)[expert])

    def shared(self, ffn: LayerFFN, matrix: Matrix) -> Tensor:
        return ffn.take(matrix, self._neurons(ffn)[-1])

    def _neurons(self, ffn: LayerFFN) -> list[Tensor]:
        return neurons(self, ffn.models[0], ffn.layer, ffn.seed)

    def _check_activation(self, dense: DenseShape) -> None:
        if self.shared_experts < 0:
            raise ValueError(f"recipe.shared_experts ({self.shared_experts}) must be >= 0")
        if self.method == "activation":
            if not self.calibration:
                raise ValueError("recipe.method=activation needs recipe.calibration=FILE.txt")
            if not 1 <= self.marks <= dense.width:
                raise ValueError(
                    f"recipe.marks ({self.marks}) must be between 1 and the number of neurons "
                    f"({dense.width})"
                )
        elif self.shared_experts or self.calibration:
            key = "shared_experts" if self.shared_experts else "calibration"
            raise ValueError(
                f"recipe.{key} ({getattr(self, key)}) is for recipe.method=activation, not "
                f"{self.method}; leave it out"
            )


@lru_cache(maxsize=1)
def neurons(recipe: Carve, model: DenseModel, layer: int, seed: int) -> list[Tensor]:
    """Ascending neurons of every routed expert of a layer, then those of the shared one.

    They depend on the weights, the seed and the layer, and for `activation` on the text. Those of
    the last layer are kept.
    """
    ffn = LayerFFN([model], layer, seed)
    width = model.shape.width
    shared_n = torch.zeros(0, dtype=torch.int64)
    routed_n = torch.arange(width)
    if recipe.method == "random":
        label_n = torch.randperm(width, generator=ffn.generator(0, "neurons")) % recipe.num_experts
    elif recipe.method == "kmeans":
        rows_nH = F.normalize(ffn.take(Matrix(recipe.rows)).double(), dim=1)
        order_n = torch.randperm(width, generator=ffn.generator(0, "centres"))
        seeds = order_n[: recipe.num_experts].numpy()
        label_n = torch.from_numpy(balanced_kmeans(rows_nH.numpy(), seeds, ROUNDS))
    else:
        marked_tK = marks(recipe, model)[layer]
        rate_n = torch.bincount(marked_tK.flatten(), minlength=width)
        order_n = rate_n.argsort(descending=True, stable=True)
        num_shared = width // (recipe.num_experts + recipe.shared_experts) * recipe.shared_experts
        shared_n, routed_n = order_n[:num_shared].sort().values, order_n[num_shared:]
        cost_nN = distances(marked_tK, width, centres=routed_n[: recipe.num_experts])[routed_n]
        label_n = torch.from_numpy(assign_by_cost(cost_nN.numpy()))
    found = [routed_n[label_n == expert].sort().values for expert in range(recipe.num_experts)]
    return [*found, shared_n]


@lru_cache(maxsize=1)
def marks(recipe: Carve, model: DenseModel) -> list[Tensor]:
    """The K neurons that are most active on every token of the text, int64 [t, K] per layer.

    The dense model is run once, whole, in the dtype of its files.
    """
    found: dict[int, list[Tensor]] = defaultdict(list)
    for layer, x_tH in ffn_inputs(model.checkpoint.path, recipe.text(model)):
        found[layer].append(activity(model, layer, x_tH).topk(recipe.marks, dim=1).indices)
    return [torch.cat(found[layer]) for layer in range(model.shape.num_layers)]


def activity(model: DenseModel, layer: int, x_tH: Tensor) -> Tensor:
    """How strongly neurons answer to the direction of a token [t, n], whatever their rows' size."""
    act: Any = ACT2FN[model.config.hidden_act]
    x_tH = F.normalize(x_tH, dim=1)
    gate_tn, up_tn = (
        F.linear(x_tH, F.normalize(model.neurons(layer, matrix, None).float(), dim=1))
        for matrix in (Matrix.gate, Matrix.up)
    )
    return (act(gate_tn) * up_tn).abs()


def distances(marked_tK: Tensor, width: int, centres: Tensor) -> Tensor:
    """On how many tokens one of neuron and centre is active, but not both: float64 [n, N]."""
    is_on_tN = (marked_tK[:, :, None] == centres).any(1).double()
    both_nN = torch.zeros(width, len(centres), dtype=torch.float64)
    for marked_t in marked_tK.unbind(1):
        both_nN.index_add_(0, marked_t, is_on_tN)
    rate_n = torch.bincount(marked_tK.flatten(), minlength=width).double()
    return rate_n[:, None] + rate_n[centres] - 2 * both_nN
