"""Is the written MoE what it should be? From headers up to whole-model outputs.

T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from trainer.durable import sha256
from trainer.export import SAFETENSORS_NAMES, named
from trainer.hf_checkpoint import HFCheckpoint, opened
from trainer.hf_format import HFFormat, expert_key
from trainer.upcycle.convert import Advance
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.expanded import ExpandedModel, layer_of
from trainer.upcycle.layout import Matrix
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.plan import Plan
from trainer.upcycle.recipe import generator

FFN = Callable[[Tensor, torch.dtype], Tensor]
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
    """As many values as source and recipe give."""
    model = plan.model
    expected = _upcycled(plan, model) if isinstance(model, UpcycledModel) else _expanded(model)
    counted = sum(
        torch.Size(shape).numel()
        for name, _ in named(plan.shards)
        for shape, _ in _header(target / name).values()
    )
    outcome = f"{counted:,}" if counted == expected else f"{counted:,}, expected {expected:,}"
    return Step("parameters", counted == expected, outcome)


def _expanded(made: ExpandedModel) -> int:
    """Values of the MoE before, those of experts and routers several times."""
    return sum(
        before.shape.numel() * (made.recipe.multiple if made.is_grown(key) else 1)
        for key, before in made.source.parameters.items()
    )


def _upcycled(plan: Plan, made: UpcycledModel) -> int:
    """Values of the dense model outside its FFNs, and those that the layout gives."""
    model, layout = made.models[0], made.layout
    num_layers, hidden = model.shape.num_layers, model.shape.hidden
    ffn = 3 * hidden * (layout.num_experts * layout.width + layout.shared_width)
    router = layout.num_experts * hidden
    outside = sum(model.tensor(name).numel() for name in model.names() & set(made.keys()))
    extra = sum(
        plan.form.parameters[key].shape.numel()
        for key in made.keys()  # noqa: SIM118 (not a dict)
        if made.target.extra(key, plan.form.parameters[key].shape) is not None
    )
    return outside + extra + num_layers * (ffn + router)


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
    """Layer by layer, the MoE block computes what the source's FFN does, on random inputs."""
    worst: Difference | None = None
    hidden = plan.model.config.hidden_size
    for layer, prefix in moe_blocks(plan.form).items():
        x_TH = torch.randn(BLOCK_TOKENS, hidden, generator=generator("verify", layer))
        found = block_difference(plan, written, layer, prefix, x_TH)
        if worst is None or found.moe > worst.moe:
            worst = found
    assert worst is not None
    return _judged(plan, "layers", worst)


def moe_blocks(form: HFFormat) -> dict[int, str]:
    """Names of the MoE blocks by layer."""
    stacks = {
        p.name: p.name.partition(".experts.")[0] for p in form.parameters.values() if p.expert == 0
    }
    return {layer_of(name): prefix for name, prefix in stacks.items()}


def block_difference(
    plan: Plan, written: HFCheckpoint, layer: int, prefix: str, x_TH: Tensor
) -> Difference:
    """Of one layer. Only this layer is in memory."""
    model, (runs_in, dtype) = plan.model, _dtypes(plan)
    if isinstance(model, UpcycledModel):
        ffn: FFN = DenseFFN(model.models[0], layer)
    else:
        ffn = MoEBlock(model.source, model.checkpoint, prefix)
    moe = MoEBlock(plan.form, written, prefix)(x_TH, runs_in)
    return _difference(moe, ffn(x_TH, torch.float32), ffn(x_TH, dtype), dtype)


class MoEBlock:
    """An MoE's block of a layer."""

    def __init__(self, form: HFFormat, checkpoint: HFCheckpoint, prefix: str) -> None:
        self.block = type(form.model.get_submodule(prefix))(form.model.config).eval()
        state = {}
        for name, tensor in self.block.state_dict().items():
            key = f"{prefix}.{name}"
            if key in form.parameters:
                state[name] = checkpoint.read(key)
            else:
                experts = [expert_key(key, expert) for expert in range(len(tensor))]
                state[name] = torch.stack([checkpoint.read(one) for one in experts])
        self.block.load_state_dict(state, assign=True)

    def __call__(self, x_TH: Tensor, dtype: torch.dtype) -> Tensor:
        return _only_output(self.block.to(dtype)(x_TH.to(dtype)[None]))[0].float()


class DenseFFN:
    """A dense model's FFN of a layer."""

    def __init__(self, model: DenseModel, layer: int) -> None:
        self.gate, self.up, self.down = (model.neurons(layer, m, None) for m in Matrix)
        self.act = ACT2FN[model.config.hidden_act]

    def __call__(self, x_TH: Tensor, dtype: torch.dtype) -> Tensor:
        x_TH = x_TH.to(dtype)
        gate, up, down = (matrix.to(dtype) for matrix in (self.gate, self.up, self.down))
        return F.linear(self.act(F.linear(x_TH, gate)) * F.linear(x_TH, up), down).float()


@torch.no_grad()
def outputs(plan: Plan, target: Path) -> Step:
    """The whole model's outputs are the source's, in plain transformers, and it generates."""
    total, _ = plan.parameters
    if 2 * 4 * total > WHOLE_BYTES:
        return Step("outputs", True, "not compared: both models together are too large for that")
    runs_in, dtype = _dtypes(plan)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        target,
        dtype=runs_in,
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    moe, info = loaded
    lists = {name: keys for name, keys in info.items() if keys}
    if lists:
        return Step("outputs", False, f"transformers found {lists}")
    tokens = torch.randint(moe.config.vocab_size, BATCH, generator=generator("verify", "tokens"))
    got = moe.eval()(tokens).logits.float()
    moe.generate(tokens[:1], max_new_tokens=2, do_sample=False)
    source = plan.model.checkpoints[0].path
    dense: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    want = dense.eval()(tokens).logits
    rounded = want if dtype is torch.float32 else dense.to(dtype)(tokens).logits.float()
    kl = F.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none")
    step = _judged(plan, "outputs", _difference(got, want, rounded, dtype))
    run = "" if runs_in is plan.form.model.dtype else "; run in fp32"
    return Step(step.name, step.good, f"{step.outcome}; KL {kl.sum(-1).mean():.1e}{run}")


def _dtypes(plan: Plan) -> tuple[torch.dtype, torch.dtype]:
    """What the MoE is run in, and what else its weights have been rounded to.

    Where scores that are rounded to bf16 change what routers choose it is run in fp32, and an MoE
    that grew is compared with its source in fp32.
    """
    model, stored = plan.model, plan.form.model.dtype
    if isinstance(model, UpcycledModel):
        return torch.float32 if model.scores_collide else stored, stored
    kept = plan.config.dtype is None and not model.recipe.apart
    return torch.float32, torch.float32 if kept else stored


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
