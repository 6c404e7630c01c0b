"""Where experts live: a table, layer x expert -> home rank."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FORMAT = 1


@dataclass(frozen=True)
class Move:
    """One expert of one layer changing its home."""

    layer: int
    expert: int
    source: int
    destination: int


@dataclass(frozen=True)
class ExpertPlacement:
    """The home rank of every expert of every MoE layer.

    Shapes: L MoE layers, E experts per layer, R ranks of the expert-parallel group.
    Every rank is home to exactly E/R experts of a layer; a rank's slots hold them in
    ascending order of expert id.

    Raises:
        ValueError: if a row is not an even split of the experts over the ranks.
    """

    home_LE: Tensor
    num_ranks: int

    def __post_init__(self) -> None:
        home_LE, num_ranks = self.home_LE, self.num_ranks
        if home_LE.dim() != 2 or home_LE.dtype != torch.int64:
            raise ValueError(
                f"placement.home_LE must be an int64 table [layers, experts], got "
                f"{home_LE.dtype} of shape {tuple(home_LE.shape)}"
            )
        num_layers, num_experts = home_LE.shape
        if num_ranks < 1 or num_experts % num_ranks:
            raise ValueError(
                f"placement.num_ranks ({num_ranks}) must divide the number of experts "
                f"({num_experts}); choose another expert-parallel size"
            )
        for layer in range(num_layers):
            row = home_LE[layer]
            if int(row.min()) < 0 or int(row.max()) >= num_ranks:
                raise ValueError(
                    f"placement: layer {layer} names a rank outside 0..{num_ranks - 1}"
                )
            per_rank = torch.bincount(row, minlength=num_ranks)
            if bool((per_rank != num_experts // num_ranks).any()):
                raise ValueError(
                    f"placement: layer {layer} gives the ranks {per_rank.tolist()} experts; "
                    f"each must be home to exactly {num_experts // num_ranks}"
                )

    @classmethod
    def contiguous(cls, num_layers: int, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Neighbouring experts share a home: rank r is home to experts r*E/R .. (r+1)*E/R - 1."""
        if num_ranks < 1 or num_experts % num_ranks:
            raise ValueError(
                f"mesh.ep ({num_ranks}) must divide the number of experts ({num_experts})"
            )
        row_E = torch.arange(num_experts) // (num_experts // num_ranks)
        return cls(row_E.expand(num_layers, num_experts).clone(), num_ranks)

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
        return self.home_LE.shape[0]

    @property
    def num_experts(self) -> int:
        """E, the number of experts in a layer."""
        return self.home_LE.shape[1]

    def experts_of(self, layer: int, rank: int) -> list[int]:
        """Experts of a layer at home on a rank, in slot order (ascending id)."""
        return (self.home_LE[layer] == rank).nonzero().flatten().tolist()

    def moves_to(self, other: ExpertPlacement) -> list[Move]:
        """Moves that turn this placement into the other, by layer and expert.

        Raises:
            ValueError: if the two tables differ in layers, experts or ranks.
        """
        if self.home_LE.shape != other.home_LE.shape or self.num_ranks != other.num_ranks:
            raise ValueError(
                f"cannot move from a placement of {tuple(self.home_LE.shape)} on {self.num_ranks} "
                f"ranks to one of {tuple(other.home_LE.shape)} on {other.num_ranks}"
            )
        changed = (self.home_LE != other.home_LE).nonzero().tolist()
        return [
            Move(layer, expert, int(self.home_LE[layer, expert]), int(other.home_LE[layer, expert]))
            for layer, expert in changed
        ]

    def digest(self) -> str:
        """SHA-256 of the table: equal on two ranks if and only if their placements are."""
        text = json.dumps([self.num_ranks, self.home_LE.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, with its digest."""
        content = {
            "format": FORMAT,
            "num_ranks": self.num_ranks,
            "home": self.home_LE.tolist(),
            "digest": self.digest(),
        }
        Path(path).write_text(json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ExpertPlacement:
        """Read a table written by `save`.

        Raises:
            ValueError: if the file is not a placement, is of a newer format or was changed.
        """
        try:
            content = json.loads(Path(path).read_text())
            newer = content["format"] > FORMAT
            home, num_ranks, digest = content["home"], content["num_ranks"], content["digest"]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"placement {path}: not a readable placement file ({error})"
            ) from error
        if newer:
            raise ValueError(
                f"placement {path}: format {content['format']} is newer than {FORMAT}, the newest "
                f"this version reads; update Evenkeel"
            )
        placement = cls(torch.tensor(home, dtype=torch.int64), num_ranks)
        if placement.digest() != digest:
            raise ValueError(
                f"placement {path}: the table does not match its digest; restore the file"
            )
        return placement
