"""Routers with parameters of their own, of which the family's checkpoint knows nothing.

T tokens on this rank, E experts, D hidden width, L MoE layers, C narrow width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.decisions import is_replaying
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, router_of
from trainer.export import TensorSource
from trainer.routers.base import Router, check_positive
from trainer.routers.family import Family
from trainer.routers.fixed import generator

ROUTING = "routing"  # of the model: the module of these parameters
MIN_TEMPERATURE = 0.01


class Routing(nn.Module):
    """Parameters of the routers of all layers, in the model, sharded by themselves in fp32.

    Its forward pass, once per forward of the model, returns them whole: layers may share them.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self) -> dict[str, Tensor]:
        # copies outlive the sharding of the parameters
        return {name: value.clone() for name, value in self.named_parameters()}


class Learned(Router):
    """A router with parameters of its own, saved as `routing.NAME` of the model.

    Args:
        seed: of their first values.

    Attributes:
        values: of the parameters, in this forward pass of the model.
        carried: what a layer left for the next ones, by layer.
        num_choices: of a token.
    """

    replaces_weights = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @abstractmethod
    def first_values(self, weight_LED: Tensor) -> dict[str, Tensor]:
        """Parameters by name.

        Args:
            weight_LED: the family's router weights.
        """

    def check(self, family: Family) -> None:
        self.num_choices = family.top_k

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        owns: list[Any] = [router_of(block) for _, block in moe_blocks(model)]
        weight_LED = torch.stack([own.weight.detach() for own in owns])
        if self.replaces_weights:
            for own in owns:
                own.weight.requires_grad_(False)
        self.source = generator(self.seed)
        routing = Routing(self.first_values(weight_LED))
        model.add_module(ROUTING, routing)
        self.values: dict[str, Tensor] = {}
        self.carried: dict[int, Tensor] = {}
        model.register_forward_pre_hook(lambda *_: self.values.update(routing()))

    def choose(self, layer: int, scores_TE: Tensor, chosen_by_TE: Tensor, training: bool) -> Tensor:
        return chosen_by_TE.topk(self.num_choices).indices

    def normal(self, *shape: int, like: Tensor, std: float) -> Tensor:
        """The next random values of the seed."""
        return (torch.randn(shape, generator=self.source, dtype=torch.float64) * std).to(like)

    def carry(self, layer: int, value: Tensor) -> None:
        """Leave a value for later layers, which in a repeated forward pass are done already."""
        if not is_replaying():
            self.carried[layer] = value


class Cosine(Learned):
    """Logits are cosines of the token's and the expert's narrow vectors over a learnt temperature
    (X-MoE, arXiv:2204.09179), which keeps hidden states from collapsing towards experts.

    Dispatch is as the family's. The choice depends on the token alone.

    Args:
        width: of the narrow vectors; None for E / 2. temperature: in the first step; never below
            0.01.
    """

    def __init__(self, width: int | None = None, temperature: float = 0.3, seed: int = 0) -> None:
        super().__init__(seed)
        check_positive("router.width", 1 if width is None else width)
        if not temperature >= MIN_TEMPERATURE:
            raise ValueError(f"router.temperature ({temperature}) must be >= {MIN_TEMPERATURE}")
        self.width, self.temperature = width, temperature

    def first_values(self, weight_LED: Tensor) -> dict[str, Tensor]:
        layers, experts, hidden = weight_LED.shape
        width = self.width or max(1, experts // 2)
        return {
            "projection": self.normal(layers, width, hidden, like=weight_LED, std=hidden**-0.5),
            "embedding": self.normal(layers, experts, width, like=weight_LED, std=1.0),
            "temperature": weight_LED.new_full((layers,), self.temperature),
        }

    def logits(self, layer: int, hidden_TD: Tensor, logits_TE: Tensor) -> Tensor:
        at = {name: value[layer] for name, value in self.values.items()}
        narrow_TC = F.linear(hidden_TD.to(at["projection"].dtype), at["projection"])
        cosine_TE = F.normalize(narrow_TC, dim=-1) @ F.normalize(at["embedding"], dim=-1).T
        return cosine_TE / at["temperature"].clamp(min=MIN_TEMPERATURE)


class Shared(Learned):
    """Successive layers have one router weight (Omni-router, arXiv:2507.05724): a token keeps its
    experts' ids from layer to layer more often, which placement turns into less traffic.

    The choice depends on the token alone. An export has the shared weight in each of its layers.

    Args:
        layers: that share a weight, the first of which lends it; None for all.
    """

    exports = True

    def __init__(self, layers: int | None = None) -> None:
        super().__init__()
        check_positive("router.layers", 1 if layers is None else layers)
        self.layers = layers

    def first_values(self, weight_LED: Tensor) -> dict[str, Tensor]:
        self.layers = min(self.layers or len(weight_LED), len(weight_LED))
        return {"weight": weight_LED[:: self.layers].clone()}

    def attach(self, model: nn.Module, mesh: ParallelMesh) -> None:
        super().attach(model, mesh)
        routers = [router_of(block) for _, block in moe_blocks(model)]
        names = {id(module): name for name, module in model.named_modules()}
        self.gates = [f"{names[id(router)]}.weight" for router in routers]

    def exported(self, tensors: TensorSource) -> TensorSource:
        assert self.layers is not None
        return _Lent(tensors, self.gates, self.layers)

    def logits(self, layer: int, hidden_TD: Tensor, logits_TE: Tensor) -> Tensor:
        assert self.layers is not None
        weight_ED = self.values["weight"][layer // self.layers]
        return F.linear(hidden_TD.to(weight_ED.dtype), weight_ED)


class _Lent:
    """TensorSource in which every layer's router has the weight that its layers share."""

    def __init__(self, tensors: TensorSource, gates: list[str], layers: int) -> None:
        self.tensors = tensors
        self.place = {gate: layer // layers for layer, gate in enumerate(gates)}

    def __getitem__(self, key: str) -> Tensor:
        if key in self.place:
            return self.tensors[f"{ROUTING}.weight"][self.place[key]]
        return self.tensors[key]

    def keys(self) -> list[str]:
        all_keys = self.tensors.keys()
        return [key for key in all_keys if not key.startswith(f"{ROUTING}.")]


class Recurrent(Learned):
    """A GRU carries what routers of earlier layers saw of a token to the next ones (RMoE,
    arXiv:2408.06793): h_l = GRU(P_l x_l, h_(l-1)), logits = W_l h_l, from h = 0.

    All layers share the GRU. Dispatch is as the family's; the choice depends on the token alone.

    Args:
        width: of the recurrent state.
    """

    def __init__(self, width: int = 128, seed: int = 0) -> None:
        super().__init__(seed)
        check_positive("router.width", width)
        self.width = width

    def first_values(self, weight_LED: Tensor) -> dict[str, Tensor]:
        (layers, experts, hidden), width = weight_LED.shape, self.width
        std = width**-0.5
        return {
            "projection": self.normal(layers, width, hidden, like=weight_LED, std=hidden**-0.5),
            "output": self.normal(layers, experts, width, like=weight_LED, std=std),
            "input_gates": self.normal(3 * width, width, like=weight_LED, std=std),
            "state_gates": self.normal(3 * width, width, like=weight_LED, std=std),
            "gate_biases": weight_LED.new_zeros(2, 3 * width),
        }

    def logits(self, layer: int, hidden_TD: Tensor, logits_TE: Tensor) -> Tensor:
        values = self.values
        hidden_TD = hidden_TD.to(values["output"].dtype)
        narrow_TC = F.linear(hidden_TD, values["projection"][layer])
        before_TC = self.carried[layer - 1] if layer else torch.zeros_like(narrow_TC)
        input_bias, state_bias = values["gate_biases"]
        state_TC: Tensor = torch.gru_cell(
            narrow_TC,
            before_TC,
            values["input_gates"],
            values["state_gates"],
            input_bias,
            state_bias,
        )
        self.carry(layer, state_TC)
        return F.linear(state_TC, values["output"][layer])
