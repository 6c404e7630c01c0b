"""Where routers begin: from attention heads, prompts and texts, against slow obvious oracles."""

from __future__ import annotations

import dataclasses
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

import trainer.upcycle.text_routers as text_routers
from configs.compose import load_upcycle
from configs.upcycle_schema import Routing
from tests.upcycle.models import random_model, saved
from trainer.data.tokenizers import ByteTokenizer
from trainer.upcycle.__main__ import main
from trainer.upcycle.advice import advice
from trainer.upcycle.calibration import Tokens, ffn_inputs, text_tokens
from trainer.upcycle.convert import RECEIPT
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.plan import make_plan
from trainer.upcycle.recipes.copy import Copy
from trainer.upcycle.recipes.split import Split
from trainer.upcycle.routers import QueryHeads, RouterInit
from trainer.upcycle.targets import choose
from trainer.upcycle.text_routers import Prompts, Ridge, Sums

# prompts of unequal numbers and lengths, so that batches have padding
PROMPTS: list[dict[str, Any]] = [
    {"positive": ["import os", "def f(x): return x + 1"], "negative": "once upon a time there"},
    {"positive": "Once upon a time, in a land far away, there lived a king."},
    {"positive": ["3 + 4 = 7", "12 * 12", "the root of 2"], "negative": ["a", "the king said"]},
]
CODE = "def f(x):\n    return x[0] + x[1]\n" * 20
TALE = "ONCE UPON A TIME THERE WAS A KING AND A QUEEN. " * 20
FAMILIES = {"llama": {}, "phi3": {}, "olmo2": {}, "gemma": {"head_dim": 8}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    (folder / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    (folder / "code.txt").write_text(CODE)
    (folder / "tale.txt").write_text(TALE)
    return folder


@cache
def dense(family: str, folder: Path) -> DenseModel:
    model = saved(random_model(family, vocab_size=300, **FAMILIES[family]), folder / family)
    ByteTokenizer().save_pretrained(folder / family)
    return model


def made(model: DenseModel, router: RouterInit, recipe: Any) -> UpcycledModel:
    target = choose("auto", model, recipe.layout(model.shape), Routing.renormalised)
    return UpcycledModel([model], recipe, target, router=router)


def gate(moe: UpcycledModel, layer: int) -> Tensor:
    return moe.read(f"model.layers.{layer}.mlp.gate.weight")


@torch.no_grad()
def inputs_of(path: Path, text: str) -> list[Tensor]:
    """What every layer's FFN gets for one text without padding, [tokens, H] each."""
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    found: list[Tensor] = []

    def noting(forward: Any, x: Tensor) -> Any:
        found.append(x[0])
        return forward(x)

    for layer in model.model.layers:
        layer.mlp.forward = partial(noting, layer.mlp.forward)
    model(torch.tensor([list(text.encode())]))
    return found


# attention


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_respond_most_to_their_rows(family: str, folder: Path) -> None:
    model = dense(family, folder)
    moe = made(model, QueryHeads(std=0.05), Copy(7, 2))
    config = model.config
    for layer in range(3):
        rows = gate(moe, layer)
        assert rows.shape == (7, 32) and rows.dtype == torch.float32
        assert torch.allclose(rows.square().mean(1).sqrt(), torch.full((7,), 0.05))
        assert torch.equal(rows, gate(made(model, QueryHeads(std=0.05), Copy(7, 2)), layer))
        query = model.tensor(f"model.layers.{layer}.self_attn.q_proj.weight")
        for row, row_H in enumerate(rows):
            block = query.view(config.num_attention_heads, -1, 32)[row % 4].double()
            values, vectors = torch.linalg.eigh(block.T @ block)  # ascending
            unit = torch.nn.functional.normalize(row_H.double(), dim=0)
            answer = float((block @ unit).square().sum())
            assert answer == pytest.approx(float(values[-1 - row // 4]), rel=1e-4)
            assert abs(float(unit @ vectors[:, -1 - row // 4])) == pytest.approx(1, abs=1e-4)
            assert row_H.abs().max() == row_H.max()
    assert torch.equal(
        gate(made(model, QueryHeads(), Copy(3, 2)), 1),
        gate(made(model, QueryHeads(), Copy(7, 2)), 1)[:3],
    )


def test_attention_has_so_many_rows(folder: Path) -> None:
    model = dense("llama", folder)
    assert gate(made(model, QueryHeads(), Copy(32, 2)), 0).isfinite().all()
    with pytest.raises(ValueError, match=r"32 experts \(4 heads x 8\), not for 33"):
        made(model, QueryHeads(), Copy(33, 2))
    with pytest.raises(ValueError, match=r"router_init.std \(0\) must be > 0"):
        made(model, QueryHeads(std=0), Copy(4, 2))


# prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_against_one_by_one(family: str, folder: Path) -> None:
    """A batch with padding gives the rows of prompts that are read alone."""
    model = dense(family, folder)
    router = Prompts(prompts=str(folder / "prompts.yaml"), std=0.1, batch_size=4)
    moe = made(model, router, Copy(3, 2))

    def unit(texts: str | list[str], layer: int) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        tokens = [inputs_of(model.checkpoint.path, text)[layer] for text in texts]
        mean_H = torch.cat(tokens).double().mean(0)
        return mean_H / mean_H.norm()

    for layer in range(3):
        want = []
        for entry in PROMPTS:
            row_H = unit(entry["positive"], layer)
            if "negative" in entry:
                row_H = row_H - unit(entry["negative"], layer)
            want.append(row_H / row_H.square().mean().sqrt() * 0.1)
        assert torch.allclose(gate(moe, layer).double(), torch.stack(want), atol=1e-5), layer


def test_prompts_of_copies_and_of_parts(folder: Path) -> None:
    """Parts share a row; several experts of one prompt differ by noise that breaks ties."""
    model = dense("llama", folder)
    router = Prompts(prompts=str(folder / "prompts.yaml"))
    plain = gate(made(model, router, Copy(3, 2)), 1)
    parts = gate(made(model, router, Split(6, 2, granularity=2)), 1)
    assert torch.equal(parts, plain.repeat_interleave(2, 0))
    copies = gate(made(model, router, Copy(6, 2)), 1)
    assert torch.allclose(copies, plain.repeat_interleave(2, 0), atol=2e-4)
    assert len({tuple(row.tolist()) for row in copies}) == 6
    with pytest.raises(ValueError, match=r"router_init.prompts has 3 entries, .* rows \(4\)"):
        made(model, router, Copy(4, 2))


def test_prompts_that_are_nearly_parallel(folder: Path, tmp_path: Path) -> None:
    path = dense("llama", folder).checkpoint.path
    near = [{"positive": "a long text about cats"}, {"positive": "a long text about bats"}]
    far = [
        {"positive": "abcdefgh", "negative": "ZYXWVUTS"},
        {"positive": "ZYXWVUTS", "negative": "12345678"},
    ]
    for prompts, warned in ((near, True), (far, False)):
        file = tmp_path / "prompts.json"
        file.write_text(json.dumps(prompts))
        config = load_upcycle(
            f"source={path}",
            f"target_dir={tmp_path / 'x'}",
            "recipe.num_experts=2",
            "router_init=prompts",
            f"router_init.prompts={file}",
        )
        plan = make_plan(config)
        assert isinstance(plan.model, UpcycledModel)
        rows = [torch.nn.functional.normalize(gate(plan.model, layer), dim=1) for layer in range(3)]
        worst = max(float(np.linalg.cond(row.numpy())) for row in rows)
        assert (worst > 5) == warned
        said = [line for line in advice(plan) if "nearly parallel" in line]
        assert bool(said) == warned
        assert not warned or f"{worst:.2g}" in said[0].replace(f"{worst:.3g}", f"{worst:.2g}")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "must be a YAML or JSON file"),
        ("[", "cannot be read"),
        ("positive: a", "must be a list of"),
        ("[]", "must be a list of"),
        ("[{positive: a}, {negative: b}]", "entry 1 is"),
        ("[{positive: a}, {positive: []}]", "entry 1 is"),
        ("[{positive: a}, {positive: b, weight: 2}]", "entry 1 is"),
        ("[{positive: a}, {positive: [b, 3]}]", "entry 1 is"),
        ("[{positive: a, negative: a}, {positive: b}]", "entry 0 has the same"),
    ],
)
def test_unusable_prompts(content: str | None, why: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    if content is not None:
        file.write_text(content)
    router = Prompts(prompts=None if content is None else str(file))
    with pytest.raises(ValueError, match=f"router_init.prompts.*{why}"):
        made(dense("llama", folder), router, Copy(2, 1))


# ridge


def test_sums_are_a_least_squares_fit() -> None:
    """In odd pieces, as one system with sqrt(ridge) I below X."""
    generator = torch.manual_seed(0)
    x_nH = torch.randn(101, 13, generator=generator)
    domain_n = torch.randint(3, (101,), generator=generator)
    sums = Sums(13, 3)
    for piece in torch.arange(101).split(17):
        for domain in range(3):
            sums.add(x_nH[piece][domain_n[piece] == domain], domain)
    y_nP = np.eye(3)[domain_n.numpy()]
    below = np.concatenate([x_nH.double().numpy(), np.sqrt(0.7) * np.eye(13)])
    want, *_ = np.linalg.lstsq(below, np.concatenate([y_nP, np.zeros((13, 3))]), rcond=None)
    assert np.allclose(sums.solve(0.7).numpy(), want.T, atol=1e-6)


@pytest.mark.parametrize("gram_bytes", [1, 8 * 32 * 32 * 2, 2 << 30])
def test_ridge_against_least_squares(
    gram_bytes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of all layers, whatever number of layers is summed together."""
    monkeypatch.setattr(text_routers, "GRAM_BYTES", gram_bytes)
    text_routers.ridge_rows.cache_clear()
    model = dense("llama", folder)
    texts = [str(folder / "code.txt"), str(folder / "tale.txt")]
    router = Ridge(texts=texts, sequences=3, length=50, ridge=2.0, scale=3.0)
    moe = made(model, router, Copy(2, 1))
    for layer in range(3):
        blocks = [
            np.concatenate(
                [
                    inputs_of(model.checkpoint.path, text[i : i + 50])[layer].numpy()
                    for i in range(0, 150, 50)
                ]
            )
            for text in (CODE, TALE)
        ]
        x_nH = np.concatenate([*blocks, np.sqrt(2.0) * np.eye(32)]).astype(np.float64)
        y_nP = np.concatenate([np.repeat(np.eye(2), [150, 150], axis=0), np.zeros((32, 2))])
        want, *_ = np.linalg.lstsq(x_nH, y_nP, rcond=None)
        assert np.allclose(gate(moe, layer).numpy(), 3.0 * want.T, atol=1e-4)


def test_ridge_separates_domains(folder: Path, tmp_path: Path) -> None:
    """Tokens of text that it was not fitted to go to the expert of their domain."""
    model = dense("llama", folder)
    letters = torch.randint(5, (2, 1280), generator=torch.manual_seed(0))
    texts = []
    for name, alphabet, row in zip("ab", ("abcde", "VWXYZ"), letters.tolist(), strict=True):
        (tmp_path / name).write_text("".join(alphabet[letter] for letter in row))
        texts.append(str(tmp_path / name))
    moe = made(model, Ridge(texts=texts, sequences=20, length=32), Copy(2, 1))
    for domain, file in enumerate(texts):
        tokens = text_tokens(model.checkpoint.path, file, sequences=40, length=32)
        unseen = Tokens(tokens.ids_ST[20:], tokens.mask_ST[20:])
        for layer, x_nH in ffn_inputs(model.checkpoint.path, unseen, batch_size=20):
            scores = x_nH @ gate(moe, layer).T
            assert (scores.argmax(1) == domain).double().mean() > 0.9, (domain, layer)
            assert 2 < float(scores[:, domain].mean()) < 6


def test_unusable_texts(folder: Path, tmp_path: Path) -> None:
    model = dense("llama", folder)
    texts = [str(folder / "code.txt"), str(folder / "tale.txt")]
    good = Ridge(texts=texts)
    for router, why in (
        (Ridge(), r"router_init.texts \(None\) must be at least 2 text files"),
        (Ridge(texts=texts[0]), "must be at least 2 text files"),
        (Ridge(texts=[*texts, texts[0]]), r"router_init.texts has 3 entries, .* rows \(4\)"),
        (Ridge(texts=[texts[0], "absent"]), r"router_init.texts \(absent\) must be a text file"),
        (dataclasses.replace(good, ridge=0.0), r"router_init.ridge \(0.0\) must be > 0"),
        (dataclasses.replace(good, scale=-1.0), r"router_init.scale \(-1.0\) must be > 0"),
        (dataclasses.replace(good, length=0), r"router_init.length \(0\) must be >= 1"),
    ):
        with pytest.raises(ValueError, match=why):
            made(model, router, Copy(4, 2))


# the command


@pytest.mark.parametrize("router", ["attention", "prompts", "ridge"])
def test_one_command(router: str, folder: Path, tmp_path: Path) -> None:
    path = dense("llama", folder).checkpoint.path
    given = {
        "attention": [],
        "prompts": [f"router_init.prompts={folder / 'prompts.yaml'}"],
        "ridge": [f"router_init.texts=[{folder / 'code.txt'},{folder / 'tale.txt'}]"],
    }[router]
    experts = "recipe.num_experts=6"
    target = tmp_path / "moe"
    assert (
        main([f"source={path}", f"target_dir={target}", f"router_init={router}", experts, *given])
        == 0
    )
    receipt = json.loads((target / RECEIPT).read_text())
    assert receipt["exact"] and "bit for bit" in receipt["measured"]["tensors"]
    assert len(receipt["other_files"]) == {"attention": 0, "prompts": 1, "ridge": 2}[router]
    assert main(["verify", str(target)]) == 0


def test_a_text_that_changed_is_another_conversion(folder: Path, tmp_path: Path) -> None:
    path = dense("llama", folder).checkpoint.path
    (tmp_path / "prompts.yaml").write_text("[{positive: a}, {positive: b}]")
    given = [f"source={path}", f"target_dir={tmp_path / 'moe'}", "recipe.num_experts=2"]
    given += ["router_init=prompts", f"router_init.prompts={tmp_path / 'prompts.yaml'}"]
    before = make_plan(load_upcycle(*given)).identity([])
    assert make_plan(load_upcycle(*given)).identity([]) == before
    (tmp_path / "prompts.yaml").write_text("[{positive: a}, {positive: c}]")
    assert make_plan(load_upcycle(*given)).identity([]) != before
