"""Routers: another choice of experts by the logits of the family's own router.

T tokens on this rank, K choices, E experts, D hidden width, L MoE layers.

A router is a hook on the family's own: parameters, their names and checkpoints stay as they are,
and whatever reads (logits, weights, ids) behind it, balancers and experts, sees its choice. The id
E means "no expert": such a choice is not sent, not computed and adds nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, router_of
from trainer.balance.base import Balancer, joined
from trainer.balance.bias import selection_bias
from trainer.export import TensorSource
from trainer.routers.family import Family


class Router(Balancer):
    """Chooses experts; the same object for all layers.

    Attributes:
        step: of the optimizer, from 1. passes: of every layer in it, counted by `next_pass`.
        num_positions: of the global batch.
        looks_ahead: a token's experts depend on later tokens of its sequence.
        is_coupled: they depend on other sequences of the micro-batch.
        exports: plain transformers choose alike in evaluation.
        normalises: weights of a token sum to 1 in families where they do; else they never do.
        replaces_weights: the family's router weights take no part, and stay as they are.
    """

    looks_ahead = False
    is_coupled = False
    exports = False
    normalises = True
    replaces_weights = False
    step = 1
    num_positions = 1

    def prepare(self, model: nn.Module, mesh: ParallelMesh) -> None:
        """Look at the model, which may be on the meta device.

        Raises:
            ValueError: for a family or sizes that it cannot be used with.
        """
        self.family, self.mesh = Family.of(model), mesh
        self.passes: dict[int, int] = {}
        self.check(self.family)

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        """Take the place of the model's routers; once, before balancers and before sharding."""
        self.prepare(model, mesh)
        for layer, (_, block) in enumerate(moe_blocks(model)):
            own = router_of(block)
            assert own is not None  # Family.of has seen it
            own.register_forward_hook(partial(self._replace, layer=layer, block=block))

    def before_step(self, num_positions: int) -> None:
        self.passes, self.num_positions = {}, num_positions

    def after_step(self, counts_LE: Tensor) -> dict[str, float]:
        self.step += 1
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def check(self, family: Family) -> None:
        """Refuse sizes that it cannot be used with.

        Raises:
            ValueError: naming key, value and bound.
        """

    def experts_per_token(self, counts_LE: Tensor) -> float:
        """Of the global batch, in the mean."""
        return float(counts_LE.sum()) / (len(counts_LE) * self.num_positions)

    def next_pass(self, layer: int) -> int:
        """The number of this micro-batch in the step, from 0; call once per forward."""
        self.passes[layer] = self.passes.get(layer, -1) + 1
        return self.passes[layer]

    def exported(self, tensors: TensorSource) -> TensorSource:
        """The tensors that plain transformers need to choose alike, by logical key."""
        return tensors

    @abstractmethod
    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        """Expert ids, int64 [T, K], E for "no expert".

        Args:
            scores_TE: that weights are made of. chosen_by_TE: the same, plus the selection bias
                where the family has one; without gradient.
        """

    def logits(self, layer: int, hidden_TD: Tensor, logits_TE: Tensor) -> Tensor:
        """Of every expert [T, E], and of further choices that need no dispatch after them.

        Args:
            hidden_TD: the router's input. logits_TE: the family's own.
        """
        return logits_TE

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Of every expert, that weights are made of; float32 or float64 [T, E]."""
        return self.family.scores(logits_TE)

    def weigh(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Weights of the chosen experts [T, K]."""
        return self.family.weights(scores_TE, ids_TK, self.normalises)

    def loss(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor | None:
        """This rank's share of a loss of the router's own, of one layer in a micro-batch."""
        return None

    def _replace(
        self,
        own: nn.Module,
        inputs: Any,
        output: tuple[Tensor, Tensor, Tensor],
        layer: int,
        block: nn.Module,
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_TE, own_TK, _ = output
        logits_TE = self.logits(layer, inputs[0].flatten(0, -2), own_TE)
        scores_TE = self.scores(logits_TE)
        chosen_by_TE, bias = scores_TE.detach(), selection_bias(block)
        num_experts = self.family.num_experts
        if bias is not None:
            bias = bias.to(chosen_by_TE.dtype).view(-1)
            chosen_by_TE = chosen_by_TE + F.pad(bias, (0, scores_TE.shape[1] - num_experts))
        ids_TK = self.choose(layer, scores_TE, chosen_by_TE, own.training)
        weights_TK = self.weigh(scores_TE, ids_TK).to(own_TK.dtype)
        loss = self.loss(scores_TE, ids_TK) if own.training else None
        if loss is not None:
            weights_TK = joined(weights_TK, loss)
        return logits_TE[:, :num_experts], weights_TK, ids_TK.clamp(max=num_experts)


class Native(Router):
    """The family's own."""

    exports = True

    def prepare(self, model: nn.Module, mesh: ParallelMesh) -> None:
        pass

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        pass

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        raise AssertionError("the family's own router chooses")


def input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Token ids [T] of a call of a model."""
    ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    return ids.flatten()


def check_positive(key: str, value: float) -> None:
    """Refuse what is not above 0.

    Raises:
        ValueError: naming key and value.
    """
    if not value > 0:
        raise ValueError(f"{key} ({value}) must be > 0")
