"""Several dense models in one MoE: every FFN an expert, the rest averaged; refused if they differ
in more than their weights."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from configs.compose import load_upcycle
from configs.upcycle_schema import Routing
from tests.upcycle.models import logits, random_model, saved
from tests.upcycle.test_convert import MEASURES, measured
from trainer.data.tokenizers import ByteTokenizer
from trainer.export import export_model
from trainer.upcycle.__main__ import main
from trainer.upcycle.alike import shape_of
from trainer.upcycle.convert import RECEIPT
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.plan import make_plan
from trainer.upcycle.recipe import Recipe
from trainer.upcycle.recipes.copy import Copy
from trainer.upcycle.recipes.merge import Merge
from trainer.upcycle.routers import Random
from trainer.upcycle.targets import choose

warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 8},
    "phi3": {},
}


def opened(family: str, folder: Path, seeds: list[int], **fields: Any) -> list[DenseModel]:
    """A model per seed; the same seed is the same weights in a folder of its own."""
    fields = FAMILIES.get(family, {}) | fields
    return [
        saved(random_model(family, seed=seed, **fields), folder / f"{family}-{number}")
        for number, seed in enumerate(seeds)
    ]


def merged(models: list[DenseModel], recipe: Recipe, routing: Routing) -> UpcycledModel:
    target = choose("auto", models[0], recipe.layout(shape_of(models)), routing)
    return UpcycledModel(models, recipe, target, routing=routing, router=Random(0.3))


def exported(moe: UpcycledModel, folder: Path) -> Any:
    export_model(moe.config, moe, folder)
    found: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = found
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def dense_logits(model: DenseModel) -> Tensor:
    path = model.checkpoint.path
    plain: Any = AutoModelForCausalLM.from_pretrained(path)
    return logits(plain.eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_are_the_same(family: str, tmp_path: Path) -> None:
    """Three folders with the same weights: the MoE computes what each of them does."""
    models = opened(family, tmp_path, [0, 0, 0])
    moe = merged(models, Merge(top_k=2, copies=2), Routing.renormalised)
    assert not moe.inexact and moe.layout.alike and moe.layout.num_experts == 6
    got, want = logits(exported(moe, tmp_path / "moe")), dense_logits(models[2])
    assert float((got - want).abs().max()) <= 1e-4 * max(1.0, float(want.std()))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_forced_expert_is_its_model(family: str, copies: int, tmp_path: Path) -> None:
    """One expert per token, always the same, and the rest of that model: exactly its outputs."""
    one, other = opened(family, tmp_path, [0, 1])
    for order in ([one, other], [one, other, one]):
        recipe = Merge(top_k=1, copies=copies, rest="first")
        target = choose("glm4_moe", one, recipe.layout(shape_of(order)), Routing.sigmoid)
        moe = UpcycledModel(order, recipe, target, routing=Routing.sigmoid, router=Random(0.3))
        assert "FFNs of" in moe.inexact
        model = exported(moe, tmp_path / f"moe{len(order)}")
        for place, source in enumerate(order):
            for expert in range(place * copies, (place + 1) * copies):
                for layer in model.model.layers:
                    layer.mlp.gate.e_score_correction_bias.zero_()[expert] = 100.0
                error = float((logits(model) - dense_logits(one)).abs().max())
                assert (error < 1e-5) == (source is one), (place, expert, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rest_is_the_mean(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of three models in float64, rounded once; FFNs keep their bytes."""
    plain = [random_model("llama", seed=seed).to(dtype) for seed in range(3)]
    states = [model.state_dict() for model in plain]
    models = [saved(m, tmp_path / str(seed), dtype) for seed, m in enumerate(plain)]
    moe = merged(models, Merge(copies=2), Routing.renormalised)
    for key in models[0].names():
        exact = torch.stack([state[key].double() for state in states]).mean(0)
        got = moe.read(key)
        assert got.dtype == dtype
        assert torch.allclose(got.double(), exact, rtol=2e-7, atol=2e-7) or (
            dtype is torch.bfloat16 and torch.equal(got, exact.float().to(dtype))
        )
    for expert in range(6):
        stem = "model.layers.1.mlp"
        parts = [states[expert // 2][f"{stem}.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(moe.read(f"{stem}.experts.{expert}.gate_up_proj"), torch.cat(parts))
        down = moe.read(f"{stem}.experts.{expert}.down_proj")
        assert torch.equal(down, states[expert // 2][f"{stem}.down_proj.weight"])
    first = merged(models, Merge(rest="first"), Routing.renormalised)
    assert all(torch.equal(first.read(key), states[0][key]) for key in models[0].names())


@pytest.mark.skipif(not MEASURES, reason="only Linux tells anonymous memory (/proc/self/status)")
@pytest.mark.parametrize(
    "recipe",
    ["recipe=merge", "recipe=innovator recipe.granularity=4 recipe.top_k=4"],
)
def test_memory(recipe: str, tmp_path: Path) -> None:
    """At most two of the largest tensors, however many models there are."""
    fields: dict[str, Any] = {"vocab_size": 6144, "hidden_size": 512, "intermediate_size": 1536}
    model = random_model("llama", num_hidden_layers=4, **fields)
    paths = []
    for number in range(8):
        paths.append(saved(model, tmp_path / str(number), torch.bfloat16).checkpoint.path)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.add_(1)  # all differ
    largest = 2 * 6144 * 512
    source = ",".join(map(str, paths))
    arguments = [f"source=[{source}]", f"target_dir={tmp_path / 'moe'}", *recipe.split()]
    extra, written = measured(arguments)
    assert written > 10 * largest
    assert extra <= 2 * largest, (extra / largest, written / largest)


def test_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened("llama", tmp_path, [0, 1])
    source = f"source=[{tmp_path / 'llama-0'},{tmp_path / 'llama-1'}]"
    assert main([source, f"target_dir={tmp_path / 'moe'}", "recipe=merge"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of width 48, top 2" in said and "no: experts are the FFNs of 2 models" in said
    receipt = json.loads((tmp_path / "moe" / RECEIPT).read_text())
    assert not receipt["exact"] and len(receipt["source_files"]) == 2
    assert "bit for bit" in receipt["measured"]["tensors"]


@pytest.mark.parametrize(
    ("family", "fields", "why"),
    [
        ("llama", {"vocab_size": 71}, "vocab_size is 67 in .*llama-0, 71 in .*llama-0"),
        ("llama", {"intermediate_size": 40}, "intermediate_size is 48 .* 40 in"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads is 2 .* 4 in"),
        ("llama", {"rms_norm_eps": 1e-3}, "rms_norm_eps is 1e-06 .* 0.001 in"),
        ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings is False .* True in"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "rope_parameters.rope_theta is 10000.0 .* 500.0 in",
        ),
        ("mistral", {"sliding_window": None}, "model_type is 'llama' .* 'mistral' in"),
    ],
)
def test_other_architectures(family: str, fields: dict[str, Any], why: str, tmp_path: Path) -> None:
    """Refused before anything is written, with the key and both values."""
    opened("llama", tmp_path / "a", [0])
    (other,) = opened(family, tmp_path / "b", [1], **fields)
    source = f"source=[{tmp_path / 'a' / 'llama-0'},{other.checkpoint.path}]"
    config = load_upcycle(source, f"target_dir={tmp_path / 'moe'}", "recipe=merge")
    with pytest.raises(ValueError, match=f"source: .*{why}"):
        make_plan(config)
    assert main([source, f"target_dir={tmp_path / 'moe'}", "recipe=merge"]) == 2
    assert not (tmp_path / "moe").exists()


def test_values_that_change_nothing_may_differ(tmp_path: Path) -> None:
    fields = {"eos_token_id": 5, "max_position_embeddings": 256, "initializer_range": 0.1}
    models = opened("llama", tmp_path / "a", [0]) + opened("llama", tmp_path / "b", [1], **fields)
    assert merged(models, Merge(), Routing.renormalised).layout.num_models == 2


def test_other_dtypes(tmp_path: Path) -> None:
    one = saved(random_model("llama"), tmp_path / "one")
    other = saved(random_model("llama", seed=1), tmp_path / "other", torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtypes is \['F32'\] in .*one, \['BF16'\] in .*other"):
        merged([one, other], Merge(), Routing.renormalised)


def test_biases_of_one_alone(tmp_path: Path) -> None:
    """A model without biases has no place for the other's: they would be lost."""
    plain = random_model("qwen2")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("proj.bias"):
                parameter.zero_()
    models = [saved(plain, tmp_path / "one"), saved(random_model("qwen2"), tmp_path / "other")]
    with pytest.raises(ValueError, match=r"qkv_bias is False in .*one, True in .*other"):
        merged(models, Merge(), Routing.renormalised)


def test_other_tokenizers(tmp_path: Path) -> None:
    models = opened("llama", tmp_path, [0, 1])
    paths = [model.checkpoint.path for model in models]
    ByteTokenizer().save_pretrained(paths[0])
    assert merged(models, Merge(), Routing.renormalised)  # the other one has none
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(paths[0] / name, paths[1] / name)
    content = json.loads((paths[1] / "tokenizer.json").read_text())
    content["padding"] = {"strategy": "BatchLongest"}  # changes no id
    (paths[1] / "tokenizer.json").write_text(json.dumps(content, indent=1))
    assert merged(models, Merge(), Routing.renormalised)
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (paths[1] / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json: model.vocab.a is 97 in .*, 98 in"):
        merged(models, Merge(), Routing.renormalised)
    (paths[1] / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"llama-1/tokenizer.json: not a tokenizer"):
        merged(models, Merge(), Routing.renormalised)


def test_wrong_numbers(tmp_path: Path) -> None:
    models = opened("llama", tmp_path, [0, 1])
    for recipe, why in (
        (Merge(top_k=3), r"recipe.top_k \(3\) must be between 1 and .* \(2\)"),
        (Merge(copies=0), r"recipe.copies \(0\) must be >= 1"),
        (Merge(rest="last"), r"recipe.rest \(last\) must be mean or first"),
        (Copy(4, 2), "recipe=copy takes one model, not 2"),
    ):
        with pytest.raises(ValueError, match=why):
            merged(models, recipe, Routing.renormalised)
    with pytest.raises(ValueError, match="recipe=merge needs several models"):
        merged(models[:1], Merge(), Routing.renormalised)
