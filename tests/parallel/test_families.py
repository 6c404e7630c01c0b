"""Whole models of every supported family: expert parallelism changes nothing, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from parallel.mesh import ParallelMesh
from parallel.model import moe_layers, parallelize
from placement.table import ExpertPlacement
from tests.families import FAMILIES, tiny_config
from tests.parallel.test_layer import RandomPlanner
from tests.ranks import run_ranks


def full_model(family: str) -> nn.Module:
    """The unsplit model, the same on every rank and call."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = tiny_config("qwen3_moe" if family == "two_experts" else family)
        if family == "two_experts":
            config.num_experts = 2
        config._experts_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).double()
        for parameter in model.parameters():  # biases and routers too, so that all of them matter
            if float(parameter.detach().abs().max()) == 0.0:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def token_ids(rank: int, vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, vocab_size, (1 + rank, 6), generator=generator)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return (logits * torch.cos(logits.detach())).sum()


def split_run(family: str) -> tuple[dict[str, Tensor], list[float]]:
    """Losses and gradients of one rank of two, experts split, dense gradients summed."""
    model: Any = full_model(family)
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    num_experts = tiny_config_experts(model)
    home_LE = torch.stack([(torch.arange(num_experts) + layer) % 2 for layer in range(99)])
    num_layers = sum(1 for name, _ in model.named_modules() if name.endswith(".experts"))
    placement = ExpertPlacement(home_LE[:num_layers], 2)
    parallelize(model, mesh, placement=placement, planner=RandomPlanner(1))
    loss = loss_of(model, token_ids(mesh.rank, model.config.vocab_size))
    loss.backward()
    layers = dict(moe_layers(model))
    gradients = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix, _, last = name.rpartition(".")
        layer = layers.get(prefix.removesuffix(".experts"))
        assert parameter.grad is not None, f"{name} got no gradient"
        if layer is None:
            dist.all_reduce(parameter.grad)
            gradients[name] = parameter.grad
        else:
            for slot, expert in enumerate(layer.local_experts):
                gradients[f"{prefix.removesuffix('.experts')}.{expert}.{last}"] = parameter.grad[
                    slot
                ]
    return gradients, [float(loss.detach())]


def tiny_config_experts(model: nn.Module) -> int:
    modules = [m for name, m in model.named_modules() if name.endswith(".experts")]
    return int(modules[0].num_experts)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_unsplit_model(family: str) -> None:
    results = run_ranks(split_run, 2, family)
    model: Any = full_model(family)
    for rank in range(2):
        loss = loss_of(model, token_ids(rank, model.config.vocab_size))
        loss.backward()
        assert results[rank][1][0] == pytest.approx(float(loss.detach()), rel=1e-9, abs=1e-9)
    split = {**results[0][0], **results[1][0]}
    seen = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".experts"):
            keys = [f"{prefix}.{expert}.{last}" for expert in range(len(parameter))]
            got = torch.stack([split[key] for key in keys])
        else:
            keys, got = [name], split[name]
        want = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9, msg=name)
        seen.update(keys)
    assert seen == set(split)


def test_dense_model_is_refused_by_name() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
    )
    model = AutoModelForCausalLM.from_config(config)
    mesh: Any = None  # refused before it is looked at
    with pytest.raises(ValueError, match=r"model llama .* no MoE block"):
        parallelize(model, mesh)
