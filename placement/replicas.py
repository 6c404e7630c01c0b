"""Copies of busy experts: which ranks hold them besides home, as a table, layer by layer.

L MoE layers, E experts, R ranks, N (expert, rank) pairs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from placement.table import ExpertPlacement
from placement.topology import Topology

FORMAT = 1
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Replicas:
    """Copies of experts besides their homes, chosen for one placement.

    Attributes:
        placement: where the experts lived when the copies were chosen.
        copies_LN2: of every layer int64 [N, 2], pairs (expert, rank), sorted.

    Raises:
        ValueError: for another number of layers, and for a copy that is repeated, at its expert's
            home, or outside the experts or ranks.
    """

    placement: ExpertPlacement
    copies_LN2: tuple[Ints, ...]

    def __post_init__(self) -> None:
        placement = self.placement
        if len(self.copies_LN2) != placement.num_layers:
            raise ValueError(
                f"replicas: copies of {len(self.copies_LN2)} layers for a placement of "
                f"{placement.num_layers}; give both the same"
            )
        for layer, copies_N2 in enumerate(self.copies_LN2):
            problem = _problem(copies_N2, placement.home_LE[layer].numpy(), placement.num_ranks)
            if problem:
                raise ValueError(f"replicas: layer {layer} {problem}")

    @property
    def slots(self) -> int:
        """The most copies that one rank holds of a layer."""
        ranks = [copies_N2[:, 1] for copies_N2 in self.copies_LN2]
        return max((int(np.bincount(rank_N).max(initial=0)) for rank_N in ranks), default=0)

    def of_layer(self, layer: int, home_E: Ints, num_ranks: int) -> Ints:
        """Copies of a layer, int64 [N, 2]; those that are at home by now are left out.

        Raises:
            ValueError: for a layer, or a number of experts or ranks, that the table does not have.
        """
        mine = (self.placement.num_experts, self.placement.num_ranks)
        if not 0 <= layer < self.placement.num_layers or (len(home_E), num_ranks) != mine:
            raise ValueError(
                f"the replicas are of {self.placement.num_layers} MoE layers x {mine[0]} experts "
                f"on {mine[1]} ranks, but layer {layer} has {len(home_E)} experts on {num_ranks}; "
                f"choose them anew for this model"
            )
        copies_N2 = self.copies_LN2[layer]
        return copies_N2[home_E[copies_N2[:, 0]] != copies_N2[:, 1]]

    def check_fit(self, topology: Topology, within_node: bool = False) -> None:
        """Refuse other ranks, and with `within_node` copies off the node of their expert's home.

        Raises:
            ValueError: naming both.
        """
        if self.placement.num_ranks != topology.num_ranks:
            raise ValueError(
                f"the replicas are for {self.placement.num_ranks} ranks, the expert-parallel group "
                f"has {topology.num_ranks}; choose them anew for this one"
            )
        node_R = np.array(topology.node_of_R)
        for layer, copies_N2 in enumerate(self.copies_LN2 if within_node else ()):
            expert_N, rank_N = copies_N2.T
            home_N = self.placement.home_LE[layer].numpy()[expert_N]
            for expert, rank in copies_N2[node_R[home_N] != node_R[rank_N]].tolist():
                raise ValueError(
                    f"the replicas have expert {expert} of layer {layer} on rank {rank}, off its "
                    f"home's node; choose them with within_node, or set it to false"
                )

    def digest(self) -> str:
        """SHA-256 of homes and copies: equal on two ranks if and only if their tables are."""
        text = json.dumps([self.placement.digest(), self._lists()])
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, with its digest."""
        content = {
            "format": FORMAT,
            "num_ranks": self.placement.num_ranks,
            "home": self.placement.home_LE.tolist(),
            "copies": self._lists(),
            "digest": self.digest(),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Replicas:
        """Read a table written by `save`.

        Raises:
            ValueError: if the file is not one of replicas, is of a newer format or was changed.
        """
        try:
            content = json.loads(Path(path).read_text())
            newer = content["format"] > FORMAT
            home_LE = torch.tensor(content["home"], dtype=torch.int64)
            num_ranks, digest = content["num_ranks"], content["digest"]
            copies = [np.array(pairs, np.int64).reshape(-1, 2) for pairs in content["copies"]]
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"replicas {path}: not a readable replicas file ({error})") from error
        if newer:
            raise ValueError(
                f"replicas {path}: format {content['format']} is newer than {FORMAT}, the newest "
                f"this version reads; update Evenkeel"
            )
        try:
            replicas = cls(ExpertPlacement(home_LE, num_ranks), tuple(copies))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; restore the file") from error
        if replicas.digest() != digest:
            raise ValueError(
                f"replicas {path}: the table does not match its digest; restore the file"
            )
        return replicas

    def _lists(self) -> list[list[list[int]]]:
        return [copies_N2.tolist() for copies_N2 in self.copies_LN2]


def _problem(copies_N2: Ints, home_E: Ints, num_ranks: int) -> str:
    """What is wrong with a layer's copies; empty if nothing is."""
    if copies_N2.dtype != np.int64 or copies_N2.ndim != 2 or copies_N2.shape[1] != 2:
        return f"must be int64 [copies, 2], got {copies_N2.dtype} of shape {copies_N2.shape}"
    before = (-1, -1)
    for expert, rank in copies_N2.tolist():
        if not (0 <= expert < len(home_E) and 0 <= rank < num_ranks):
            return f"names expert {expert} on rank {rank}, of {len(home_E)} and {num_ranks}"
        if home_E[expert] == rank:
            return f"has a copy of expert {expert} at its home, rank {rank}"
        if (expert, rank) <= before:
            return f"has expert {expert} on rank {rank} twice or out of order"
        before = expert, rank
    return ""
