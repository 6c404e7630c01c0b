"""Parameter groups, schedules and the gradient norm, against plain values by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM

from parallel.mesh import ParallelMesh
from parallel.model import moe_layers, parallelize
from placement.table import ExpertPlacement
from tests.families import FAMILIES, tiny_config
from tests.ranks import run_ranks
from trainer.optim import build_adamw, build_schedule, grad_norm_, parameter_groups


def tiny_model(family: str, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(family))


def names_by_group(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


# Groups


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_parameter_is_in_one_group(family: str) -> None:
    model = tiny_model(family)
    groups = names_by_group(model, parameter_groups(model, 0.1, False))
    assert all(groups.values())
    grouped = sorted(name for names in groups.values() for name in names)
    assert grouped == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    num_layers = sum(name.endswith(".experts") for name, _ in model.named_modules())
    assert len(groups["routers"]) == num_layers > 0
    assert len(groups["experts"]) == 2 * num_layers
    for name in groups["no_decay"]:
        assert "norm" in name or name.endswith(("bias", ".sinks", ".A_log")), name
    for name in groups["decay"]:
        assert "norm" not in name and not name.endswith("bias"), name


def test_groups_of_two_families_by_hand() -> None:
    """gpt_oss has biases everywhere; qwen2_moe a gate that routes and one that does not."""
    gpt_oss = tiny_model("gpt_oss")
    groups = names_by_group(gpt_oss, parameter_groups(gpt_oss, 0.1, False))
    layer = "model.layers.0."
    assert [n for n in groups["experts"] if layer in n] == [
        f"{layer}mlp.experts.gate_up_proj",
        f"{layer}mlp.experts.down_proj",
    ]
    assert f"{layer}mlp.experts.gate_up_proj_bias" in groups["no_decay"]
    assert [n for n in groups["routers"] if layer in n] == [f"{layer}mlp.router.weight"]
    assert f"{layer}mlp.router.bias" in groups["no_decay"]
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(groups["decay"])
    qwen2_moe = tiny_model("qwen2_moe")
    groups = names_by_group(qwen2_moe, parameter_groups(qwen2_moe, 0.1, False))
    assert f"{layer}mlp.gate.weight" in groups["routers"]
    assert f"{layer}mlp.shared_expert_gate.weight" in groups["decay"]
    assert f"{layer}mlp.shared_expert.gate_proj.weight" in groups["decay"]


@pytest.mark.parametrize("decay_routers", [False, True])
def test_weight_decay_of_the_groups(decay_routers: bool) -> None:
    groups = parameter_groups(tiny_model("gpt_oss"), 0.1, decay_routers)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "decay": 0.1,
        "no_decay": 0.0,
        "experts": 0.1,
        "routers": 0.1 if decay_routers else 0.0,
    }


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny_model("qwen3_moe")
    model.model.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1, False)
    assert group["name"] == "decay"
    assert group["params"] == [model.lm_head.weight]


def split_names(family: str) -> dict[str, list[str]]:
    model = tiny_model(family)
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    parallelize(model, mesh)
    return names_by_group(model, parameter_groups(model, 0.1, False))


@pytest.mark.parametrize("family", ["gpt_oss", "hunyuan_v1_moe"])
def test_same_groups_after_parallelize(family: str) -> None:
    model = tiny_model(family)
    plain = names_by_group(model, parameter_groups(model, 0.1, False))
    for split in run_ranks(split_names, 2, family):
        joined = {g: [n.replace("experts.experts", "experts") for n in v] for g, v in split.items()}
        assert {g: sorted(v) for g, v in joined.items()} == {g: sorted(v) for g, v in plain.items()}


def test_adamw_equals_the_formula() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    groups = [
        {"name": "decay", "params": [weight], "weight_decay": 0.5},
        {"name": "no_decay", "params": [bias], "weight_decay": 0.0},
    ]
    optimizer = build_adamw(groups, lr=0.1, betas=[0.8, 0.9], eps=1e-6)
    expected = {0: [1.0, -2.0], 1: [3.0]}
    first: dict[tuple[int, int], float] = {}
    second: dict[tuple[int, int], float] = {}
    for step in (1, 2, 3):
        gradient = {0: [0.3 * step, -0.1], 1: [2.0 / step]}
        weight.grad = torch.tensor([gradient[0]], dtype=torch.float64)
        bias.grad = torch.tensor(gradient[1], dtype=torch.float64)
        optimizer.step()
        for i, decay in ((0, 0.5), (1, 0.0)):
            for j, g in enumerate(gradient[i]):
                first[i, j] = 0.8 * first.get((i, j), 0.0) + 0.2 * g
                second[i, j] = 0.9 * second.get((i, j), 0.0) + 0.1 * g * g
                m, v = first[i, j] / (1 - 0.8**step), second[i, j] / (1 - 0.9**step)
                expected[i][j] *= 1 - 0.1 * decay
                expected[i][j] -= 0.1 * m / (math.sqrt(v) + 1e-6)
    assert weight[0].tolist() == pytest.approx(expected[0], rel=1e-12)
    assert bias.tolist() == pytest.approx(expected[1], rel=1e-12)


# Schedules


def optimizer_of_two_rates() -> torch.optim.Optimizer:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    return torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.5}])


def rates(schedule: str, **settings: Any) -> list[float]:
    """The learning rate that every step of the run uses, for a peak of 1."""
    optimizer = optimizer_of_two_rates()
    scheduler = build_schedule(optimizer, schedule, **settings)
    used = []
    for _ in range(settings["steps"]):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 2)
        used.append(first)
        optimizer.step()
        scheduler.step()
    return used


def test_constant() -> None:
    assert rates("constant", steps=3) == [1, 1, 1]
    assert rates("constant", steps=6, warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine() -> None:
    root = math.sqrt(0.5)
    expected = [0.5, 1.0, 0.1 + 0.45 * (1 + root), 0.55, 0.1 + 0.45 * (1 - root), 0.1]
    used = rates("cosine", steps=6, warmup_steps=2, min_lr_ratio=0.1)
    assert used == pytest.approx(expected, rel=1e-12)
    assert rates("cosine", steps=2) == pytest.approx([0.5, 0.0], abs=1e-12)
    assert rates("cosine", steps=3, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1])


def test_wsd() -> None:
    used = rates("wsd", steps=8, warmup_steps=2, decay_steps=4, min_lr_ratio=0.2)
    assert used == pytest.approx([0.5, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates("wsd", steps=3, decay_steps=1) == pytest.approx([1, 1, 0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_rate_stays_at_its_last_value_after_the_end(schedule: str) -> None:
    optimizer = optimizer_of_two_rates()
    scheduler = build_schedule(optimizer, schedule, steps=4, decay_steps=2, min_lr_ratio=0.3)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)


def test_schedule_goes_on_from_its_state() -> None:
    """The state is plain enough for JSON, and a resumed schedule gives the same next rates."""
    settings: dict[str, Any] = {"steps": 6, "warmup_steps": 2, "min_lr_ratio": 0.1}
    expected = rates("cosine", **settings)
    optimizer = optimizer_of_two_rates()
    scheduler = build_schedule(optimizer, "cosine", **settings)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    state = json.loads(json.dumps(scheduler.state_dict()))
    again = optimizer_of_two_rates()
    resumed = build_schedule(again, "cosine", **settings)
    resumed.load_state_dict(state)
    assert resumed.get_last_lr()[0] == pytest.approx(expected[3])
    again.step()
    resumed.step()
    assert again.param_groups[0]["lr"] == pytest.approx(expected[4])


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match=r"optim.schedule \(linear\) must be one of constant, cos"):
        build_schedule(optimizer_of_two_rates(), "linear", steps=3)


# Gradient norm


MAX_NORMS = [0.0, 0.01, 1e6]


def clipped(ep: int, inner: bool) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Norm and clipped gradients, by expert, where every gradient is half of its parameter.

    Args:
        inner: shard expert stacks within every expert (dim 1) instead of by expert (dim 0).
    """
    model = tiny_model("qwen3_moe").double()
    mesh = ParallelMesh.build(ep=ep, device_type="cpu")
    parallelize(model, mesh)
    dim = Shard(1 if inner else 0)
    for _, layer in moe_layers(model):
        fully_shard(layer, mesh=mesh.expert["edp"], shard_placement_fn=lambda parameter: dim)
    fully_shard(model, mesh=mesh.dense["dp"])
    experts = {f"{name}.experts": layer.local_experts for name, layer in moe_layers(model)}
    results = []
    for max_norm in MAX_NORMS:
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            parameter.grad = parameter.detach() * 0.5
        norm = grad_norm_(model, max_norm, mesh.dp_group)
        assert norm.dtype == torch.float64
        gradients = {}
        for name, parameter in model.named_parameters():
            whole = parameter.grad.full_tensor()
            module, _, last = name.rpartition(".")
            if module in experts:
                plain = f"{module.removesuffix('.experts')}.{last}"
                for expert, gradient in zip(experts[module], whole, strict=True):
                    gradients[f"{plain}.{expert}"] = gradient
            else:
                gradients[name] = whole
        results.append((float(norm), gradients))
    return results


@pytest.mark.parametrize(
    ("world", "ep", "inner"),
    [(1, 1, False), (2, 1, False), (2, 2, False), (4, 2, False), (4, 2, True)],
)
def test_norm_counts_every_parameter_once(world: int, ep: int, inner: bool) -> None:
    model = tiny_model("qwen3_moe").double()
    parameters = [parameter.detach() for parameter in model.parameters()]
    expected = math.sqrt(sum(float((0.5 * p).square().sum()) for p in parameters))
    assert 0.01 < expected < 1e6
    for rank_results in run_ranks(clipped, world, ep, inner):
        for max_norm, (norm, gradients) in zip(MAX_NORMS, rank_results, strict=True):
            assert norm == pytest.approx(expected, rel=1e-12)
            factor = 0.5 * (0.01 / (expected + 1e-6) if max_norm == 0.01 else 1.0)
            for name, gradient in gradients.items():
                stack, _, expert = name.rpartition(".")
                if expert.isdigit():
                    parameter = model.get_parameter(stack)[int(expert)]
                else:
                    parameter = model.get_parameter(name)
                torch.testing.assert_close(gradient, parameter.detach() * factor)


def norms_under(homes: list[list[int]]) -> list[float]:
    """Norms of gradients that are the same for every expert, wherever it lives."""
    norms, mesh = [], ParallelMesh.build(ep=2, device_type="cpu")
    for home_E in homes:
        model = tiny_model("qwen3_moe").double()  # sums of squares of fp32 are often exact
        parallelize(model, mesh, placement=ExpertPlacement(torch.tensor([home_E, home_E]), 2))
        for _, layer in moe_layers(model):
            fully_shard(layer, mesh=mesh.expert["edp"])
        fully_shard(model, mesh=mesh.dense["dp"])
        for name, parameter in model.named_parameters():
            parameter.grad = parameter.detach() * (45 if ".experts." in name else 0.3)
        norms.append(float(grad_norm_(model, 0.0, mesh.dp_group)))
    return norms


def test_norm_does_not_depend_on_homes() -> None:
    """In every digit of float64."""
    generator = torch.Generator().manual_seed(0)
    homes = [(torch.randperm(8, generator=generator) % 2).tolist() for _ in range(10)]
    assert len(set(run_ranks(norms_under, 4, homes)[0])) == 1


def test_norm_of_a_nan_is_nan() -> None:
    assert run_ranks(nan_norm, 2) == [True, True]


def nan_norm() -> bool:
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    layer = nn.Linear(4, 4)
    fully_shard(layer, mesh=mesh.dense["dp"])
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if mesh.rank == 1:
        layer.bias.grad.to_local()[0] = math.nan  # type: ignore[union-attr]
    return math.isnan(float(grad_norm_(layer, 1.0, mesh.dp_group)))


def unsharded_norm() -> bool:
    layer = nn.Linear(4, 4)
    layer(torch.ones(1, 4)).sum().backward()
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    with pytest.raises(AssertionError, match="once per rank"):
        grad_norm_(layer, 1.0, mesh.dp_group)
    return True


def test_whole_gradients_on_several_ranks_are_refused() -> None:
    assert run_ranks(unsharded_norm, 2) == [True, True]
