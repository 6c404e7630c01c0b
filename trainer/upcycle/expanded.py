"""The expanded MoE: every tensor made when it is asked for, from the files of the one before.

E experts before, N = multiple * E of them after, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from configs.rules import NUM_EXPERTS, TOP_K
from configs.upcycle_schema import Routing
from trainer.balance.bias import SELECTION_BIAS
from trainer.export import SAFETENSORS_NAMES
from trainer.hf_checkpoint import HFCheckpoint
from trainer.hf_format import HFFormat, expert_key
from trainer.routers.family import SIGMOID
from trainer.upcycle.calibration import squared_gradients, text_tokens
from trainer.upcycle.recipe import generator
from trainer.upcycle.recipes.expand import Expand, allocate, parents

LAYER = re.compile(r"\.layers\.(\d+)\.")
# families whose weights are a softmax of the scores, of all experts or of the chosen ones
SOFTMAX = (
    "deepseek_v2",
    "ernie4_5_moe",
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "minimax",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)


class ExpandedModel:
    """Reads like a checkpoint of the MoE with more experts.

    Experts, router rows and selection biases are their parents', byte for byte, but for what the
    mode adds to tell copies apart; that is added in fp32 and rounded once.

    Attributes:
        config: of the MoE. recipe: its settings. checkpoint: the MoE before.

    Raises:
        ValueError: for settings that do not fit, and a family or routing that cannot be expanded,
            with the reason.
    """

    def __init__(self, checkpoint: HFCheckpoint, recipe: Expand, seed: int = 0) -> None:
        recipe.check()
        self.checkpoint, self.recipe, self.seed = checkpoint, recipe, seed
        self.family = str(checkpoint.config.model_type)
        self._refuse_family()
        self.source = HFFormat(checkpoint.config)
        self.num_before = _number(checkpoint, NUM_EXPERTS)
        self.top_k_before = _number(checkpoint, TOP_K)
        self.num_experts = recipe.multiple * self.num_before
        self.config = self._config()
        self.form = HFFormat(self.config)

    @property
    def checkpoints(self) -> list[HFCheckpoint]:
        """What the model is made of."""
        return [self.checkpoint]

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.top_k_before * (self.recipe.multiple if self.recipe.mode == "double" else 1)

    @property
    def inexact(self) -> str:
        """Why the model does not begin as the one before; empty if it does."""
        if self.recipe.mode == "double":
            return ""
        if self.recipe.mode == "hyperplane":
            return "tokens near the dividing plane choose both copies of an expert"
        return f"copies of an expert take places of others among the {self.top_k} of a token"

    @property
    def fp32_scores(self) -> bool:
        """Whether the family computes scores in fp32 whatever the model's dtype."""
        return self.family in ("deepseek_v2", "ernie4_5_moe", *SIGMOID)

    @property
    def routing(self) -> Routing:
        """How the family makes weights of scores."""
        if self.family in SIGMOID:
            return Routing.sigmoid
        summed = getattr(self.config, "norm_topk_prob", True) and self.family != "deepseek_v2"
        return Routing.renormalised if summed else Routing.softmax

    @property
    def experts(self) -> str:
        """In words."""
        return f"{self.num_experts} for {self.num_before}, top {self.top_k} for {self.top_k_before}"

    def noted(self) -> dict[str, Any]:
        """What was chosen, for the receipt."""
        by_layer = self.copies if self.recipe.allocation == "utility" else {}
        copies = {str(layer): copies for layer, copies in by_layer.items()}
        return {"target": self.family, "routing": self.routing.value, "copies": copies}

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors but those that the family keeps in another one.

        Raises:
            ValueError: if others differ, too.
        """
        dtype = self._expert_dtype
        kept = HFFormat(self.checkpoint.config, dtype).dtypes.values()
        others = self.checkpoint.dtypes - {SAFETENSORS_NAMES[one] for one in kept}
        if others:
            raise ValueError(
                f"{self.checkpoint.path}: tensors of {', '.join(sorted(others))} beside "
                f"{SAFETENSORS_NAMES[dtype]}; say with dtype=... what to write"
            )
        return dtype

    def inexact_in(self, dtype: torch.dtype) -> str:
        """As `inexact`, for weights that are written in a dtype."""
        if not self.inexact and torch.promote_types(dtype, self._expert_dtype) is not dtype:
            name = str(dtype).removeprefix("torch.")
            return f"rounding weights to {name} changes what routers choose"
        return self.inexact

    @cached_property
    def _expert_dtype(self) -> torch.dtype:
        key = next(key for key, p in self.source.parameters.items() if p.expert is not None)
        return self.checkpoint.read(key).dtype

    @cached_property
    def copies(self) -> dict[int, list[int]]:
        """Of every expert, by MoE layer."""
        recipe, stacks = self.recipe, self.stacks
        if recipe.allocation == "uniform":
            return dict.fromkeys(stacks, [recipe.multiple] * self.num_before)
        tokens = text_tokens(
            self.checkpoint.path,
            recipe.calibration,
            sequences=recipe.sequences,
            length=recipe.length,
        )
        names = [name for of_layer in stacks.values() for name in of_layer]
        squares = squared_gradients(self.checkpoint.path, tokens, names)
        return {
            layer: allocate(
                torch.stack([squares[name] for name in of_layer]).sum(0).tolist(),
                self.num_experts,
                recipe.max_copies,
            )
            for layer, of_layer in stacks.items()
        }

    @property
    def stacks(self) -> dict[int, list[str]]:
        """Parameters that stack the experts, by layer."""
        found: dict[int, list[str]] = {}
        for name in dict.fromkeys(p.name for p in self.source.parameters.values() if p.expert == 0):
            found.setdefault(layer_of(name), []).append(name)
        return found

    def logical_keys(self) -> list[str]:
        """Every key that `read` knows."""
        return list(self.form.parameters)

    keys = logical_keys

    def __getitem__(self, key: str) -> Tensor:
        return self.read(key)

    def read(self, key: str) -> Tensor:
        """A tensor of the MoE by its logical key, in the dtype of the files."""
        parameter = self.form.parameters[key]
        if parameter.expert is not None:
            return self._expert(parameter.name, parameter.expert)
        before = self.source.parameters[key].shape
        if parameter.shape == before:
            return self.checkpoint.read(key)
        dim = next(d for d, size in enumerate(before) if size != parameter.shape[d])
        parent_N = torch.tensor(parents(self.copies[layer_of(key)]))
        return self._told_apart(key, self.checkpoint.read(key).index_select(dim, parent_N))

    def is_grown(self, key: str) -> bool:
        """Whether a tensor of the MoE before has more values now."""
        before = self.source.parameters[key]
        return before.expert is not None or before.shape != self.form.parameters[key].shape

    def _expert(self, stack: str, expert: int) -> Tensor:
        copies = self.copies[layer_of(stack)]
        parent = parents(copies)[expert]
        tensor = self.checkpoint.read(expert_key(stack, parent))
        if not self.recipe.apart or not stack.endswith("down_proj"):
            return tensor
        noise = [
            torch.randn(tensor.shape, generator=self._generator(stack, one, "apart"))
            for one in range(parent, self.num_experts, self.num_before)
        ]
        own = noise[expert // self.num_before]
        own = (own - sum(noise) / len(noise)) * tensor.float().std() * self.recipe.apart
        return (tensor.float() + own).to(tensor.dtype)

    def _told_apart(self, key: str, tensor: Tensor) -> Tensor:
        """A router's tensor of copies, with what the mode adds to it."""
        recipe = self.recipe
        is_bias = tensor.numel() == self.num_experts
        added = torch.zeros(tensor.shape)
        if recipe.mode == "double":
            # probabilities of a softmax over all experts are shared out among copies
            if key.endswith(SELECTION_BIAS) and self.family in SOFTMAX:
                return (tensor.float() / recipe.multiple).to(tensor.dtype)
            return tensor
        if recipe.mode == "hyperplane" and not is_bias:
            normal_H = torch.randn(tensor.shape[1], generator=self._generator(key, 0, "plane"))
            normal_H *= recipe.amplitude / normal_H.norm()
            added[: self.num_before] += normal_H
            added[self.num_before :] -= normal_H
        elif recipe.mode == "noise" and is_bias == self._has_bias(key):
            dim = tensor.shape.index(self.num_experts)
            for expert in range(self.num_before, self.num_experts):
                row = added.select(dim, expert)
                draw = torch.rand(row.shape, generator=self._generator(key, expert, "noise"))
                row += (2 * draw - 1) * recipe.noise
        else:
            return tensor
        return (tensor.float() + added).to(tensor.dtype)

    def _has_bias(self, key: str) -> bool:
        """Whether the router of the key's layer has a value per expert."""
        return any(
            after.shape.numel() == self.num_experts
            for name, after in self.form.parameters.items()
            if after.expert is None and self.is_grown(name) and layer_of(name) == layer_of(key)
        )

    def _generator(self, key: str, expert: int, purpose: str) -> torch.Generator:
        return generator(self.seed, layer_of(key), expert, purpose)

    def _config(self) -> Any:
        """The configuration before, with the numbers of experts, choices and groups after."""
        config: Any = deepcopy(self.checkpoint.config)
        recipe, multiple = self.recipe, self.recipe.multiple
        for names, number in ((NUM_EXPERTS, self.num_experts), (TOP_K, self.top_k)):
            for name in names:
                if hasattr(config, name):
                    setattr(config, name, number)
        if _groups(config) > 1:
            config.n_group *= multiple
            config.topk_group *= multiple
        summed = self.family in SIGMOID and not config.norm_topk_prob
        if recipe.mode == "double" and summed:  # weights are not shared out among copies
            config.routed_scaling_factor /= multiple
        return config

    def _refuse_family(self) -> None:
        """Refuse what would not be what the mode says.

        Raises:
            ValueError: with the reason.
        """
        config, path, mode = self.checkpoint.config, self.checkpoint.path, self.recipe.mode
        if self.family not in SOFTMAX + SIGMOID:
            raise ValueError(
                f"{path}: {self.family} cannot be expanded: recipe=expand takes MoE families whose "
                f"routing it knows, {', '.join(sorted(SOFTMAX + SIGMOID))}"
            )
        if mode == "hyperplane" and self.family in SIGMOID:
            raise ValueError(
                f"recipe.mode=hyperplane needs softmax routing, where a shift of all scores "
                f"cancels; {self.family} has sigmoids: use recipe.mode=double"
            )
        if mode != "double" and _groups(config) > 1:
            raise ValueError(
                f"recipe.mode={mode} cannot keep the choice among {_groups(config)} groups of "
                f"experts (n_group of {path}): groups of copies would tie; use recipe.mode=double"
            )


def layer_of(name: str) -> int:
    """The number in a parameter's name; -1 outside of layers."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else -1


def _groups(config: Any) -> int:
    return getattr(config, "n_group", None) or 1


def _number(checkpoint: HFCheckpoint, names: Sequence[str]) -> int:
    """A field of a configuration that families name differently.

    Raises:
        ValueError: if it differs from layer to layer.
    """
    config = checkpoint.config
    name, value = next((n, getattr(config, n)) for n in names if hasattr(config, n))
    if not isinstance(value, int):
        raise ValueError(
            f"{checkpoint.path}: {name} ({value}) differs by layer; only MoEs with the same number "
            f"in all layers can be expanded"
        )
    return value
