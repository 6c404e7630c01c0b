"""How the rows of a new router begin.

H hidden, h dimensions of an attention head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trainer.upcycle.dense import DenseModel, head_dim
from trainer.upcycle.layout import Scores
from trainer.upcycle.recipe import LayerFFN


class RouterInit(Protocol):
    """Makes the first router of a layer."""

    @property
    def scores(self) -> Scores:
        """How far apart the scores begin."""
        ...

    @property
    def files(self) -> list[Path]:
        """That decide the rows, besides those of the models."""
        return []

    def check(self, models: Sequence[DenseModel], num_rows: int) -> None:
        """Refuse what `rows` cannot do, before anything is written.

        Raises:
            ValueError: naming key, value, bound and remedy.
        """
        return

    def advice(self, models: Sequence[DenseModel], num_rows: int) -> Iterator[str]:
        """What to know of rows that train badly."""
        yield from ()

    def rows(self, ffn: LayerFFN, num_rows: int) -> Tensor:
        """Different rows [num_rows, H], float32."""
        ...


@dataclass(frozen=True)
class Zero(RouterInit):
    """Equal scores for all experts, up to noise that breaks ties.

    Args:
        std: of the noise. 0: none, and all tokens go to the same experts.
    """

    std: float = 1e-6

    @property
    def scores(self) -> Scores:
        return Scores.close if self.std else Scores.equal

    def rows(self, ffn: LayerFFN, num_rows: int) -> Tensor:
        return normal(ffn, num_rows, self.std)


@dataclass(frozen=True)
class Random(RouterInit):
    """Normally distributed weights. Args: std: of them."""

    std: float = 0.02
    scores = Scores.free

    def rows(self, ffn: LayerFFN, num_rows: int) -> Tensor:
        return normal(ffn, num_rows, self.std)


@dataclass(frozen=True)
class QueryHeads(RouterInit):
    """Directions that the layer's own attention heads look for (after arXiv:2509.00679).

    Row r is a right singular vector of the queries' matrix of head r % heads: the leading one,
    then the second, and so on. This is where a plain linear router begins, no more: routers that
    attend, as in the paper, are none of a plain family's. The sign, which a singular vector
    leaves open, makes the largest component positive. Of several models, the first one's.

    Args:
        std: root of the mean square of a row.
    """

    std: float = 0.02
    scores = Scores.free

    def check(self, models: Sequence[DenseModel], num_rows: int) -> None:
        check_positive("router_init.std", self.std)
        config = models[0].config
        heads, size = config.num_attention_heads, min(head_dim(config), config.hidden_size)
        if num_rows > heads * size:
            raise ValueError(
                f"router_init=attention has rows for {heads * size} experts ({heads} heads x "
                f"{size}), not for {num_rows}; use router_init=random"
            )

    def rows(self, ffn: LayerFFN, num_rows: int) -> Tensor:
        model = ffn.models[0]
        heads = model.config.num_attention_heads
        query = model.tensor(f"model.layers.{ffn.layer}.self_attn.q_proj.weight")
        found: list[list[Tensor]] = []
        for query_hH in query.view(heads, -1, query.shape[1])[:num_rows]:
            directions = torch.linalg.svd(query_hH.double(), full_matrices=False).Vh
            found.append([with_sign(row_H) for row_H in directions])
        rows = [found[row % heads][row // heads] for row in range(num_rows)]
        return with_std(torch.stack(rows), self.std)


def with_sign(row_H: Tensor) -> Tensor:
    """Or its negative, so that the largest component is positive."""
    return row_H * row_H[row_H.abs().argmax()].sign()


def with_std(rows: Tensor, std: float) -> Tensor:
    """Rows [.., H] as float32, each with this root mean square."""
    root = rows.double().square().mean(-1, keepdim=True).sqrt()
    return (rows.double() * (std / root)).float()


def check_positive(key: str, value: float) -> None:
    """Refuse values that are not above 0.

    Raises:
        ValueError: naming key, value and bound.
    """
    if not value > 0:
        raise ValueError(f"{key} ({value}) must be > 0")


def normal(ffn: LayerFFN, num_rows: int, std: float) -> Tensor:
    """Row by row from generators of their own, so that a row does not depend on their number."""
    hidden = ffn.models[0].shape.hidden
    rows = [torch.randn(hidden, generator=ffn.generator(row, "router")) for row in range(num_rows)]
    return torch.stack(rows) * std
