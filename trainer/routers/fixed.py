"""Baselines: routers that no parameter decides.

T tokens on this rank, K choices, E experts, V token ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel.decisions import once
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks
from trainer.routers.base import Router, input_ids


class Hash(Router):
    """Experts by token id: K random ones for each, drawn once per layer (arXiv:2106.04426), with
    equal weights.

    Args:
        seed: of the draw.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        config: Any = model.config
        self.draw(len(moe_blocks(model)), int(config.get_text_config().vocab_size), mesh.device)
        model.register_forward_pre_hook(self._note_tokens, with_kwargs=True)

    def draw(self, num_layers: int, vocab_size: int, device: torch.device) -> None:
        """Experts of every token id, [V, K] per layer."""
        self.tables = []
        for layer in range(num_layers):
            shape = vocab_size, self.family.num_experts
            draw_VE = torch.rand(shape, generator=generator(self.seed, layer))
            self.tables.append(draw_VE.topk(self.family.top_k).indices.to(device))

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        return self.tables[layer][self.token_T]

    def weigh(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        return equal_weights(scores_TE, ids_TK, self.family.factor)

    def _note_tokens(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.token_T = input_ids(args, kwargs)


class RandomChoice(Router):
    """K random experts for every token, anew in every forward pass of training (THOR,
    arXiv:2110.04260), with equal weights; in evaluation the same in every pass.

    Args:
        seed: of the draws, which depend on it, the step, the micro-batch, the layer and the rank.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        when = (self.step, once(lambda: self.next_pass(layer))) if training else (0, 0)
        source = generator(self.seed, *when, layer, self.mesh.rank)
        draw_TE = torch.rand(chosen_by_TE.shape, generator=source)
        return draw_TE.topk(self.family.top_k).indices.to(chosen_by_TE.device)

    def weigh(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        return equal_weights(scores_TE, ids_TK, self.family.factor)


def equal_weights(scores_TE: Tensor, ids_TK: Tensor, total: float) -> Tensor:
    """The same for every choice."""
    return scores_TE.new_full(ids_TK.shape, total / ids_TK.shape[1])


def generator(*key: int) -> torch.Generator:
    """Random numbers that depend on the key alone."""
    seed = 0
    for number in key:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(seed)
