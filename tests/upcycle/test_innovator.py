"""The general FFN shared, those of disciplines cut into routed experts beside it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from configs.compose import load_upcycle
from configs.upcycle_schema import Routing
from tests.upcycle.models import logits, random_model, saved
from tests.upcycle.test_merge import exported
from trainer.upcycle.__main__ import main
from trainer.upcycle.advice import advice
from trainer.upcycle.alike import shape_of
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.layout import Matrix
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.plan import make_plan
from trainer.upcycle.recipes.innovator import Innovator
from trainer.upcycle.routers import Random
from trainer.upcycle.targets import choose

warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
TARGETS = (
    ("qwen2_moe", Routing.renormalised),
    ("glm4_moe", Routing.sigmoid),
    ("ernie4_5_moe", Routing.renormalised),
)


def opened(folder: Path, seeds: list[int]) -> list[DenseModel]:
    return [
        saved(random_model("llama", seed=seed), folder / str(number))
        for number, seed in enumerate(seeds)
    ]


def made(models: list[DenseModel], recipe: Innovator, family: str, routing: Routing) -> Any:
    target = choose(family, models[0], recipe.layout(shape_of(models)), routing)
    return UpcycledModel(models, recipe, target, routing=routing, router=Random(0.3))


def general(models: list[DenseModel]) -> Tensor:
    path = models[0].checkpoint.path
    plain: Any = AutoModelForCausalLM.from_pretrained(path)
    return logits(plain.eval())


def ffn(model: DenseModel, layer: int, x_TH: Tensor) -> Tensor:
    gate, up, down = (model.neurons(layer, matrix, None) for matrix in Matrix)
    return F.linear(ACT2FN[model.config.hidden_act](x_TH @ gate.T) * (x_TH @ up.T), down)


@pytest.mark.parametrize(("family", "routing"), TARGETS)
@pytest.mark.parametrize(
    ("seeds", "start", "exact"),
    [([0, 1, 2, 3], "silent", True), ([0, 0, 0, 0], "half", True), ([0, 1, 2, 3], "half", False)],
)
def test_where_it_begins(
    family: str, routing: Routing, seeds: list[int], start: str, exact: bool, tmp_path: Path
) -> None:
    """Silent: as the general model. Half: so too, if the disciplines have not been tuned."""
    models = opened(tmp_path, seeds)
    moe = made(models, Innovator(top_k=4, granularity=2, start=start), family, routing)
    assert moe.layout.num_experts == 6 and bool(moe.inexact) != exact
    got, want = logits(exported(moe, tmp_path / "moe")), general(models)
    error = float((got - want).abs().max())
    assert (error <= 1e-4 * max(1.0, float(want.std()))) == exact, error


@torch.no_grad()
@pytest.mark.parametrize(("family", "routing"), TARGETS)
def test_half_is_half_of_general_and_of_the_chosen(
    family: str, routing: Routing, tmp_path: Path
) -> None:
    """With one discipline per token: the mean of its FFN's output and the general FFN's."""
    models = opened(tmp_path, [0, 1, 2])
    moe = made(models, Innovator(top_k=3, granularity=3), family, routing)
    model = exported(moe, tmp_path / "moe")
    x_TH = torch.randn(50, 32, generator=torch.manual_seed(0))
    for layer, block in enumerate(model.model.layers):
        rows_NH = moe.read(f"model.layers.{layer}.mlp.gate.weight")
        assert torch.equal(rows_NH[:3], rows_NH[:1].expand(3, -1))
        assert torch.equal(rows_NH[3:], rows_NH[3:4].expand(3, -1))
        chosen_T = (x_TH @ rows_NH[[0, 3]].T).argmax(1)
        assert 0 < int(chosen_T.sum()) < 50
        tuned = torch.stack([ffn(one, layer, x_TH) for one in models[1:]])
        want = (ffn(models[0], layer, x_TH) + tuned[chosen_T, torch.arange(50)]) / 2
        got = block.mlp(x_TH[None])
        got = got[0] if isinstance(got, tuple) else got
        assert torch.allclose(got[0], want, atol=1e-4)


def test_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(tmp_path, [0, 1, 2])
    source = f"source=[{','.join(str(tmp_path / str(number)) for number in range(3))}]"
    given = ["recipe=innovator", "recipe.granularity=3", "recipe.top_k=3", source]
    assert main([*given, f"target_dir={tmp_path / 'moe'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "6 of width 16, top 3, shared expert of 48" in said and "FAILED" not in said
    config = load_upcycle(*given, "recipe.start=silent", f"target_dir={tmp_path / 'x'}")
    assert any("only gate and up are kept" in line for line in advice(make_plan(config)))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"granularity": 5}, r"recipe.granularity \(5\) must divide recipe.top_k"),
        ({"granularity": 0}, r"recipe.granularity \(0\) must be >= 1"),
        ({"top_k": 12}, r"recipe.top_k \(12\) must be between .* \(2\) and .* \(4\)"),
        ({"top_k": 0}, r"recipe.top_k \(0\) must be between"),
        ({"start": "loud"}, r"recipe.start \(loud\) must be half or silent"),
    ],
)
def test_refusals(fields: dict[str, Any], why: str, tmp_path: Path) -> None:
    models = opened(tmp_path, [0, 1, 2])
    with pytest.raises(ValueError, match=why):
        made(models, Innovator(**{"top_k": 4, "granularity": 2} | fields), "auto", Routing.sigmoid)
    with pytest.raises(ValueError, match="needs the general model and one per discipline"):
        made(models[:1], Innovator(), "auto", Routing.sigmoid)
