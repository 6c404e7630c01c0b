"""The MoE families that an upcycled model is written as.

Every field of a configuration that decides what the model computes is written, never left to a
family's default.

N routed experts, D hidden.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from configs.upcycle_schema import Routing
from trainer.upcycle.dense import DenseModel, head_dim
from trainer.upcycle.layout import Layout

COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
PERMUTED = re.compile(r"self_attn\.[qk]_proj\.weight$")


class Target(ABC):
    """A family without shared experts whose attention is Llama's; the others differ from it.

    Attributes:
        family: `model_type`. routings: that it can compute.
        shared: name of the shared expert's module, if the family has one.
        has_factor: multiplies the routed experts' outputs by a setting of its own.
        groups: chooses groups of experts first. fp32_scores: computes router scores in fp32.
        shared_gate: multiplies the shared expert's output by a sigmoid.
    """

    family = ""
    routings: tuple[Routing, ...] = (Routing.renormalised, Routing.softmax)
    shared = ""
    has_factor = False
    groups = False
    fp32_scores = False
    shared_gate = False
    post_norm = False
    rotates_part = False
    qk_norms: tuple[str, ...] = ("none",)
    qkv_bias = False
    o_bias = False
    slides = "never"  # or "all": layers alike; "some": layer by layer

    def problems(self, dense: DenseModel, layout: Layout, routing: Routing) -> Iterator[str]:
        """Why this family cannot compute what the dense model and the routing ask for."""
        needs, family = dense.attention, self.family
        if routing not in self.routings:
            yield f"{family} has no routing={routing.value}"
        if layout.shared_width and not self.shared:
            yield f"{family} has no shared expert"
        if self.shared and not self.shared_gate and layout.shared_width % layout.width:
            yield (
                f"{family} has shared experts of the width of routed ones ({layout.width}), not of "
                f"{layout.shared_width}"
            )
        if needs.post_norm != self.post_norm:
            yield f"{family} has its norms {'after' if self.post_norm else 'before'} attention"
        if needs.qk_norm not in self.qk_norms:
            have = {"none": "no", "head": "per-head", "all": "joint"}[needs.qk_norm]
            yield f"{family} cannot have {have} norms of queries and keys"
        if needs.qkv_bias and not self.qkv_bias:
            yield f"{family} has no biases of queries, keys and values"
        if needs.o_bias and not self.o_bias:
            yield f"{family} has no bias of the attention's output"
        if needs.rotary_share != 1 and not self.rotates_part:
            yield f"{family} rotates whole heads, not {needs.rotary_share:g} of them"
        if needs.window is not None and self.slides == "never":
            yield f"{family} has no sliding window"
        if needs.window is not None and self.slides == "all" and not all(needs.slides):
            yield f"{family} has one window for all layers"

    def config(self, dense: DenseModel, layout: Layout, routing: Routing) -> PretrainedConfig:
        """The configuration, every field given."""
        source = dense.config
        fields = {name: getattr(source, name) for name in COPIED if hasattr(source, name)}
        rope = dict(source.rope_parameters)
        fields |= {
            "head_dim": head_dim(source),
            "rope_parameters": rope,
            "tie_word_embeddings": dense.tied,
            "num_experts_per_tok": layout.top_k,
            "output_router_logits": False,
            **self.own_fields(dense, layout, routing),
        }
        config: Any = AutoConfig.for_model(self.family, **fields)
        config.rope_theta = rope["rope_theta"]  # for readers of the older style
        return config

    @abstractmethod
    def own_fields(self, dense: DenseModel, layout: Layout, routing: Routing) -> dict[str, Any]:
        """The fields that only this family has."""

    def convert(self, name: str, tensor: Tensor, config: Any) -> Tensor:
        """A tensor of the dense model as this family has it."""
        return tensor

    def extra(self, name: str, shape: torch.Size) -> Tensor | None:
        """A tensor that only this family has, where it begins; None for others."""
        return None


class Qwen2Moe(Target):
    """Softmax routing; the one with biases, windows and a gated shared expert."""

    family = "qwen2_moe"
    shared, shared_gate = "shared_expert", True
    qkv_bias, slides = True, "some"

    def own_fields(self, dense: DenseModel, layout: Layout, routing: Routing) -> dict[str, Any]:
        needs = dense.attention
        kinds = ["sliding_attention" if slides else "full_attention" for slides in needs.slides]
        return {
            "num_experts": layout.num_experts,
            "moe_intermediate_size": layout.width,
            "intermediate_size": dense.shape.width,
            "shared_expert_intermediate_size": layout.shared_width,
            "norm_topk_prob": routing is Routing.renormalised,
            "qkv_bias": needs.qkv_bias,
            "use_sliding_window": needs.window is not None,
            "sliding_window": needs.window or 0,
            "max_window_layers": dense.shape.num_layers,
            "layer_types": kinds,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
        }

    def extra(self, name: str, shape: torch.Size) -> Tensor | None:
        return torch.zeros(shape) if name.endswith("shared_expert_gate.weight") else None


class Qwen3Moe(Target):
    """Softmax routing and norms of queries and keys, head by head."""

    family = "qwen3_moe"
    qk_norms = ("head",)
    qkv_bias = o_bias = True
    slides = "all"

    def own_fields(self, dense: DenseModel, layout: Layout, routing: Routing) -> dict[str, Any]:
        needs = dense.attention
        return {
            "num_local_experts": layout.num_experts,
            "moe_intermediate_size": layout.width,
            "intermediate_size": dense.shape.width,
            "norm_topk_prob": routing is Routing.renormalised,
            "attention_bias": needs.qkv_bias or needs.o_bias,
            "use_sliding_window": needs.window is not None,
            "sliding_window": needs.window,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
        }


class Mixtral(Target):
    """Renormalised softmax routing: the family that most engines load."""

    family = "mixtral"
    routings = (Routing.renormalised,)
    slides = "all"

    def own_fields(self, dense: DenseModel, layout: Layout, routing: Routing) -> dict[str, Any]:
        return {
            "num_local_experts": layout.num_experts,
            "intermediate_size": layout.width,
            "sliding_window": dense.attention.window,
            "router_jitter_noise": 0.0,
            "router_aux_loss_coef": 0.001,
        }


class Glm4Moe(Target):
    """Sigmoid routing with selection biases, shared experts and groups; scores in fp32."""

    family = "glm4_moe"
    routings = (Routing.sigmoid,)
    shared, has_factor, groups, fp32_scores = "shared_experts", True, True, True
    qk_norms, qkv_bias, rotates_part = ("none", "head"), True, True

    def own_fields(self, dense: DenseModel, layout: Layout, routing: Routing) -> dict[str, Any]:
        needs = dense.attention
        # groups of the experts that are parts of one copy: always chosen whole
        whole = layout.parts > 1 and layout.copies_are_contiguous
        groups = layout.num_rows if whole and layout.num_rows < layout.num_experts else 1
        return {
            "n_routed_experts": layout.num_experts,
            "moe_intermediate_size": layout.width,
            "intermediate_size": dense.shape.width,
            "n_shared_experts": layout.shared_width // layout.width,
            "routed_scaling_factor": layout.factor(routing),
            "n_group": groups,
            "topk_group": layout.top_k // layout.parts if groups > 1 else 1,
            "norm_topk_prob": True,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
            "attention_bias": needs.qkv_bias,
            "use_qk_norm": needs.qk_norm == "head",
            "rope_parameters": {
                **dense.config.rope_parameters,
                "partial_rotary_factor": needs.rotary_share,
            },
        }

    def extra(self, name: str, shape: torch.Size) -> Tensor | None:
        return torch.zeros(shape) if name.endswith("e_score_correction_bias") else None


class Ernie45Moe(Target):
    """Renormalised softmax routing with selection biases; scores in fp32, rotation interleaved."""

    family = "ernie4_5_moe"
    routings = (Routing.renormalised,)
    shared, fp32_scores = "shared_experts", True

    def own_fields(self, dense: DenseModel, layout: Layout, routing: Routing) -> dict[str, Any]:
        return {
            "moe_num_experts": layout.num_experts,
            "moe_k": layout.top_k,
            "moe_intermediate_size": layout.width,
            "intermediate_size": dense.shape.width,
            "moe_num_shared_experts": layout.shared_width // layout.width,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": dense.shape.num_layers - 1,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
            "use_bias": False,
            "router_aux_loss_coef": 0.001,
        }

    def convert(self, name: str, tensor: Tensor, config: Any) -> Tensor:
        """Queries and keys: the two halves of a head interleaved."""
        if not PERMUTED.search(name):
            return tensor
        heads = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])
        return heads.transpose(1, 2).reshape(tensor.shape)

    def extra(self, name: str, shape: torch.Size) -> Tensor | None:
        return torch.zeros(shape) if name.endswith("e_score_correction_bias") else None


class FlexOlmo(Target):
    """Softmax routing for OLMo2: norms after attention and FFN, and of queries and keys."""

    family = "flex_olmo"
    post_norm, qk_norms = True, ("all",)
    qkv_bias = o_bias = True

    def own_fields(self, dense: DenseModel, layout: Layout, routing: Routing) -> dict[str, Any]:
        needs = dense.attention
        return {
            "num_experts": layout.num_experts,
            "intermediate_size": layout.width,
            "norm_topk_prob": routing is Routing.renormalised,
            "attention_bias": needs.qkv_bias or needs.o_bias,
            "router_aux_loss_coef": 0.01,
        }


# in the order in which `auto` tries them
TARGETS: tuple[Target, ...] = (
    Qwen2Moe(),
    Qwen3Moe(),
    FlexOlmo(),
    Glm4Moe(),
    Ernie45Moe(),
    Mixtral(),
)


def choose(name: str, dense: DenseModel, layout: Layout, routing: Routing) -> Target:
    """The target of that name, or with `auto` the first that fits.

    Raises:
        ValueError: for an unknown name, and with the reasons if none fits.
    """
    known = {target.family: target for target in TARGETS}
    if name != "auto" and name not in known:
        raise ValueError(f"target ({name}) must be auto or one of {', '.join(known)}")
    reasons = []
    for target in TARGETS if name == "auto" else (known[name],):
        problems = list(target.problems(dense, layout, routing))
        if not problems:
            return target
        reasons += problems
    raise ValueError(
        f"target={name} cannot compute what {dense.config.model_type} with "
        f"routing={routing.value} does: {'; '.join(reasons)}"
    )
