"""Neurons dealt out to experts: every one once, in equal shares, whatever is read first."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import AutoModelForCausalLM

from configs.compose import load_upcycle
from configs.upcycle_schema import Routing
from placement.batches import assign_by_cost
from tests.families import tiny_config
from tests.upcycle.models import logits, random_model, saved
from trainer.data.tokenizers import ByteTokenizer
from trainer.export import export_model
from trainer.upcycle.__main__ import main
from trainer.upcycle.calibration import Tokens, ffn_inputs, prompt_tokens, text_tokens
from trainer.upcycle.clusters import balanced_kmeans
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.layout import DenseShape, Matrix
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.plan import make_plan
from trainer.upcycle.recipe import LayerFFN
from trainer.upcycle.recipes.carve import Carve, activity, distances, marks, neurons
from trainer.upcycle.routers import Random, RouterInit, Zero
from trainer.upcycle.targets import choose

TEXT = "A small text, read byte by byte; that it says little matters little. " * 4
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 300},
    "qwen3": {"vocab_size": 300, "head_dim": 16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    (folder / "text.txt").write_text(TEXT)
    return folder


@cache
def dense(family: str, folder: Path) -> tuple[DenseModel, Tensor]:
    """A dense model on disk with a tokenizer, and its outputs."""
    model = random_model(family, **FAMILIES[family])
    want = logits(model)
    opened = saved(model, folder / family)
    ByteTokenizer().save_pretrained(folder / family)
    return opened, want


def recipes(folder: Path, num_experts: int, top_k: int) -> dict[str, Carve]:
    text: dict[str, Any] = {"calibration": str(folder / "text.txt"), "sequences": 3, "length": 50}
    carve = Carve(num_experts, top_k)
    return {
        "random": carve,
        "kmeans": dataclasses.replace(carve, method="kmeans"),
        "kmeans-gate": dataclasses.replace(carve, method="kmeans", rows="gate"),
        "activation": dataclasses.replace(carve, method="activation", **text),
        "activation-shared": dataclasses.replace(
            carve, method="activation", num_experts=num_experts - 2, shared_experts=2, **text
        ),
    }


def error_of(
    model: DenseModel, want: Tensor, recipe: Carve, router: RouterInit, routing: Routing, to: Path
) -> tuple[float, str]:
    """Largest difference of outputs in plain transformers, and the reason that the plan gives."""
    target = choose("auto", model, recipe.layout(model.shape), routing)
    moe = UpcycledModel([model], recipe, target, routing=routing, router=router)
    export_model(moe.config, moe, to)
    found: Any = AutoModelForCausalLM.from_pretrained(to, output_loading_info=True)
    loaded, info = found
    assert not any(info.values()), info
    difference = float((logits(loaded.eval()) - want).abs().max())
    return difference, moe.layout.inexact_for(routing, router.scores, whole_groups=False)


@pytest.mark.parametrize("routing", [Routing.renormalised, Routing.softmax, Routing.sigmoid])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_experts_are_the_dense_model(
    family: str, routing: Routing, folder: Path, tmp_path: Path
) -> None:
    model, want = dense(family, folder)
    for name, recipe in recipes(folder, 6, 6).items():
        recipe = dataclasses.replace(recipe, top_k=recipe.num_experts)
        if recipe.shared_experts and family == "qwen3" and routing is not Routing.sigmoid:
            continue  # qwen3_moe has no shared expert
        for std in (0.0, 1e-6):
            to = tmp_path / f"{name}-{std}"
            error, reason = error_of(model, want, recipe, Zero(std), routing, to)
            assert error <= 1e-4 * max(1.0, float(want.std())), (name, error)
            assert not reason, (name, reason)


@pytest.mark.parametrize(
    ("top_k", "router", "why"),
    [
        (5, Zero(), "a token reaches the neurons of 5 of 6 experts"),
        (6, Random(0.3), "their weights differ: use router_init=zero"),
    ],
)
def test_everything_else_is_not_and_says_so(
    top_k: int, router: RouterInit, why: str, folder: Path, tmp_path: Path
) -> None:
    model, want = dense("llama", folder)
    recipe = Carve(6, top_k)
    error, reason = error_of(model, want, recipe, router, Routing.renormalised, tmp_path / "moe")
    assert error > 0.1 and why in reason


def test_every_neuron_once_in_equal_shares(folder: Path) -> None:
    model, _ = dense("llama", folder)
    for name, recipe in recipes(folder, 6, 2).items():
        layout = recipe.layout(model.shape)
        for layer in range(model.shape.num_layers):
            found = neurons(recipe, model, layer, 0)
            assert torch.cat(found).sort().values.tolist() == list(range(48)), name
            sizes = [len(one) for one in found]
            assert sizes == [layout.width] * recipe.num_experts + [layout.shared_width], name
            assert layout.width == 8


def test_experts_hold_whole_neurons(folder: Path) -> None:
    """All experts together have every row and column of the dense FFN, bit for bit."""
    model, _ = dense("llama", folder)
    for recipe in recipes(folder, 6, 2).values():
        ffn = LayerFFN([model], 1, 7)
        order_n = torch.cat(neurons(recipe, model, 1, 7))
        for matrix in Matrix:
            dim = 1 if matrix is Matrix.down else 0
            parts = [recipe.expert(ffn, expert, matrix) for expert in range(recipe.num_experts)]
            parts.append(recipe.shared(ffn, matrix))
            assert torch.equal(torch.cat(parts, dim), ffn.take(matrix).index_select(dim, order_n))


def test_neurons_depend_on_seed_and_layer_alone(folder: Path) -> None:
    model, _ = dense("llama", folder)
    for name, recipe in recipes(folder, 6, 2).items():

        def read(layer: int, seed: int = 0, recipe: Carve = recipe) -> list[list[int]]:
            return [one.tolist() for one in neurons(recipe, model, layer, seed)]

        forwards = [read(layer) for layer in range(3)]
        neurons.cache_clear()
        marks.cache_clear()
        assert [read(layer) for layer in (2, 0, 1)] == [forwards[layer] for layer in (2, 0, 1)]
        assert forwards[0] != forwards[1], name
        by_text = recipe.method == "activation"
        assert (read(0, seed=1) == forwards[0]) == by_text, name


def test_a_layer_is_partitioned_once(folder: Path) -> None:
    model, _ = dense("llama", folder)
    recipe = recipes(folder, 6, 2)["activation"]
    target = choose("auto", model, recipe.layout(model.shape), Routing.renormalised)
    moe = UpcycledModel([model], recipe, target, router=Random())
    neurons.cache_clear()
    marks.cache_clear()
    for key in moe.keys():  # noqa: SIM118 (not a dict)
        moe.read(key)
    assert neurons.cache_info().misses == 3 and marks.cache_info().misses == 1


def random_costs(seed: int, whole: bool) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    num_clusters, size = random.integers(1, 8), random.integers(1, 10)
    shape = (num_clusters * size, num_clusters)
    return random.integers(0, 4, shape).astype(float) if whole else random.normal(size=shape)


@pytest.mark.parametrize("whole", [False, True])  # whole numbers tie
def test_assignment_costs_the_least(whole: bool) -> None:
    for seed in range(100):
        cost_nN = random_costs(seed, whole)
        num_points, num_clusters = cost_nN.shape
        label_n = assign_by_cost(cost_nN.copy())
        assert (np.bincount(label_n) == num_points // num_clusters).all()
        repeated = np.repeat(cost_nN, num_points // num_clusters, axis=1)
        best = repeated[linear_sum_assignment(repeated)].sum()
        assert cost_nN[np.arange(num_points), label_n].sum() == pytest.approx(best, abs=1e-9)


def test_assignment_needs_equal_shares() -> None:
    with pytest.raises(ValueError, match=r"\(7\) must be a multiple of the ranks \(3\)"):
        assign_by_cost(np.zeros((7, 3)))


def test_kmeans_finds_what_is_there() -> None:
    """Points around a few directions, in an order that does not show it, from poor seeds."""
    random = np.random.default_rng(0)
    truth_n = random.permutation(np.repeat(np.arange(5), 12))
    points_nD = np.eye(5)[truth_n] + 0.1 * random.normal(size=(60, 5))
    label_n = balanced_kmeans(points_nD, np.arange(5), rounds=20)
    assert len({*zip(truth_n.tolist(), label_n.tolist(), strict=True)}) == 5


def test_marks_are_the_most_active_neurons(folder: Path) -> None:
    """One token and one neuron at a time."""
    model, _ = dense("llama", folder)
    recipe = dataclasses.replace(recipes(folder, 6, 2)["activation"], sequences=1, length=9)
    tokens = text_tokens(model.checkpoint.path, recipe.calibration, sequences=1, length=9)
    marked = marks(recipe, model)
    for layer, x_tH in ffn_inputs(model.checkpoint.path, tokens):
        gate_nH, up_nH = (model.neurons(layer, m, None) for m in (Matrix.gate, Matrix.up))
        for x_H, marked_K in zip(x_tH, marked[layer], strict=True):
            cosines = [
                (float(x_H @ g / x_H.norm() / g.norm()), float(x_H @ u / x_H.norm() / u.norm()))
                for g, u in zip(gate_nH, up_nH, strict=True)
            ]
            silu = [abs(g / (1 + np.exp(-g)) * u) for g, u in cosines]
            assert set(marked_K.tolist()) == set(np.argsort(silu)[-10:].tolist())


def test_distances_are_between_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    marked_tK = torch.rand(30, 7, generator=generator).topk(3).indices
    column_tn = torch.zeros(30, 7)
    for token, marked in enumerate(marked_tK):
        column_tn[token, marked] = 1
    centres = torch.tensor([4, 1])
    columns = [(column_tn[:, neuron], column_tn[:, centres]) for neuron in range(7)]
    want = [(one[:, None] - two).abs().sum(0).tolist() for one, two in columns]
    assert distances(marked_tK, 7, centres).tolist() == want


def test_shared_neurons_are_the_busiest(folder: Path) -> None:
    model, _ = dense("llama", folder)
    recipe = recipes(folder, 6, 2)["activation-shared"]
    for layer in range(3):
        rate_n = torch.bincount(marks(recipe, model)[layer].flatten(), minlength=48)
        *routed, shared = neurons(recipe, model, layer, 0)
        assert len(shared) == 16 and rate_n[shared].min() >= rate_n[torch.cat(routed)].max()
        assert rate_n[shared].max() > rate_n[torch.cat(routed)].min()


def test_activity_ignores_sizes(folder: Path) -> None:
    model, _ = dense("llama", folder)
    x_tH = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(activity(model, 0, x_tH), activity(model, 0, 7 * x_tH), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma", "olmo2", "mixtral", "glm4_moe"])
def test_inputs_of_ffns(family: str, tmp_path: Path) -> None:
    """What a hook-free forward gives them: padding left out, whatever shares a batch."""
    if family in ("mixtral", "glm4_moe"):
        model: Any = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=300)).eval()
    else:
        own = {"head_dim": 8} if family == "gemma" else {}
        model = random_model(family, vocab_size=300, **own)
    model.save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    texts = ["short", "a longer text", "x"]
    tokens = prompt_tokens(tmp_path, texts)
    assert tokens.mask_ST.sum(1).tolist() == [5, 13, 1]
    found: dict[int, list[Tensor]] = {}
    for layer, x_nH in ffn_inputs(tmp_path, tokens, batch_size=2, layers=[1, 0]):
        found.setdefault(layer, []).append(x_nH)
    assert list(found) == [1, 0]
    for layer in (0, 1):
        assert [len(x_nH) for x_nH in found[layer]] == [18, 1]
        alone = [
            x_nH
            for text in texts
            for _, x_nH in ffn_inputs(tmp_path, prompt_tokens(tmp_path, [text]), layers=[layer])
        ]
        assert torch.allclose(torch.cat(found[layer]), torch.cat(alone), atol=1e-4)
    if family == "llama":
        block = model.model.layers[0]
        ids = torch.tensor([list(b"a longer text")])
        with torch.no_grad():
            state = model.model.embed_tokens(ids)
            rotary = model.model.rotary_emb(state, torch.arange(13)[None])
            mask = torch.full((13, 13), -1e9).triu(1)[None, None]
            attended, _ = block.self_attn(block.input_layernorm(state), rotary, mask)
            want = block.post_attention_layernorm(state + attended)[0]
        assert torch.allclose(found[0][0][5:], want, atol=1e-5)


def test_text_is_cut_into_sequences(folder: Path, tmp_path: Path) -> None:
    model, _ = dense("llama", folder)
    (tmp_path / "text.txt").write_text("abcdefghijk")
    path = model.checkpoint.path
    tokens = text_tokens(path, str(tmp_path / "text.txt"), sequences=9, length=4)
    rows = [bytes(ids[m].tolist()) for ids, m in zip(*tokens, strict=True)]
    assert rows == [b"abcd", b"efgh", b"ijk"]
    tokens = text_tokens(path, str(tmp_path / "text.txt"), sequences=2, length=4)
    assert tokens.ids_ST.shape == (2, 4) and tokens.mask_ST.all()


def test_unusable_texts(folder: Path, tmp_path: Path) -> None:
    model, _ = dense("llama", folder)
    path = model.checkpoint.path
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("")
    for name, why in (("bytes", "UTF-8"), ("empty", "0 tokens"), ("absent", "must be a text file")):
        with pytest.raises(ValueError, match=why):
            text_tokens(path, str(tmp_path / name), sequences=1, length=4)
    with pytest.raises(ValueError, match=r"recipe.calibration must be"):
        text_tokens(path, None, sequences=1, length=4)
    with pytest.raises(ValueError, match=r"recipe.length \(0\) must be >= 1"):
        text_tokens(path, str(folder / "text.txt"), sequences=1, length=0)
    with pytest.raises(ValueError, match="has no tokens"):
        prompt_tokens(path, ["a", ""])
    with pytest.raises(ValueError, match="no tokenizer"):
        prompt_tokens(saved(random_model("llama"), tmp_path / "bare").checkpoint.path, ["a"])
    beyond = Tokens(torch.tensor([[300]]), torch.tensor([[True]]))
    with pytest.raises(ValueError, match="gives the id 300, its vocab_size is 300"):
        next(ffn_inputs(path, beyond))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            {"num_experts": 7},
            r"recipe.num_experts \(7\) \+ .* must divide the number",
        ),
        ({"method": "best"}, r"recipe.method \(best\) must be random or kmeans or activation"),
        ({"method": "kmeans", "rows": "down"}, r"recipe.rows \(down\) must be up or gate"),
        ({"method": "activation"}, r"needs recipe.calibration=FILE.txt"),
        ({"method": "activation", "calibration": "x", "marks": 49}, r"recipe.marks \(49\)"),
        ({"shared_experts": 2}, r"recipe.shared_experts \(2\) is for recipe.method=activation"),
        ({"shared_experts": -1}, r"recipe.shared_experts \(-1\) must be >= 0"),
        ({"calibration": "x"}, r"recipe.calibration \(x\) is for recipe.method=activation"),
        ({"top_k": 9}, r"recipe.top_k \(9\) must be between 1 and recipe.num_experts \(8\)"),
    ],
)
def test_refusals(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Carve(**fields).layout(DenseShape(3, 32, 48))


def test_one_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense("llama", folder)
    arguments = [
        f"source={folder / 'llama'}",
        f"target_dir={tmp_path / 'moe'}",
        "recipe=carve",
        "recipe.method=activation",
        "recipe.num_experts=4",
        "recipe.shared_experts=2",
        f"recipe.calibration={folder / 'text.txt'}",
    ]
    assert main([*arguments, "recipe.top_k=4", "router_init=zero"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 of width 8, top 4, shared expert of 16" in said and "FAILED" not in said
    assert "begins as the dense model │ yes" in said and "copies collide" not in said


def test_the_text_is_part_of_the_conversion(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is written where it is missing, and another text is another one."""
    text = tmp_path / "text.txt"
    dense("llama", folder)
    overrides = [f"source={folder / 'llama'}", f"target_dir={tmp_path / 'moe'}", "recipe=carve"]
    overrides += ["recipe.method=activation", "recipe.length=50", f"recipe.calibration={text}"]
    for command in (overrides, [*overrides, "dry_run=true"]):
        assert main(command) == 2
        assert "must be a text file in UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()
    identities = []
    for line in ("one text " * 50, "another one " * 50):
        text.write_text(line)
        identities.append(make_plan(load_upcycle(*overrides)).identity([]))
    assert identities[0] != identities[1]
