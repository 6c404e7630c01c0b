"""Dense checkpoints as the parts that an MoE is made of, under the names that Llama gives them.

H hidden, F neurons of the FFN, n of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.export import SAFETENSORS_NAMES
from trainer.hf_checkpoint import HFCheckpoint
from trainer.upcycle.layout import DenseShape, Matrix

FFN = re.compile(r"model\.layers\.\d+\.mlp\.")
ATTENTION_BIAS = re.compile(r"self_attn\.[qkvo]_proj\.bias$")


@dataclass(frozen=True)
class Attention:
    """What a target must have to compute the attention of a dense model.

    Attributes:
        qkv_bias, o_bias: biases that are not all zero.
        qk_norm: of queries and keys: none, per head, or of all heads together.
        post_norm: norms after attention and FFN, not before.
        window: of sliding attention, for those layers that `slides` says; None for full attention.
        rotary_share: of a head's dimensions that are rotated.
    """

    qkv_bias: bool
    o_bias: bool
    qk_norm: Literal["none", "head", "all"]
    post_norm: bool
    window: int | None
    slides: tuple[bool, ...]
    rotary_share: float


class DenseModel:
    """A dense checkpoint of the Llama kind: Llama, Mistral, Qwen2, Qwen3, OLMo2.

    Attributes:
        config: the model's own. shape, attention: what an MoE of it needs to know.

    Raises:
        ValueError: for a model that no target can compute, with the reason.
    """

    def __init__(self, checkpoint: HFCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.config: Any = checkpoint.config
        self.shape = DenseShape(
            self.config.num_hidden_layers, self.config.hidden_size, self.config.intermediate_size
        )
        self.keys = set(checkpoint.logical_keys())
        self._refuse_ffn_bias()
        self.attention = self._attention()
        self._last_down: tuple[int, Tensor] | None = None

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.config.tie_word_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors.

        Raises:
            ValueError: if they have several.
        """
        names = sorted(self.checkpoint.dtypes)
        if len(names) > 1:
            raise ValueError(
                f"{self.checkpoint.path}: tensors of {' and '.join(names)}; say with dtype=... "
                f"what to write"
            )
        return next(dtype for dtype, name in SAFETENSORS_NAMES.items() if name == names[0])

    def names(self) -> set[str]:
        """Of all tensors outside the FFN."""
        return {name for name in self.keys if not FFN.match(name)}

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor outside the FFN, or some rows of it, in the dtype of the file."""
        return self.checkpoint.read(name, rows)

    def neurons(self, layer: int, matrix: Matrix, neurons: slice | Tensor | None) -> Tensor:
        """Some neurons of an FFN, all without `neurons`: [n, H], of `down` [H, n].

        Neighbouring rows are read alone. Columns touch the whole matrix, so the last one is kept.
        """
        if matrix is Matrix.down:
            whole = self._down(layer)
            return whole if neurons is None else whole[:, neurons]
        rows = neurons if isinstance(neurons, slice) else None
        read = self._rows(layer, matrix, rows)
        return read[neurons] if isinstance(neurons, Tensor) else read

    def _down(self, layer: int) -> Tensor:
        if self._last_down is None or self._last_down[0] != layer:
            self._last_down = None  # frees it first
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            self._last_down = layer, self.checkpoint.read(name)
        return self._last_down[1]

    def _rows(self, layer: int, matrix: Matrix, rows: slice | None) -> Tensor:
        return self.checkpoint.read(f"model.layers.{layer}.mlp.{matrix.value}_proj.weight", rows)

    def _refuse_ffn_bias(self) -> None:
        for name in sorted(self.keys):
            if FFN.match(name) and name.endswith(".bias") and self._is_nonzero(name):
                raise ValueError(
                    f"{self.checkpoint.path}: {name} is not zero, and experts have no biases; "
                    f"this model cannot be upcycled exactly"
                )

    def _is_nonzero(self, name: str) -> bool:
        return bool(self.checkpoint.read(name).any())

    def _biased(self, letters: str) -> bool:
        return any(
            self._is_nonzero(name)
            for name in self.keys
            if (match := ATTENTION_BIAS.search(name)) and match.group()[10] in letters
        )

    def _attention(self) -> Attention:
        config = self.config
        rope = config.rope_parameters or {}
        qk_norm: Literal["none", "head", "all"] = "none"
        if "model.layers.0.self_attn.q_norm.weight" in self.keys:
            size = len(self.checkpoint.read("model.layers.0.self_attn.q_norm.weight"))
            qk_norm = "head" if size == head_dim(config) else "all"
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        types = getattr(config, "layer_types", None)
        types = types or ["sliding_attention"] * config.num_hidden_layers
        slides = tuple(window is not None and kind == "sliding_attention" for kind in types)
        return Attention(
            qkv_bias=self._biased("qkv"),
            o_bias=self._biased("o"),
            qk_norm=qk_norm,
            post_norm="model.layers.0.post_feedforward_layernorm.weight" in self.keys,
            window=window if any(slides) else None,
            slides=slides,
            rotary_share=float(rope.get("partial_rotary_factor", 1.0)),
        )


class Phi3(DenseModel):
    """Phi-3: queries, keys and values are one matrix on disk, gate and up another."""

    def names(self) -> set[str]:
        names = set()
        for name in super().names():
            names |= {name.replace("qkv_proj", f"{letter}_proj") for letter in "qkv"}
        return names

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        match = re.search(r"self_attn\.([qkv])_proj\.weight$", name)
        if match is None:
            return super().tensor(name, rows)
        config = self.config
        heads = config.num_attention_heads, config.num_key_value_heads
        q, kv = (number * head_dim(config) for number in heads)
        first, last = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[match.group(1)]
        fused = f"{name[: match.start()]}self_attn.qkv_proj.weight"
        begin, end, _ = (rows or slice(None)).indices(last - first)
        return self.checkpoint.read(fused, slice(first + begin, first + end))

    def _rows(self, layer: int, matrix: Matrix, rows: slice | None) -> Tensor:
        width = self.shape.width
        first, last, _ = (rows or slice(None)).indices(width)
        offset = width if matrix is Matrix.up else 0
        fused = f"model.layers.{layer}.mlp.gate_up_proj.weight"
        return self.checkpoint.read(fused, slice(offset + first, offset + last))


class Gemma(DenseModel):
    """Gemma 1, folded: norms multiply by 1 + weight, embeddings by the root of the hidden size.

    The output layer has the embeddings as they were, so it is no longer tied to them.
    """

    @property
    def tied(self) -> bool:
        return False

    def names(self) -> set[str]:
        return super().names() | {"lm_head.weight"}

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        if name == "lm_head.weight":
            return super().tensor("model.embed_tokens.weight" if super().tied else name, rows)
        tensor = super().tensor(name, rows)
        if name.endswith("norm.weight"):
            return (1 + tensor.float()).to(tensor.dtype)
        if name == "model.embed_tokens.weight":
            root = torch.tensor(self.shape.hidden**0.5, dtype=tensor.dtype)  # rounded as Gemma does
            return (tensor.float() * root.float()).to(tensor.dtype)
        return tensor


FAMILIES: dict[str, type[DenseModel]] = {
    "llama": DenseModel,
    "mistral": DenseModel,
    "qwen2": DenseModel,
    "qwen3": DenseModel,
    "olmo2": DenseModel,
    "phi3": Phi3,
    "gemma": Gemma,
}
REFUSED = {
    "gemma2": "its norms and soft caps have no counterpart in an MoE family",
    "gemma3_text": "its norms and two kinds of rotation have no counterpart in an MoE family",
}


def dense_model(checkpoint: HFCheckpoint) -> DenseModel:
    """The dense model in a checkpoint.

    Raises:
        ValueError: for a family that cannot be upcycled, and as `DenseModel`.
    """
    config: Any = checkpoint.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        why = REFUSED.get(config.model_type, f"known: {', '.join(FAMILIES)}")
        raise ValueError(f"{checkpoint.path}: {config.model_type} cannot be upcycled: {why}")
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError(
            f"{checkpoint.path}: use_bidirectional_attention is set, and no MoE family attends to "
            f"later tokens"
        )
    return family(checkpoint)


def head_dim(config: Any) -> int:
    """Dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
