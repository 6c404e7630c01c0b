"""What a recipe is given and what it makes.

H hidden, n neurons.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.upcycle.dense import DenseModel
from trainer.upcycle.layout import DenseShape, Layout, Matrix


@dataclass(frozen=True)
class LayerFFN:
    """The FFN of one layer of the dense models."""

    models: Sequence[DenseModel]
    layer: int
    seed: int

    def take(
        self, matrix: Matrix, neurons: slice | Tensor | None = None, *, model: int = 0
    ) -> Tensor:
        """Some neurons of a matrix, in the dtype of the file: [n, H], of `down` [H, n]."""
        return self.models[model].neurons(self.layer, matrix, neurons)

    def generator(self, expert: int, purpose: str) -> torch.Generator:
        """Random numbers that depend on seed, layer, expert and purpose alone."""
        return generator(self.seed, self.layer, expert, purpose)


class Recipe(ABC):
    """Turns the FFN of a layer into experts; a small dataclass whose fields are its settings."""

    @abstractmethod
    def layout(self, dense: DenseShape) -> Layout:
        """The MoE layers to be made.

        Raises:
            ValueError: for settings that do not fit the dense model, naming the key.
        """

    @abstractmethod
    def expert(self, ffn: LayerFFN, expert: int, matrix: Matrix) -> Tensor:
        """A matrix of a routed expert: [width, H], of `down` [H, width]."""

    def shared(self, ffn: LayerFFN, matrix: Matrix) -> Tensor:
        """A matrix of the shared expert, where the layout has one."""
        raise AssertionError(f"{type(self).__name__} makes no shared expert")

    @property
    def files(self) -> list[Path]:
        """That what it makes depends on, besides the models."""
        return []

    def check(self, models: Sequence[DenseModel]) -> None:  # noqa: B027 (most read no files)
        """Refuse files that cannot be used, before anything is written.

        Raises:
            ValueError: naming key, value and reason.
        """


def generator(*key: int | str) -> torch.Generator:
    """Random numbers that depend on the key alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
