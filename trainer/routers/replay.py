"""Routing replay: choices from a file, weights from the current logits.

T tokens on this rank, L MoE layers, K choices, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parallel.decisions import once
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks
from placement.trace import Trace, load_trace
from trainer.routers.base import Router, input_ids


class Replay(Router):
    """The experts that a recorded run chose for the same tokens (routing replay, as in
    arXiv:2510.11370).

    A run with train.record_routing_every=1 writes a file per step. Steps, batches and ranks must be
    the recorded ones, which every micro-batch's token ids prove; planner, placement, dispatcher and
    precision may differ. Evaluation chooses as the family does.

    Args:
        path: folder of the recorded run's files, a step each (its run.dir/routing).
    """

    exports = True

    def __init__(self, path: str | None = None) -> None:
        if path is None or not Path(path).is_dir():
            raise ValueError(
                f"router.path ({path}) must be the folder routing/ of a run that was made with "
                f"train.record_routing_every=1"
            )
        self.path = Path(path)

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        self.num_layers = len(moe_blocks(model))
        model.register_forward_pre_hook(self._note_tokens, with_kwargs=True)

    def before_step(self, num_positions: int) -> None:
        super().before_step(num_positions)
        self.mine = self._load(self.path / f"step-{self.step:08d}.npz")

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        if not training:
            return chosen_by_TE.topk(self.family.top_k).indices
        number = once(lambda: self.next_pass(layer))
        tokens = slice(number * len(self.token_T), (number + 1) * len(self.token_T))
        if layer == 0:
            self._check_tokens(number, tokens)
        ids_TK = torch.from_numpy(self.mine.ids_TLK[tokens, layer].astype(np.int64))
        return ids_TK.to(chosen_by_TE.device)

    def _load(self, file: Path) -> Trace:
        """This rank's tokens of a step.

        Raises:
            ValueError: for a file that is missing, torn, or of another model.
        """
        if not file.is_file():
            raise ValueError(
                f"router=replay: {file} is missing; step {self.step} was not recorded, record with "
                f"train.record_routing_every=1"
            )
        trace = load_trace(file)
        recorded = trace.num_layers, trace.num_experts, trace.top_k
        here = self.num_layers, self.family.num_experts, self.family.top_k
        if recorded != here or trace.source_T is None or trace.token_T is None:
            raise ValueError(
                f"router=replay: {file} is of a model with (layers, experts, choices) = "
                f"{recorded}, this one has {here}"
            )
        return trace.take(trace.source_T == self.mesh.rank)

    def _check_tokens(self, number: int, tokens: slice) -> None:
        """Refuse another batch than the recorded one.

        Raises:
            ValueError: naming step, micro-batch and rank.
        """
        assert self.mine.token_T is not None
        recorded_T = self.mine.token_T[tokens]
        if not np.array_equal(recorded_T, self.token_T):
            raise ValueError(
                f"router=replay: micro-batch {number} of step {self.step} on rank "
                f"{self.mesh.rank} has other tokens than the recorded one; use the same data, "
                f"seed, ranks and train.micro_batch_size"
            )

    def _note_tokens(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.token_T = input_ids(args, kwargs).cpu().numpy()
