"""Try every causal-LM family of the installed transformers: which run expert-parallel, and why not.

    python -m tests.benchmarks.families

A family "runs" if a shrunken random model of it, split over two EP ranks, gives the same loss as
unsplit; "fits" if its blocks have the seam but no shrunken model could be built and run here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from parallel.mesh import ParallelMesh
from parallel.model import find_experts, parallelize
from tests.families import FAMILIES, tiny_config
from tests.ranks import run_ranks

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shrunken(family: str) -> Any:
    """A small configuration of a family: the one of the tests, or the common fields that it has."""
    if family in FAMILIES:
        return tiny_config(family)
    default = AutoConfig.for_model(family).get_text_config()
    fields = {k: v for k, v in SMALL.items() if getattr(default, k, None) is not None}
    kind: Any = type(default)
    return kind(**fields)


def loss(model: Any) -> float:
    ids = torch.arange(12).reshape(2, 6)
    logits = model(input_ids=ids, use_cache=False).logits
    return float((logits.detach() * torch.cos(logits.detach())).sum())


def losses(family: str) -> tuple[float, float]:
    """Loss of the unsplit model and of the model split over the ranks."""
    torch.manual_seed(0)
    config = shrunken(family)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    whole = loss(model)
    parallelize(model, ParallelMesh.build(ep=2, device_type="cpu"))
    return whole, loss(model)


def meta_model(family: str) -> torch.nn.Module:
    """The family's default model (of the tests, if there is one) without storage."""
    config = tiny_config(family) if family in FAMILIES else AutoConfig.for_model(family)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def try_family(family: str) -> tuple[str, str]:
    """Verdict (runs, fits, wrong, refused, unbuilt, dense) and the reason."""
    try:
        model = meta_model(family)
    except Exception as error:  # whatever a family raises is the answer
        return "unbuilt", f"cannot be built from its default configuration: {short(error)}"
    if not any("expert" in name for name, _ in model.named_modules()):
        return "dense", ""
    try:
        find_experts(model)
    except ValueError as error:
        return "refused", str(error).partition("expert parallelism: ")[2].partition(". Supp")[0]
    try:
        (whole, split), _ = run_ranks(losses, 2, family)
    except AssertionError as error:
        return "fits", str(error).strip().splitlines()[-1]
    same = abs(whole - split) <= 1e-9 * max(1.0, abs(whole))
    return ("runs", "") if same else ("wrong", f"loss {split}, unsplit {whole}")


def short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:110]


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    verdicts: dict[str, list[str]] = {}
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdict, reason = try_family(family)
        verdicts.setdefault(verdict, []).append(family)
        if verdict not in ("dense", "runs"):
            print(f"{family:28} {verdict:8} {reason}", flush=True)
    print(f"\ntransformers {transformers.__version__}")
    for verdict in ("runs", "fits", "wrong", "refused", "unbuilt", "dense"):
        names = verdicts.get(verdict, [])
        listed = "" if verdict == "dense" else ": " + ", ".join(names)
        print(f"{verdict} {len(names)}{listed}")


if __name__ == "__main__":
    main()
