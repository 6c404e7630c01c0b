"""What other converters get wrong without an error is right here, or refused with its reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from configs.compose import load_upcycle
from configs.upcycle_schema import Routing
from tests.upcycle.models import SIZES, logits, random_model, saved
from trainer.export import export_model
from trainer.upcycle.__main__ import main
from trainer.upcycle.advice import advice
from trainer.upcycle.convert import RECEIPT
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.plan import make_plan
from trainer.upcycle.recipes.copy import Copy
from trainer.upcycle.recipes.drop import Drop
from trainer.upcycle.recipes.split import Split
from trainer.upcycle.routers import Random, Zero
from trainer.upcycle.targets import choose

# what decides a family's computation and has another default there
EXPLICIT = {
    "qwen2_moe": ("norm_topk_prob", "qkv_bias", "head_dim", "mlp_only_layers", "layer_types"),
    "qwen3_moe": ("norm_topk_prob", "head_dim", "attention_bias", "mlp_only_layers"),
    "mixtral": ("head_dim", "sliding_window"),
    "glm4_moe": (
        "norm_topk_prob",
        "routed_scaling_factor",
        "first_k_dense_replace",
        "n_group",
        "topk_group",
        "use_qk_norm",
        "attention_bias",
        "head_dim",
        "num_nextn_predict_layers",
    ),
    "ernie4_5_moe": ("moe_layer_start_index", "moe_layer_end_index", "moe_norm_min", "use_bias"),
    "flex_olmo": ("norm_topk_prob", "attention_bias"),
}
ALWAYS = ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "num_experts_per_tok")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses before any work."""
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("family", EXPLICIT)
def test_configurations_leave_nothing_to_defaults(family: str, tmp_path: Path) -> None:
    source = {"qwen3_moe": "qwen3", "flex_olmo": "olmo2"}.get(family, "llama")
    saved(random_model(source), tmp_path / "dense")
    routing = "sigmoid" if family == "glm4_moe" else "renormalised"
    arguments = [f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'moe'}"]
    assert main([*arguments, f"target={family}", f"routing={routing}", "verify=false"]) == 0
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    known = AutoConfig.for_model(family).attribute_map
    for field in (*ALWAYS, *EXPLICIT[family]):
        assert known.get(field, field) in written, field
    rope = written["rope_parameters"]
    assert rope["rope_theta"] == written["rope_theta"] == 10000.0
    if family == "glm4_moe":
        assert rope["partial_rotary_factor"] == 1.0


def test_a_tied_head_is_neither_lost_nor_doubled(tmp_path: Path) -> None:
    saved(random_model("qwen3", tie_word_embeddings=True), tmp_path / "dense")
    assert main([f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'moe'}"]) == 0
    assert "lm_head.weight" not in load_file(tmp_path / "moe" / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("lost", ["mlp.gate.weight", "mlp.experts.1.up_proj.weight"])
def test_a_lost_tensor_is_found(
    lost: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers goes on with a random router in its place."""
    monkeypatch.setenv("COLUMNS", "200")
    saved(random_model("llama"), tmp_path / "dense")
    assert main([f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'moe'}"]) == 0
    weights = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(weights)
    del tensors[f"model.layers.1.{lost}"]
    save_file(tensors, weights, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "moe")]) == 1
    assert f"model.layers.1.{lost} is None, planned" in capsys.readouterr().out


def test_experts_are_in_order_beyond_ten(tmp_path: Path) -> None:
    """Experts that differ, numbered past 10, and a router that sends to one of them alone."""
    model = saved(random_model("llama"), tmp_path / "dense")
    recipe = Drop(12, 1, share=0.5)
    target = choose("auto", model, recipe.layout(model.shape), Routing.renormalised)
    moe = UpcycledModel([model], recipe, target, routing=Routing.renormalised, router=Random())
    export_model(moe.config, moe, tmp_path / "moe")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    for layer, block in enumerate(loaded.model.layers):
        for expert in range(12):
            stem = f"model.layers.{layer}.mlp.experts.{expert}"
            assert torch.equal(block.mlp.experts.gate_up_proj[expert], moe[f"{stem}.gate_up_proj"])
            assert torch.equal(block.mlp.experts.down_proj[expert], moe[f"{stem}.down_proj"])


def test_selection_biases_stay_fp32(tmp_path: Path) -> None:
    saved(random_model("llama"), tmp_path / "dense", torch.bfloat16)
    arguments = [f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'moe'}"]
    assert main([*arguments, "target=glm4_moe", "routing=sigmoid"]) == 0
    with safe_open(tmp_path / "moe" / "model.safetensors", "pt") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    biases = {key for key in dtypes if key.endswith("e_score_correction_bias")}
    assert len(biases) == 3 and {dtypes[key] for key in biases} == {"F32"}
    assert {dtypes[key] for key in dtypes.keys() - biases} == {"BF16"}


def test_tokens_do_not_all_fall_on_the_same_experts(tmp_path: Path) -> None:
    """The default router and `zero` spread them; without noise they all do, and that is said."""
    model = saved(random_model("llama"), tmp_path / "dense")
    x_TH = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    for router, alone in ((Random(), False), (Zero(), False), (Zero(std=0), True)):
        target = choose("mixtral", model, Copy(4, 1).layout(model.shape), Routing.renormalised)
        moe = UpcycledModel([model], Copy(4, 1), target, router=router)
        scores_TN = x_TH @ moe["model.layers.0.mlp.gate.weight"].T
        load_N = torch.bincount(scores_TN.topk(1).indices.ravel(), minlength=4)
        assert bool(load_N.max() == 400) == alone
        assert alone or load_N.min() > 20
    plan = make_plan(
        load_upcycle(
            f"source={tmp_path / 'dense'}", "target_dir=x", "router_init=zero", "router_init.std=0"
        )
    )
    assert any("all scores are equal" in line for line in advice(plan))


def test_widths_that_grouped_products_refuse(tmp_path: Path) -> None:
    saved(random_model("llama"), tmp_path / "dense")
    values = ["recipe=split", "recipe.num_experts=8", "recipe.granularity=4", "recipe.top_k=4"]
    plan = make_plan(load_upcycle(f"source={tmp_path / 'dense'}", "target_dir=x", *values))
    assert any("12 neurons, no multiple of 8" in line for line in advice(plan))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["recipe=split", "recipe.top_k=3"], "must divide recipe.top_k (3)"),
        (["recipe=split", "recipe.granularity=5"], "must divide recipe.num_experts (64)"),
        (["recipe=split", "recipe.num_experts=56", "recipe.top_k=7", "recipe.granularity=7"],
         "must divide the number of neurons (48)"),
        (["recipe.top_k=9"], "recipe.top_k (9) must be between 1 and recipe.num_experts (8)"),
        (["recipe.num_experts=1"], "recipe.num_experts (1) must be >= 2"),
        (["recipe=split", "recipe.order=up"], "recipe.order (up) must be copy or part"),
        (["recipe=drop", "recipe.share=1.5"], "recipe.share (1.5) must be between 0 and 1"),
        (["recipe=shared", "recipe.shared_width=48"], "recipe.shared_width (48) must be between 1"),
        (["target=mistral"], "target (mistral) must be auto or one of qwen2_moe"),
        (["target=flex_olmo"], "flex_olmo has its norms after attention"),
        (["target=mixtral", "routing=softmax"], "mixtral has no routing=softmax"),
        (["target=mixtral", "recipe=shared"], "mixtral has no shared expert"),
        (["dtype=float64"], "dtype (float64) must be null or one of float32"),
        (["max_shard_gb=0"], "max_shard_gb (0.0) must be > 0"),
        (["recipe=copies"], "recipe=copies: no such choice; did you mean copy?"),
        (["recipe.experts=8"], "recipe.experts: no such key"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(
    values: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(random_model("llama"), tmp_path / "dense")
    told = refused(capsys, f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'o'}", *values)
    assert said in told and "Traceback" not in told
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("llama", {"mlp_bias": True}, "is not zero, and experts have no biases"),
        ("llama", {"attention_bias": True}, "has no bias of the attention's output"),
        ("phi3", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default",
                                      "partial_rotary_factor": 0.5}}, "rotates whole heads"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
         "has one window for all layers"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        ("gemma2", {"head_dim": 8}, "gemma2 cannot be upcycled: its norms"),
        ("mixtral", {}, "mixtral cannot be upcycled"),
    ],
)  # fmt: skip
def test_models_that_no_target_computes(
    family: str, fields: dict[str, Any], said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = AutoConfig.for_model(family, **{**SIZES, **fields})
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.5)
    model.save_pretrained(tmp_path / "dense")
    told = refused(capsys, f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'o'}")
    assert said in told
    assert not (tmp_path / "o").exists()


def test_biases_that_are_zero_are_left_out(tmp_path: Path) -> None:
    model = random_model("llama", mlp_bias=True, attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    want = logits(model)
    saved(model, tmp_path / "dense")
    assert main([f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'moe'}"]) == 0
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "moe"))
    assert float((got - want).abs().max()) < 1e-4


def test_a_torn_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(random_model("llama"), tmp_path / "dense")
    weights = tmp_path / "dense" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    told = refused(capsys, f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'moe'}")
    assert "model.safetensors: torn or unreadable" in told


def test_a_source_of_several_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(random_model("llama"), tmp_path / "dense", torch.bfloat16)
    weights = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, weights, metadata={"format": "pt"})
    arguments = [f"source={tmp_path / 'dense'}", f"target_dir={tmp_path / 'moe'}"]
    assert "tensors of BF16 and F32; say with dtype=" in refused(capsys, *arguments)
    assert main([*arguments, "dtype=float32"]) == 0


def test_parts_need_their_granularity(tmp_path: Path) -> None:
    """Three of two-part copies: a token would meet half a copy; nothing is written."""
    model = saved(random_model("llama"), tmp_path / "dense")
    with pytest.raises(ValueError, match=r"recipe\.granularity \(2\) must divide recipe\.top_k"):
        Split(8, 3, granularity=2).layout(model.shape)


@pytest.mark.parametrize("target", ["qwen3_moe", "qwen2_moe", "mixtral", "flex_olmo", "glm4_moe"])
def test_scores_that_collide_in_bf16(target: str, tmp_path: Path) -> None:
    """Parts of one copy have one score; where bf16 lets other copies have it too, fp32 judges."""
    sources = {"flex_olmo": "olmo2", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}
    family = sources.get(target, "llama")
    routing = "sigmoid" if target == "glm4_moe" else "renormalised"
    for seed in range(2):
        dense = random_model(family, seed=seed, intermediate_size=64)
        source = saved(dense, tmp_path / f"{seed}", torch.bfloat16)
        arguments = [f"source={source.checkpoint.path}", f"target_dir={tmp_path / f'moe{seed}'}"]
        arguments += ["recipe=split", "recipe.granularity=4", f"target={target}", "recipe.top_k=8"]
        arguments += ["recipe.num_experts=64", f"routing={routing}"]
        assert main(arguments) == 0
        assert main(["verify", str(tmp_path / f"moe{seed}")]) == 0
        receipt = json.loads((tmp_path / f"moe{seed}" / RECEIPT).read_text())
        assert receipt["exact"]
        assert receipt["measured"]["outputs"].endswith("run in fp32") == (target != "glm4_moe")
