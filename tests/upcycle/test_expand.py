"""An MoE with more experts: what begins as before, what copies keep, and who gets more of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from configs.compose import load_upcycle
from tests.families import COMMON, FAMILIES, tiny_config
from tests.upcycle.models import random_model
from trainer.data.tokenizers import ByteTokenizer
from trainer.export import export_model
from trainer.hf_checkpoint import HFCheckpoint
from trainer.upcycle.__main__ import main
from trainer.upcycle.calibration import squared_gradients, text_tokens
from trainer.upcycle.convert import RECEIPT
from trainer.upcycle.expanded import SIGMOID, SOFTMAX, ExpandedModel
from trainer.upcycle.plan import make_plan
from trainer.upcycle.recipes.expand import Expand, allocate, parents

TEXT = "A small text, read byte by byte; that it says little matters little. " * 4
# every family whose routing is known, and what its routing can be
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in (*SOFTMAX, *SIGMOID)},
    "qwen2_moe-softmax": ("qwen2_moe", {"norm_topk_prob": False}),
    "olmoe-renormalised": ("olmoe", {"norm_topk_prob": True}),
    "glm4_moe-groups": ("glm4_moe", {"n_group": 4, "topk_group": 2}),
    "glm4_moe-sums": ("glm4_moe", {"norm_topk_prob": False}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "mixtral-one": ("mixtral", {"num_experts_per_tok": 1}),
}


def random_moe(name: str, seed: int = 0, **fields: Any) -> Any:
    """A model whose every parameter and selection bias matters."""
    family, own = MODELS[name]
    if family == "flex_olmo":
        config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES["olmoe"], **fields})
    else:
        config = tiny_config(family, **{**own, **fields})
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.dim() == 1 or "e_score" in key:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.randint(3, 64, (2, 24), generator=torch.manual_seed(0))
    return model(tokens).logits.float()


def expanded(model: Any, folder: Path, recipe: Expand, seed: int = 0) -> ExpandedModel:
    model.save_pretrained(folder)
    return ExpandedModel(HFCheckpoint(folder), recipe, seed)


def loaded(moe: ExpandedModel, folder: Path) -> Any:
    """In plain transformers, which must miss nothing and expect nothing else."""
    export_model(moe.config, moe, folder)
    found: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = found
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("recipe", [Expand(2), Expand(3, apart=0.5)], ids=["2", "3-apart"])
@pytest.mark.parametrize("name", list(MODELS))
def test_all_copies_chosen_are_the_experts_before(
    name: str, recipe: Expand, tmp_path: Path
) -> None:
    model = random_moe(name)
    want = logits(model)
    moe = expanded(model, tmp_path / "before", recipe)
    got = logits(loaded(moe, tmp_path / "after"))
    assert float((got - want).abs().max()) <= 1e-4 * max(1.0, float(want.std()))
    assert not moe.inexact and moe.num_experts == recipe.multiple * 8


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe-softmax", "gpt_oss", "ernie4_5_moe"])
@pytest.mark.parametrize("mode", ["hyperplane", "noise"])
def test_other_modes_are_not_and_say_so(name: str, mode: str, tmp_path: Path) -> None:
    model = random_moe(name)
    want = logits(model)
    moe = expanded(model, tmp_path / "before", Expand(2, mode=mode, amplitude=1.0))
    assert float((logits(loaded(moe, tmp_path / "after")) - want).abs().max()) > 1e-3
    assert ("plane" if mode == "hyperplane" else "take places of others") in moe.inexact
    assert moe.top_k == model.config.num_experts_per_tok


def test_a_longer_normal_vector_disturbs_fewer_tokens(tmp_path: Path) -> None:
    model = random_moe("mixtral")
    want = logits(model).log_softmax(-1)
    found = []
    for amplitude in (0.0, 0.25, 1.0, 64.0):
        recipe = Expand(2, mode="hyperplane", amplitude=amplitude)
        got = logits(
            loaded(expanded(model, tmp_path / "before", recipe), tmp_path / f"{amplitude}")
        )
        got = got.log_softmax(-1)
        found.append(float((want.exp() * (want - got)).sum(-1).mean()))
    assert found[0] > 0.1 and found[0] > found[1] > found[2] > found[3] and found[3] < 1e-2, found


@pytest.mark.parametrize(
    "name", ["glm4_moe", "gpt_oss", "ernie4_5_moe", "deepseek_v2", "granitemoe"]
)
@pytest.mark.parametrize("multiple", [2, 3])
def test_copies_keep_their_bytes(name: str, multiple: int, tmp_path: Path) -> None:
    """Of all that is not told apart, in bf16 with an fp32 selection bias."""
    random_moe(name).save_pretrained(tmp_path / "fp32")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "before")
    plan = make_plan(
        load_upcycle(
            f"source={tmp_path / 'before'}",
            f"target_dir={tmp_path / 'x'}",
            "recipe=expand",
            f"recipe.multiple={multiple}",
        )
    )
    assert plan.form.model.dtype is torch.bfloat16
    export_model(plan.model.config, plan.model, tmp_path / "after", dtype=torch.bfloat16)
    before, after = HFCheckpoint(tmp_path / "before"), HFCheckpoint(tmp_path / "after")
    assert before.dtypes == after.dtypes
    for key in after.logical_keys():
        parameter = plan.form.parameters[key]
        got = after.read(key)
        if parameter.expert is not None:
            want = before.read(key.replace(f".{parameter.expert}.", f".{parameter.expert % 8}."))
        else:
            want = before.read(key)
            if want.shape != got.shape:
                dim = want.shape.index(8)
                want = torch.cat([want] * multiple, dim)
                if name == "ernie4_5_moe" and "e_score" in key:
                    want = (want.float() / multiple).to(want.dtype)
        assert torch.equal(got, want) and got.dtype == want.dtype, key


def test_planes_are_shared_by_the_experts_of_a_layer(tmp_path: Path) -> None:
    model = random_moe("mixtral")
    moe = expanded(model, tmp_path, Expand(2, mode="hyperplane", amplitude=3.0))
    normals = []
    for layer in range(2):
        key = f"model.layers.{layer}.mlp.gate.weight"
        rows, before = moe.read(key), moe.checkpoint.read(key)
        normal_EH = (rows[:8] - rows[8:]) / 2
        assert torch.allclose((rows[:8] + rows[8:]) / 2, before, atol=1e-6)
        assert torch.allclose(normal_EH, normal_EH[:1].expand(8, -1), atol=1e-6)
        assert float(normal_EH[0].norm()) == pytest.approx(3.0, rel=1e-5)
        normals.append(normal_EH[0])
    assert abs(float(normals[0] @ normals[1])) < 8  # of 9


@pytest.mark.parametrize(
    ("name", "noisy", "kept"),
    [
        ("mixtral", "gate.weight", ""),
        ("gpt_oss", "router.bias", "router.weight"),
        ("glm4_moe", "gate.e_score_correction_bias", "gate.weight"),
        ("ernie4_5_moe", "gate.moe_statics.e_score_correction_bias", "gate.weight"),
    ],
)
def test_noise_is_on_copies_alone(name: str, noisy: str, kept: str, tmp_path: Path) -> None:
    moe = expanded(random_moe(name), tmp_path, Expand(3, mode="noise", noise=0.25))
    stem = "model.layers.1.mlp"
    tensor, before = (m.read(f"{stem}.{noisy}") for m in (moe, moe.checkpoint))
    dim = before.shape.index(8)
    added = (tensor - torch.cat([before] * 3, dim)).movedim(dim, 0).reshape(24, -1)
    assert not added[:8].any()
    assert (added[8:] != 0).all() and added.abs().max() <= 0.25 + 1e-6
    assert len(added[8:].unique()) == added[8:].numel()
    if kept:
        rows = moe.checkpoint.read(f"{stem}.{kept}")
        assert torch.equal(moe.read(f"{stem}.{kept}"), torch.cat([rows] * 3))


def test_copies_set_apart_add_up(tmp_path: Path) -> None:
    moe = expanded(random_moe("mixtral"), tmp_path, Expand(3, apart=0.1))
    for expert in range(8):
        stem = "model.layers.1.mlp.experts"
        keys = [f"{stem}.{expert + 8 * copy}.down_proj" for copy in range(3)]
        before = moe.checkpoint.read(keys[0])
        copies = torch.stack([moe.read(key) for key in keys])
        assert torch.allclose(copies.mean(0), before, atol=1e-6)
        share = float((copies - before).std() / before.std())
        assert 0.06 < share < 0.1  # sqrt(2/3) of 0.1
        keys = [f"{stem}.{expert + 8 * copy}.gate_up_proj" for copy in range(3)]
        assert all(torch.equal(moe.read(key), moe.checkpoint.read(keys[0])) for key in keys)


RECIPES = [
    Expand(2, apart=0.1),
    Expand(3, mode="noise"),
    Expand(2, mode="hyperplane"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_depend_on_seed_and_place_alone(recipe: Expand, tmp_path: Path) -> None:
    model = random_moe("mixtral")
    moe = expanded(model, tmp_path, recipe)
    forwards = {key: moe.read(key) for key in moe.keys()}  # noqa: SIM118 (not a dict)
    again = ExpandedModel(HFCheckpoint(tmp_path), recipe)
    assert all(torch.equal(again.read(key), forwards[key]) for key in reversed(again.keys()))
    other = ExpandedModel(HFCheckpoint(tmp_path), recipe, seed=1)
    differ = {key for key in forwards if not torch.equal(other.read(key), forwards[key])}
    assert differ and all(".mlp." in key for key in differ)


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a model with a tokenizer in `moe`."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    random_moe("qwen2_moe", vocab_size=300).save_pretrained(folder / "moe")
    ByteTokenizer().save_pretrained(folder / "moe")
    return folder


def utility_of(folder: Path) -> Expand:
    text = str(folder / "text.txt")
    return Expand(2, mode="noise", allocation="utility", calibration=text, sequences=3, length=21)


def test_utility_is_the_squared_gradient(with_text: Path) -> None:
    """Against one gradient per sequence and expert of the library's own loss."""
    tokens = text_tokens(with_text / "moe", str(with_text / "text.txt"), sequences=3, length=21)
    stacks = [
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in range(2)
        for name in ("gate_up_proj", "down_proj")
    ]
    got = squared_gradients(with_text / "moe", tokens, stacks)
    model: Any = AutoModelForCausalLM.from_pretrained(with_text / "moe")
    for name in stacks:
        for expert in range(8):
            squares = []
            for ids in tokens.ids_ST:
                loss = model(ids[None], labels=ids[None]).loss
                (grad,) = torch.autograd.grad(loss, model.get_parameter(name))
                squares.append(float((grad[expert].double() ** 2).sum()))
            assert float(got[name][expert]) == pytest.approx(sum(squares) / 3, rel=1e-4)


def test_copies_follow_utility(with_text: Path) -> None:
    recipe = utility_of(with_text)
    moe = ExpandedModel(HFCheckpoint(with_text / "moe"), recipe)
    tokens = text_tokens(with_text / "moe", recipe.calibration, sequences=3, length=21)
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        stacks = [f"{stem}.gate_up_proj", f"{stem}.down_proj"]
        found = squared_gradients(with_text / "moe", tokens, stacks)
        utility = sum(found.values(), torch.zeros(8, dtype=torch.float64)).tolist()
        copies = moe.copies[layer]
        assert sum(copies) == 16 and min(copies) >= 1 and max(copies) == 3
        order = sorted(range(8), key=lambda expert: utility[expert])
        assert [copies[expert] for expert in order] == sorted(copies)
        parent = parents(copies)
        rows = moe.checkpoint.read(f"model.layers.{layer}.mlp.gate.weight")[parent]
        added = moe.read(f"model.layers.{layer}.mlp.gate.weight") - rows
        assert not added[:8].any() and 0 < float(added.abs().max()) <= 1e-3 + 1e-7
        for expert in range(16):
            made = moe.read(f"{stem}.{expert}.down_proj")
            assert torch.equal(made, moe.checkpoint.read(f"{stem}.{parent[expert]}.down_proj"))
    assert moe.copies[0] != moe.copies[1]


def test_every_copy_goes_where_it_is_worth_most() -> None:
    draw = random.Random(0)
    for _ in range(200):
        number, most = draw.randint(1, 9), draw.randint(2, 4)
        utility = [draw.random() ** 3 for _ in range(number)]
        total = draw.randint(number, most * number)
        copies = allocate(utility, total, most)
        assert sum(copies) == total and min(copies) >= 1 and max(copies) <= most
        last = [u / (c - 1) for u, c in zip(utility, copies, strict=True) if c > 1]
        following = [u / c for u, c in zip(utility, copies, strict=True) if c < most]
        assert not last or not following or min(last) >= max(following)


def test_parents() -> None:
    assert parents([1, 3, 2]) == [0, 1, 2, 1, 2, 1]
    assert parents([2, 2, 2]) == [0, 1, 2, 0, 1, 2]
    assert allocate([1.0, 1.0, 5.0], 5, 2) == [2, 1, 2]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"multiple": 1}, r"recipe.multiple \(1\) must be >= 2"),
        ({"multiple": 3, "mode": "hyperplane"}, r"recipe.multiple \(3\) must be 2"),
        ({"mode": "triple"}, r"recipe.mode \(triple\) must be double or hyperplane or noise"),
        ({"allocation": "best"}, r"recipe.allocation \(best\) must be uniform or utility"),
        ({"amplitude": -1.0}, r"recipe.amplitude \(-1.0\) must be >= 0"),
        ({"noise": float("nan")}, r"recipe.noise \(nan\) must be >= 0"),
        ({"apart": -0.1}, r"recipe.apart \(-0.1\) must be >= 0"),
        ({"apart": 0.1, "mode": "noise"}, r"recipe.apart \(0.1\).* 0 without recipe.mode=double"),
        ({"calibration": "x"}, r"recipe.calibration \(x\) is for recipe.allocation=utility"),
        ({"allocation": "utility"}, r"needs recipe.mode=noise, not double"),
        ({"allocation": "utility", "mode": "noise"}, r"needs recipe.calibration=FILE.txt"),
        (
            {"allocation": "utility", "mode": "noise", "calibration": "x", "max_copies": 1},
            r"recipe.max_copies \(1\) must be >= recipe.multiple \(2\)",
        ),
    ],
)
def test_refused_settings(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Expand(**fields).check()


def test_refused_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="groups of copies would tie"):
        expanded(random_moe("glm4_moe-groups"), tmp_path / "groups", Expand(mode="noise"))
    with pytest.raises(ValueError, match="needs softmax routing"):
        expanded(random_moe("dots1"), tmp_path / "sigmoid", Expand(mode="hyperplane"))
    with pytest.raises(ValueError, match="llama cannot be expanded"):
        expanded(random_model("llama"), tmp_path / "dense", Expand())
    AutoModelForCausalLM.from_config(tiny_config("phimoe")).save_pretrained(tmp_path / "phimoe")
    with pytest.raises(ValueError, match=r"phimoe cannot be expanded: .*mixtral"):
        ExpandedModel(HFCheckpoint(tmp_path / "phimoe"), Expand())
    random_moe("mixtral").save_pretrained(tmp_path / "moe")
    command = [f"source={tmp_path / 'moe'}", f"target_dir={tmp_path / 'x'}", "recipe=expand"]
    for value, why in (
        ("target=qwen2_moe", "target (qwen2_moe) is for dense sources"),
        ("routing=sigmoid", "routing (sigmoid) is for dense sources"),
        ("scale=down", "scale (down) is for dense sources"),
        ("router_init=zero", "router_init is for dense sources"),
        (f"source=[{tmp_path / 'moe'},{tmp_path / 'moe'}]", "takes one MoE, not 2 models"),
    ):
        assert main([*command, value]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_one_command_by_utility(
    with_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = utility_of(with_text)
    fields = [f"recipe.{k}={getattr(recipe, k)}" for k in ("mode", "allocation", "calibration")]
    command = [f"source={with_text / 'moe'}", f"target_dir={tmp_path / 'after'}", "recipe=expand"]
    assert main([*command, *fields, "recipe.sequences=3", "recipe.length=21"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no: copies of an expert take places of others" in said and "FAILED" not in said
    receipt = json.loads((tmp_path / "after" / RECEIPT).read_text())
    assert not receipt["exact"] and sum(receipt["copies"]["1"]) == 16
    assert float(receipt["measured"]["outputs"].rpartition("KL ")[2]) > 1e-3
