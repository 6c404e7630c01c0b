"""Is the written MoE what it should be? From headers up to whole-model outputs.

T tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from trainer.export import SAFETENSORS_NAMES, named
from trainer.hf_checkpoint import HFCheckpoint, opened
from trainer.upcycle.convert import Advance
from trainer.upcycle.layout import Matrix
from trainer.upcycle.plan import Plan, sha256
from trainer.upcycle.recipe import generator

TOLERANCE = 1e-4  # of outputs in fp32, relative to their deviation where that is above 1
HALF_FACTOR = 3.0  # in bf16 and fp16: times what their rounding alone changes in the dense model
BLOCK_TOKENS = 64
BATCH = (2, 32)  # sequences and tokens of the whole-model comparison
WHOLE_BYTES = 8 << 30  # of both models in fp32, at most, for a comparison of their outputs


@dataclass(frozen=True)
class Step:
    """One check: its name, whether it holds, and what was found."""

    name: str
    good: bool
    outcome: str


@dataclass(frozen=True)
class Difference:
    """Largest difference of two outputs [.., n], and of the dense model's from rounding alone."""

    moe: float
    rounding: float
    deviation: float
    half: bool

    @property
    def is_small(self) -> bool:
        if self.half:
            return self.moe <= HALF_FACTOR * self.rounding
        return self.moe <= TOLERANCE * max(1.0, self.deviation)

    def __str__(self) -> str:
        rounding = f", {self.rounding:.1e} from rounding alone" if self.half else ""
        return f"max |difference| {self.moe:.1e}{rounding}; deviation {self.deviation:.2g}"


def verify(plan: Plan, receipt: dict[str, Any], advance: Advance) -> list[Step]:
    """Check a written folder against its plan, from the cheapest check to the dearest.

    Args:
        advance: told the bytes of every tensor that was compared.
    """
    target = Path(plan.config.target_dir)
    steps = [headers(plan, target), *hashes(plan, target, receipt), parameters(plan, target)]
    if all(step.good for step in steps):
        written = HFCheckpoint(target)
        steps += [tensors(plan, written, advance), layers(plan, written), outputs(plan, target)]
    return steps


def headers(plan: Plan, target: Path) -> Step:
    """Names, shapes, dtypes and files of all tensors are those planned."""
    wrong = []
    for name, shard in named(plan.shards):
        found = _header(target / name)
        for key in {*shard.disk, *found}:
            planned = (
                (list(plan.form.shapes[key]), plan.form.dtypes[key]) if key in shard.disk else None
            )
            if planned != found.get(key):
                wrong.append(f"{name}: {key} is {found.get(key)}, planned {planned}")
    count = sum(len(shard.disk) for shard in plan.shards)
    return Step("headers", not wrong, wrong[0] if wrong else f"{count} tensors as planned")


def hashes(plan: Plan, target: Path, receipt: dict[str, Any]) -> list[Step]:
    """Source and written files are those of the receipt."""
    sources = [[file.name, sha256(file)] for file in plan.source_files()]
    same = sources == receipt["source_files"]
    changed = [name for name, digest in receipt["files"].items() if sha256(target / name) != digest]
    return [
        Step("sources", same, "unchanged" if same else "not the files that were converted"),
        Step("files", not changed, f"{changed[0]} changed" if changed else "unchanged"),
    ]


def parameters(plan: Plan, target: Path) -> Step:
    """As many values as dense model and layout give."""
    model, layout = plan.model.models[0], plan.layout
    num_layers, hidden, _ = model.shape
    ffn = 3 * hidden * (layout.num_experts * layout.width + layout.shared_width)
    router = layout.num_experts * hidden
    outside = sum(model.tensor(name).numel() for name in model.names() & set(plan.model.keys()))
    extra = sum(
        plan.form.parameters[key].shape.numel()
        for key in plan.model.keys()  # noqa: SIM118 (not a dict)
        if plan.model.target.extra(key, plan.form.parameters[key].shape) is not None
    )
    expected = outside + extra + num_layers * (ffn + router)
    counted = sum(
        torch.Size(shape).numel()
        for name, _ in named(plan.shards)
        for shape, _ in _header(target / name).values()
    )
    outcome = f"{counted:,}" if counted == expected else f"{counted:,}, expected {expected:,}"
    return Step("parameters", counted == expected, outcome)


def tensors(plan: Plan, written: HFCheckpoint, advance: Advance) -> Step:
    """Read back, every tensor has the bits that the recipe gives."""
    for key in plan.model.keys():  # noqa: SIM118 (not a dict)
        made, read = plan.model.read(key), written.read(key)
        if made.to(read.dtype).ne(read).any() or made.shape != read.shape:
            return Step("tensors", False, f"{key} differs from what the recipe gives")
        advance(read.nbytes)
    return Step("tensors", True, f"{len(plan.model.keys())} as the recipe gives them, bit for bit")


@torch.no_grad()
def layers(plan: Plan, written: HFCheckpoint) -> Step:
    """Layer by layer, the MoE block computes what the dense FFN does, on random inputs."""
    worst: Difference | None = None
    hidden = plan.model.models[0].shape.hidden
    for layer in range(plan.model.models[0].shape.num_layers):
        x_TH = torch.randn(BLOCK_TOKENS, hidden, generator=generator("verify", layer))
        found = block_difference(plan, written, layer, x_TH)
        if worst is None or found.moe > worst.moe:
            worst = found
    assert worst is not None
    return _judged(plan, "layers", worst)


def block_difference(plan: Plan, written: HFCheckpoint, layer: int, x_TH: Tensor) -> Difference:
    """Of one layer. Only this layer is in memory."""
    prefix = f"model.layers.{layer}.mlp"
    block = type(plan.form.model.get_submodule(prefix))(plan.model.config).eval()
    dtype = plan.form.model.dtype
    state = {}
    for name, tensor in block.state_dict().items():
        stacked = ".experts." in f".{name}" and tensor.dim() == 3
        parts = [f"{prefix}.experts.{e}.{name.split('.')[-1]}" for e in range(len(tensor))]
        keys = parts if stacked else [f"{prefix}.{name}"]
        read = [written.read(key) for key in keys]
        state[name] = torch.stack(read) if stacked else read[0]
    block.load_state_dict(state, assign=True)
    moe = _only_output(block.to(dtype)(x_TH.to(dtype)[None]))[0].float()
    ffn = DenseFFN(plan, layer)
    dense, rounded = ffn(x_TH, torch.float32), ffn(x_TH, dtype)
    return _difference(moe, dense, rounded, dtype)


class DenseFFN:
    """The dense model's FFN of a layer."""

    def __init__(self, plan: Plan, layer: int) -> None:
        model = plan.model.models[0]
        self.gate, self.up, self.down = (model.neurons(layer, m, None) for m in Matrix)
        self.act = ACT2FN[model.config.hidden_act]

    def __call__(self, x_TH: Tensor, dtype: torch.dtype) -> Tensor:
        x_TH = x_TH.to(dtype)
        gate, up, down = (matrix.to(dtype) for matrix in (self.gate, self.up, self.down))
        return F.linear(self.act(F.linear(x_TH, gate)) * F.linear(x_TH, up), down).float()


@torch.no_grad()
def outputs(plan: Plan, target: Path) -> Step:
    """The whole model's outputs are the dense model's, in plain transformers, and it generates."""
    total, _ = plan.parameters
    if 2 * 4 * total > WHOLE_BYTES:
        return Step("outputs", True, "not compared: both models together are too large for that")
    dtype = plan.form.model.dtype
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        target, dtype=dtype, output_loading_info=True
    )
    moe, info = loaded
    lists = {name: keys for name, keys in info.items() if keys}
    if lists:
        return Step("outputs", False, f"transformers found {lists}")
    tokens = torch.randint(moe.config.vocab_size, BATCH, generator=generator("verify", "tokens"))
    got = moe.eval()(tokens).logits.float()
    moe.generate(tokens[:1], max_new_tokens=2, do_sample=False)
    source = plan.model.models[0].checkpoint.path
    dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    want = dense(tokens).logits
    rounded = want if dtype is torch.float32 else dense.to(dtype)(tokens).logits.float()
    kl = F.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none")
    step = _judged(plan, "outputs", _difference(got, want, rounded, dtype))
    return Step(step.name, step.good, f"{step.outcome}; KL {kl.sum(-1).mean():.1e}")


def _judged(plan: Plan, name: str, found: Difference) -> Step:
    """Small where the MoE is to begin as the dense model does; else only told."""
    return Step(name, bool(plan.inexact) or found.is_small, str(found))


def _difference(moe: Tensor, dense: Tensor, rounded: Tensor, dtype: torch.dtype) -> Difference:
    return Difference(
        float((moe - dense).abs().max()),
        float((rounded - dense).abs().max()),
        float(dense.std()),
        half=dtype is not torch.float32,
    )


def _only_output(made: Any) -> Tensor:
    """Some families' blocks return the router's scores too."""
    return made[0] if isinstance(made, tuple) else made


def _header(file: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    dtypes = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
    with opened(file) as weights:
        slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118 (not a dict)
        return {key: (s.get_shape(), dtypes[s.get_dtype()]) for key, s in slices.items()}
