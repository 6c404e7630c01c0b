"""What the parts of a model keep for the backward pass, seen on tensors without storage.

The layers of `transformers` and the expert path of `parallel` run once at their true sizes under
FakeTensorMode: what autograd saves is counted, no formula stands for it. T tokens of a rank, D
hidden width, K choices, M rows that the rank computes, U copies of tokens that it sends and that
come to it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv

import parallel.memory
from launch.sizing.live import LiveBytes, storage_key
from parallel.bags import Bags, expand, reduce
from parallel.experts import expert_outputs
from parallel.model import find_experts, router_of

ONE_KERNEL = "evenkeel_one_kernel"


@dataclass(frozen=True)
class Activations:
    """Bytes of one part of the model in one forward and backward pass of a rank.

    Attributes:
        kept: that wait for the backward pass, the part's input among them.
        peak: most that are alive at once while the part runs forward and backward by itself,
            gradients of parameters left out.
    """

    kept: int
    peak: int


@dataclass(frozen=True)
class Routed:
    """Sizes of the expert part on the busiest rank: rows M and copies U, per token of a rank."""

    rows: float
    copies: float


class FakeModel:
    """A model at its true size without storage, to run its parts.

    Args:
        dtype: of the forward pass; routers compute in fp32 whatever it is.

    Raises:
        ValueError: if the family's parts are not where those of most families are.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        config = copy.deepcopy(config)
        self.config, self.dtype = config, dtype
        self.mode = FakeTensorMode()
        with self.mode:
            self.model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
        self.base: Any = self.model.base_model
        for name in ("layers", "norm", "rotary_emb"):
            if not hasattr(self.base, name):
                raise ValueError(
                    f"model {config.model_type}: its base model has no {name}, without which its "
                    f"activations cannot be counted; use a family that has layers, norm and "
                    f"rotary_emb"
                )
        self.blocks = [
            self.model.get_submodule(name.rpartition(".")[0])
            for name, _ in find_experts(self.model)
        ]
        with self.mode:
            for block in self.blocks:
                _route_in_fp32(router_of(block))
        self.is_eager = self.model.config._attn_implementation == "eager"
        if not self.is_eager:
            AttentionInterface.register(ONE_KERNEL, attention_in_one_kernel)
            self.model.config._attn_implementation = ONE_KERNEL

    @property
    def layers(self) -> list[Any]:
        """The decoder layers."""
        return list(self.base.layers)

    def kinds(self) -> dict[int, int]:
        """Layers of every kind: index of its first layer, and how many there are.

        Layers differ in having experts, and in their kind of attention.
        """
        types = getattr(self.config, "layer_types", None)
        firsts: dict[Any, int] = {}
        numbers: dict[int, int] = {}
        for index, layer in enumerate(self.layers):
            key = self._block(layer) is None, types[index] if types else None
            first = firsts.setdefault(key, index)
            numbers[first] = numbers.get(first, 0) + 1
        return numbers

    def layer(self, index: int, sequences: int, seq_len: int, routed: Routed) -> Activations:
        """One decoder layer over so many sequences of packed documents."""
        layer, tokens = self.layers[index], sequences * seq_len
        with self.mode, self._on_one_rank(layer, tokens, routed):
            x = self._hidden(sequences, seq_len)
            mask, places, embeddings = self._shared(x)

            def run() -> Tensor:
                out = layer(
                    x,
                    attention_mask=mask,
                    position_ids=places,
                    position_embeddings=embeddings,
                    use_cache=False,
                )
                return out[0] if isinstance(out, tuple) else out

            given = [*layer.parameters(), *layer.buffers(), mask, places, *embeddings]
            return _measure(run, given, layer, x)

    def head(self, sequences: int, seq_len: int) -> Activations:
        """Last norm, output layer and loss, as `EngineBase` computes it."""
        with self.mode:
            x = self._hidden(sequences, seq_len)
            labels = torch.zeros(sequences * seq_len, dtype=torch.int64)
            part = nn.ModuleList([self.base.norm, self.model.get_output_embeddings()])

            def run() -> Tensor:
                logits = part[1](part[0](x)).flatten(0, 1)
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                return F.cross_entropy(wide, labels, reduction="sum")

            return _measure(run, [*part.parameters(), *part.buffers(), labels], part, x)

    def shared(self, sequences: int, seq_len: int) -> int:
        """Bytes of what all layers share: mask of documents, positions, ids, labels."""
        with self.mode:
            mask, places, embeddings = self._shared(self._hidden(sequences, seq_len))
            tensors = [mask, places, places, places, *embeddings]  # ids and labels like positions
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def _hidden(self, sequences: int, seq_len: int) -> Tensor:
        width = self.model.get_input_embeddings().weight.shape[1]
        return torch.empty(sequences, seq_len, width, dtype=self.dtype, requires_grad=True)

    def _shared(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Mask (documents in a sequence make one of their own), positions and their embeddings."""
        sequences, seq_len = x.shape[:2]
        places = torch.zeros(sequences, seq_len, dtype=torch.int64)
        kind = self.dtype if self.is_eager else torch.bool
        mask = torch.zeros(sequences, 1, seq_len, seq_len, dtype=kind)
        with torch.no_grad():
            return mask, places, self.base.rotary_emb(x, places)

    def _block(self, layer: nn.Module) -> Any:
        """The MoE block of a decoder layer; None in a dense one."""
        inside = set(layer.modules())
        return next((block for block in self.blocks if block in inside), None)

    @contextmanager
    def _on_one_rank(self, layer: nn.Module, tokens: int, routed: Routed) -> Iterator[None]:
        """A layer with its experts as those of one rank."""
        block = self._block(layer)
        if block is None:
            yield
            return
        family, rows = block.experts, max(1, round(routed.rows * tokens))
        block.experts = RankExperts(family, rows, max(1, round(routed.copies * tokens)))
        try:
            yield
        finally:
            block.experts = family


def _route_in_fp32(router: nn.Module | None) -> None:
    """As the engines do: parameters and inputs of a router are fp32, and so are its results."""
    if router is None:
        return
    for module in router.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            wide = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
            module.register_parameter(name, wide)
    router.register_forward_pre_hook(
        lambda _, args: tuple(
            a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        )
    )


class RankExperts(nn.Module):
    """A layer's experts as one rank runs them, on rows of a plan but without any messages.

    One slot takes all rows: how many slots there are changes no activation.

    Args:
        family: the experts of `transformers`. rows: M. copies: U.
    """

    def __init__(self, family: nn.Module, rows: int, copies: int) -> None:
        super().__init__()
        names = [name for name, _ in family.named_parameters(recurse=False)]
        for name in names:
            self.register_parameter(name, nn.Parameter(getattr(family, name).detach()[:1].clone()))
        self.names, self.rows, self.copies = names, rows, copies
        self.family = (family,)  # not a module of this one

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        there = Bags.of(torch.zeros(self.copies, dtype=torch.int64), len(x_TD))
        here = Bags.of(torch.zeros(self.rows, dtype=torch.int64), self.copies)
        chosen_M = torch.zeros(self.rows, dtype=torch.int64)
        weight_M = weights_TK.flatten().index_select(0, chosen_M)
        stacks = {name: getattr(self, name) for name in self.names}
        x_UD = expand(x_TD, there).clone()  # arrives in memory of its own
        y_MD = expert_outputs(self.family[0], expand(x_UD, here), [self.rows], stacks)
        return reduce(reduce(y_MD, here, weight_M).clone(), there)


def attention_in_one_kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `transformers` runs on a GPU for packed documents: sdpa with a mask, heads repeated."""
    groups = getattr(module, "num_key_value_groups", 1)
    out = _OneKernel.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask)
    return out.transpose(1, 2).contiguous(), None


class _OneKernel(torch.autograd.Function):
    """Sizes of a fused attention kernel, which keeps its inputs, its output and a sum per row.

    The CPU has no such kernel where queries are wider than values (latent attention).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextmanager
def _in_one_block() -> Iterator[None]:
    """Elementwise passes over all rows at once, as on a GPU."""
    before, parallel.memory.CACHE_ROWS = parallel.memory.CACHE_ROWS, sys.maxsize
    try:
        yield
    finally:
        parallel.memory.CACHE_ROWS = before


def _measure(
    run: Callable[[], Tensor], given: list[Tensor], part: nn.Module, x: Tensor
) -> Activations:
    """Run forward and backward. Args: given: tensors that are not counted."""
    saved: dict[int, Tensor] = {}
    apart = {storage_key(tensor) for tensor in [*given, *part.parameters()]}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in apart:
            saved[storage_key(tensor)] = tensor
        return tensor

    live = LiveBytes([*given, *part.parameters()])
    with live, _in_one_block():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run()
        saved[storage_key(x)] = x
        kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        saved.clear()
        out.backward(torch.empty_like(out))
        del out
    gradients = [p.grad for p in part.parameters() if p.grad is not None]
    peak = live.peak(without=gradients)
    for parameter in part.parameters():
        parameter.grad = None
    return Activations(kept, max(peak, kept))
