"""An upcycled model begins where the dense model stopped: every dense family, target and recipe."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from configs.upcycle_schema import Routing, Scale
from tests.upcycle.models import DENSE, logits, random_model, saved
from trainer.export import export_model
from trainer.hf_checkpoint import HFCheckpoint
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.layout import Matrix, Scores
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.recipe import Recipe
from trainer.upcycle.recipes.copy import Copy
from trainer.upcycle.recipes.drop import Drop
from trainer.upcycle.recipes.shared import Shared
from trainer.upcycle.recipes.split import Split
from trainer.upcycle.routers import Random, RouterInit, Zero
from trainer.upcycle.targets import TARGETS, Target, choose

warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
RECIPES: dict[str, Recipe] = {
    "copy": Copy(4, 2, shuffle=True),
    "copy-all": Copy(3, 3),
    "copy-one": Copy(2, 1),
    "split": Split(8, 4, granularity=2),
    "split-part": Split(12, 6, granularity=3, order="part"),
    "shared": Shared(4, 2, granularity=2),
    "shared-split": Shared(4, 2, granularity=2, shared_width=16),
    "drop-none": Drop(3, 2, share=0.0),
}
BY_FAMILY = {target.family: target for target in TARGETS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dense")


@cache
def dense(name: str, folder: Path) -> tuple[DenseModel, Tensor]:
    """A dense model of DENSE on disk and its outputs."""
    family, fields = DENSE[name]
    model = random_model(family, **fields)
    want = logits(model)
    return saved(model, folder / name), want


def moe_of(
    model: DenseModel,
    recipe: Recipe,
    target: Target,
    routing: Routing,
    router: RouterInit,
    **more: Any,
) -> UpcycledModel:
    return UpcycledModel([model], recipe, target, routing=routing, router=router, **more)


def loaded(moe: UpcycledModel, folder: Path) -> Any:
    """In plain transformers, which must miss nothing and expect nothing else."""
    export_model(moe.config, moe, folder)
    found: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = found
    assert not any(info.values()), info
    return model.eval()


def pairs() -> list[tuple[str, str]]:
    """Dense models and the targets that can compute them."""
    fits = {
        "llama": ["qwen2_moe", "glm4_moe", "ernie4_5_moe", "mixtral"],
        "llama3-tied": ["qwen2_moe", "glm4_moe", "ernie4_5_moe", "mixtral"],
        "mistral": ["qwen2_moe", "glm4_moe", "ernie4_5_moe", "mixtral"],
        "mistral-window": ["qwen2_moe", "mixtral"],
        "qwen2": ["qwen2_moe", "glm4_moe"],
        "qwen2-windows": ["qwen2_moe"],
        "qwen3": ["qwen3_moe"],
        "qwen3-tied": ["qwen3_moe", "glm4_moe"],
        "olmo2": ["flex_olmo"],
        "gemma": ["qwen2_moe", "glm4_moe", "ernie4_5_moe", "mixtral"],
        "phi3": ["qwen2_moe", "glm4_moe", "ernie4_5_moe", "mixtral"],
    }
    return [(name, family) for name, families in fits.items() for family in families]


@pytest.mark.parametrize(("name", "family"), pairs())
def test_families(name: str, family: str, folder: Path, tmp_path: Path) -> None:
    """Any router, weights that sum to 1: outputs to fp32 rounding."""
    model, want = dense(name, folder)
    target = BY_FAMILY[family]
    routing = target.routings[0]
    recipes = RECIPES if target.shared else {k: v for k, v in RECIPES.items() if "shared" not in k}
    for recipe_name, recipe in recipes.items():
        assert not list(target.problems(model, recipe.layout(model.shape), routing))
        moe = moe_of(model, recipe, target, routing, Random(0.3))
        got = logits(loaded(moe, tmp_path / recipe_name))
        error = float((got - want).abs().max())
        assert error <= 1e-4 * max(1.0, float(want.std())), (recipe_name, error)
        assert not moe.layout.inexact_for(routing, Scores.free, whole_groups=False)


def test_every_other_target_says_why(folder: Path) -> None:
    """What is not in the table above is refused with a reason."""
    possible = set(pairs())
    for name in DENSE:
        model, _ = dense(name, folder)
        layout = Copy().layout(model.shape)
        for target in TARGETS:
            problems = list(target.problems(model, layout, target.routings[0]))
            assert bool(problems) == ((name, target.family) not in possible), (name, problems)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])  # a norm follows OLMo2's FFN
def test_softmax_over_all_experts(name: str, folder: Path, tmp_path: Path) -> None:
    """Exact at equal scores alone, and never promised of parts, whose scores then tie."""
    model, want = dense(name, folder)
    cases: list[tuple[Recipe, RouterInit, bool]] = [
        (Copy(4, 2), Zero(), True),
        (Copy(4, 2), Zero(std=0), True),
        (Copy(4, 2), Random(0.3), False),
        (Shared(4, 2), Random(0.3), True),
        (Split(8, 4, granularity=2, order="part"), Zero(std=0), False),
        (Split(8, 4, granularity=2), Random(0.3), False),
    ]
    for number, (recipe, router, exact) in enumerate(cases):
        target = choose("auto", model, recipe.layout(model.shape), Routing.softmax)
        moe = moe_of(model, recipe, target, Routing.softmax, router)
        reason = moe.layout.inexact_for(Routing.softmax, router.scores, whole_groups=False)
        assert bool(reason) != exact
        error = float((logits(loaded(moe, tmp_path / str(number))) - want).abs().max())
        assert (error <= 1e-4 * max(1.0, float(want.std()))) == exact, (recipe, router, error)


def test_close_scores_break_groups_unless_they_are_structural(folder: Path, tmp_path: Path) -> None:
    """Copies whose scores nearly tie: glm4_moe keeps groups whole, others say they do not."""
    model, want = dense("llama", folder)
    recipe = Split(8, 4, granularity=2)
    router = Zero(std=1e-8)
    glm = moe_of(model, recipe, BY_FAMILY["glm4_moe"], Routing.sigmoid, router)
    assert (glm.config.n_group, glm.config.topk_group) == (4, 2)
    assert float((logits(loaded(glm, tmp_path / "glm")) - want).abs().max()) < 1e-4
    qwen = moe_of(model, recipe, BY_FAMILY["qwen2_moe"], Routing.renormalised, router)
    assert qwen.layout.inexact_for(Routing.renormalised, router.scores, whole_groups=False)
    assert float((logits(loaded(qwen, tmp_path / "qwen")) - want).abs().max()) > 1e-2


@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("family", ["glm4_moe", "mixtral"])
def test_where_the_factor_goes(family: str, scale: Scale, folder: Path, tmp_path: Path) -> None:
    model, want = dense("llama", folder)
    target = BY_FAMILY[family]
    moe = moe_of(
        model, Split(9, 6, granularity=3), target, target.routings[0], Random(), scale=scale
    )
    assert float((logits(loaded(moe, tmp_path / "moe")) - want).abs().max()) < 1e-4
    own = family == "glm4_moe" and scale is Scale.auto
    assert getattr(moe.config, "routed_scaling_factor", 1.0) == (3.0 if own else 1.0)
    plain = model.neurons(1, Matrix.down, slice(0, 16))
    down = moe.read("model.layers.1.mlp.experts.0.down_proj")
    factor = {Scale.down: 3.0, Scale.spread: 3**0.5, Scale.auto: 1.0 if own else 3**0.5}[scale]
    assert torch.allclose(down, plain * factor)


def test_without_the_factor_it_is_wrong(folder: Path, tmp_path: Path) -> None:
    """The tests above can fail: parts that are not scaled lose most of the output."""
    model, want = dense("llama", folder)
    moe = moe_of(
        model, Split(8, 4, granularity=2), BY_FAMILY["mixtral"], Routing.renormalised, Random()
    )
    moe.factor = 1.0
    assert float((logits(loaded(moe, tmp_path / "moe")) - want).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "olmo2"])
def test_copies_keep_their_bytes(name: str, folder: Path, tmp_path: Path) -> None:
    """In bf16, nothing that a recipe leaves alone is rounded anew."""
    family, fields = DENSE[name]
    model = saved(random_model(family, **fields), tmp_path / "dense", torch.bfloat16)
    layout = Copy().layout(model.shape)
    target = choose("auto", model, layout, Routing.renormalised)
    moe = moe_of(model, Copy(2, 1), target, Routing.renormalised, Random())
    export_model(moe.config, moe, tmp_path / "moe", dtype=model.dtype)
    written = HFCheckpoint(tmp_path / "moe")
    assert written.dtypes == {"BF16"}
    for key in model.names():
        assert torch.equal(written.read(key), model.tensor(key)), key
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    for layer in range(model.shape.num_layers):
        for expert in range(2):
            stem = f"model.layers.{layer}.mlp"
            fused = written.read(f"{stem}.experts.{expert}.gate_up_proj")
            if family == "phi3":
                assert torch.equal(fused, state[f"{stem}.gate_up_proj.weight"])
            else:
                parts = [state[f"{stem}.{part}_proj.weight"] for part in ("gate", "up")]
                assert torch.equal(fused, torch.cat(parts))
            down = written.read(f"{stem}.experts.{expert}.down_proj")
            assert torch.equal(down, state[f"{stem}.down_proj.weight"])


@pytest.mark.parametrize(
    ("name", "recipe", "target", "routing"),
    [
        ("llama", Copy(4, 2), "qwen2_moe", Routing.renormalised),
        ("qwen3-tied", Shared(4, 2), "glm4_moe", Routing.sigmoid),
        ("llama", Split(8, 4, granularity=2), "glm4_moe", Routing.sigmoid),
        ("mistral", Split(8, 4, granularity=2), "ernie4_5_moe", Routing.renormalised),
        ("gemma", Copy(4, 2), "mixtral", Routing.renormalised),
        ("olmo2", Copy(4, 2), "flex_olmo", Routing.renormalised),
    ],
)
def test_bf16(name: str, recipe: Recipe, target: str, routing: Routing, tmp_path: Path) -> None:
    """In bf16 no further from the dense model in fp32 than 3 times the dense model in bf16."""
    family, fields = DENSE[name]
    model = saved(random_model(family, **fields), tmp_path / "dense", torch.bfloat16)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    want, rounded = logits(plain), logits(plain.to(torch.bfloat16))
    moe = moe_of(model, recipe, BY_FAMILY[target], routing, Random(0.3))
    export_model(moe.config, moe, tmp_path / "moe", dtype=torch.bfloat16)
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.bfloat16))
    allowed = 3 * float((rounded - want).abs().max())
    assert float((got - want).abs().max()) <= allowed


def test_generation_runs(folder: Path, tmp_path: Path) -> None:
    model, _ = dense("qwen2", folder)
    moe = moe_of(model, Copy(4, 2), BY_FAMILY["qwen2_moe"], Routing.renormalised, Random())
    tokens = torch.tensor([[5, 6, 7]])
    plain: Any = AutoModelForCausalLM.from_pretrained(folder / "qwen2")
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = plain.generate(tokens, **asked)
    assert torch.equal(loaded(moe, tmp_path / "moe").generate(tokens, **asked), want)
