"""Routers trained alone: they learn as they would, and nothing else changes by a bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.compose import load
from configs.schema import check
from parallel.mesh import ParallelMesh
from parallel.model import parallelize
from tests.parallel.test_families import full_model
from tests.ranks import run_ranks
from tests.trainer.test_engine import constant, sequences
from tests.trainer.test_optim import names_by_group, tiny_model
from trainer.engine import TorchEngine
from trainer.optim import build_adamw, parameter_groups
from trainer.state import model_state

STEPS = 3


def make_optimizer(model: nn.Module, only_routers: bool) -> torch.optim.Optimizer:
    groups = parameter_groups(model, 0.1, True, only_routers)
    return build_adamw(groups, 0.01, (0.9, 0.95), 1e-8)


def trained(family: str, ep: int) -> tuple[list[float], dict[str, Tensor]]:
    """Norms of the gradient and parameters by logical key after some steps in micro-batches."""
    model: Any = full_model(family)
    mesh = ParallelMesh.build(ep=ep, device_type="cpu")
    parallelize(model, mesh)
    engine = TorchEngine(
        model,
        mesh,
        make_optimizer=partial(make_optimizer, only_routers=True),
        make_schedule=constant,
        balancers=[],
        max_grad_norm=0.05,
    )
    norms = []
    for step in range(STEPS):
        batch = sequences(step, model.config.vocab_size)
        mine = torch.arange(mesh.rank, 8, mesh.world_size)
        parts = [{k: v[part] for k, v in batch.items()} for part in mine.chunk(2)]
        norms.append(engine.train_step(parts).metrics["train/grad_norm"])
    state = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for key, value in model_state(model).items()
    }
    return norms, state


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_routers_alone(family: str, ranks: int) -> None:
    """Against plain training in which all else needs no gradient; experts keep their bits."""
    model: Any = full_model(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp.gate." in name or ".router." in name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    routers = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, only_routers=False)
    want_norms = []
    for step in range(STEPS):
        batch = sequences(step, model.config.vocab_size)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        want_norms.append(float(nn.utils.clip_grad_norm_(routers, 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    want = model.state_dict()
    for norms, state in run_ranks(trained, ranks, family, ranks):
        assert norms == pytest.approx(want_norms, rel=1e-5)
        moved = 0
        for key, value in state.items():
            stack, _, rest = key.partition(".experts.")
            if rest:  # of a stack: one expert
                number, name = rest.split(".", 1)
                assert torch.equal(value, before[f"{stack}.experts.{name}"][int(number)]), key
            elif not torch.equal(value, before[key]):
                assert ".mlp.gate." in key or ".router." in key, key
                assert torch.allclose(value, want[key], atol=1e-6), key
                moved += 1
        assert moved == len(routers)


def test_groups() -> None:
    """Matrices and biases that score experts, and no others; not the gate of a shared expert."""
    layer = "model.layers.0.mlp."
    for family, names in (
        ("gpt_oss", {"router.weight", "router.bias"}),
        ("qwen2_moe", {"gate.weight"}),
    ):
        model = tiny_model(family)
        groups = names_by_group(model, parameter_groups(model, 0.1, False, only_routers=True))
        assert {n for g in groups.values() for n in g if layer in n} == {layer + n for n in names}
        assert all(layer.split("0.")[0] in n for g in groups.values() for n in g)


def test_the_warmup_experiment() -> None:
    config = load(
        "experiment=innovator_warmup",
        "model.source=moe",
        "data=text",
        "data.sources.text.paths=[a.txt]",
    )
    check(config, 1)
    assert config.optim.only_routers and config.model.source == "moe"
    config.model.source = None
    with pytest.raises(ValueError, match=r"model.source"):
        check(config, 1)
