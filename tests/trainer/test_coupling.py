"""Expert-router coupling on real ranks against loops over pairs of experts, float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from parallel.mesh import ParallelMesh
from parallel.model import moe_layers, parallelize
from parallel.planners import home_plan
from placement.table import ExpertPlacement
from tests.families import tiny_config
from tests.parallel.test_families import full_model
from tests.parallel.test_layer import RandomPlanner
from tests.ranks import run_ranks
from tests.trainer.relocation_runs import random_table
from tests.trainer.test_engine import SEQUENCES, constant, sequences
from trainer.balance import coupling
from trainer.balance.coupling import Coupling, radius, uniform
from trainer.engine import TorchEngine
from trainer.state import model_state

STEPS, RATE, LAYERS, EXPERTS, WIDTH = 2, 0.1, 2, 8, 24
OPTIONS: dict[str, Any] = {"coefficient": 3.0, "strength": 0.9, "seed": 11}
CASE: dict[str, Any] = {"family": "qwen3_moe", "world": 1, "ep": 1, "accumulate": 2}


class Spy(Coupling):
    """Notes the proxies of every forward that has the loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[Tensor] = []

    def _of_columns(self, proxy_ED: Tensor, experts: Any) -> Tensor:
        self.seen.append(proxy_ED.detach().clone())
        return super()._of_columns(proxy_ED, experts)


def whole_model(family: str) -> Any:
    """The unsplit model in float64; "gateless" has experts without gates."""
    if family != "gateless":
        return full_model(family)
    model: Any = full_model("qwen3_moe")
    config = SimpleNamespace(
        n_routed_experts=EXPERTS,
        hidden_size=32,
        moe_intermediate_size=WIDTH,
        moe_latent_size=None,
        mlp_hidden_act="relu2",
        _experts_implementation="eager",
    )
    generator = torch.Generator().manual_seed(2)
    for layer in model.model.layers:
        layer.mlp.experts = NemotronHExperts(config).double()
        for stack in layer.mlp.experts.parameters():
            nn.init.normal_(stack, std=0.2, generator=generator)
    return model


def loops(
    row_ED: Tensor, gates: list[Tensor], strength: float, *key: int
) -> tuple[Tensor, list[Tensor]]:
    """The loss of one layer, in the order of its definition, and the proxies."""
    number = len(gates)
    noise_ED = np.random.default_rng(key).uniform(-1, 1, tuple(row_ED.shape))
    proxies = []
    for i in range(number):
        away = [(row_ED[i] - row_ED[j]).detach() for j in range(number) if j != i]
        bound = min(float(part.norm()) for part in away) / (2 * float(row_ED[i].detach().norm()))
        proxies.append(row_ED[i] * (1 + bound * torch.from_numpy(noise_ED[i])))
    norm = [[(gates[j] @ proxies[i]).norm() for j in range(number)] for i in range(number)]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(number):
        for j in range(number):
            if j != i:
                total = total + (norm[i][j] - strength * norm[i][i]).clamp(min=0)
                total = total + (norm[j][i] - strength * norm[i][i]).clamp(min=0)
    return total / number**2, [proxy.detach() for proxy in proxies]


def gates_of(family: str, experts: Any) -> list[Tensor]:
    """Matrices [F, D] whose rows are multiplied with an expert's input, before activation."""
    if family == "gateless":
        return list(experts.up_proj)
    if family == "gpt_oss":
        return [matrix[:, ::2].T for matrix in experts.gate_up_proj]
    return [matrix[:WIDTH] for matrix in experts.gate_up_proj]


def oracle_run(case: dict[str, Any]) -> dict[str, Any]:
    """Training of the unsplit model on one process: losses, proxies and parameters."""
    coefficient = case.get("coefficient", OPTIONS["coefficient"])
    model = whole_model(case["family"])
    blocks = [block.mlp for block in model.model.layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, seen = [], []
    for step in range(case.get("steps", STEPS)):
        batch = sequences(step, model.config.vocab_size)
        tokens = int((batch["labels"] != -100).sum())
        for rank in range(case["world"]):
            for part in torch.arange(rank, SEQUENCES, case["world"]).chunk(case["accumulate"]):
                ids, positions = batch["input_ids"][part], batch["position_ids"][part]
                out = model(input_ids=ids, position_ids=positions, use_cache=False).logits
                labels = batch["labels"][part].flatten()
                loss = F.cross_entropy(out.flatten(0, 1), labels, reduction="sum")
                (loss / tokens).backward()
        total = torch.zeros((), dtype=torch.float64)
        for layer, block in enumerate(blocks):
            row_ED = (block.router if case["family"] == "gpt_oss" else block.gate).weight
            gates = gates_of(case["family"], block.experts)
            key = OPTIONS["seed"], step + 1, layer
            loss, proxies = loops(row_ED, gates, OPTIONS["strength"], *key)
            total = total + coefficient * loss / LAYERS
            seen.append(torch.stack(proxies))
        total.backward()
        losses.append(float(total.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "state": logical(model.state_dict()), "seen": seen}


def logical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an unsplit model, expert by expert."""
    result = {}
    for name, value in state.items():
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".experts"):
            result.update({f"{prefix}.{e}.{last}": part for e, part in enumerate(value)})
        else:
            result[name] = value
    return result


def engine_run(case: dict[str, Any]) -> dict[str, Any]:
    """The same on one rank of several: metrics, proxies and parameters by logical key."""
    bf16 = case.get("bf16", False)
    model = whole_model(case["family"])
    model = model.float() if bf16 else model
    mesh = ParallelMesh.build(ep=case["ep"], device_type="cpu")
    planner = case.get("planner", home_plan)
    parallelize(model, mesh, placement=case.get("table"), planner=planner)
    spy = Spy(**OPTIONS | {"coefficient": case.get("coefficient", OPTIONS["coefficient"])})
    engine = TorchEngine(
        model,
        mesh,
        make_optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=RATE),
        make_schedule=constant,
        balancers=[spy],
        bf16=bf16,
        recompute=case.get("recompute", False),
        max_grad_norm=0.0,
    )
    metrics, shares = [], []
    for step in range(case.get("steps", STEPS)):
        batch = sequences(step, model.config.vocab_size)
        engine.eval_step(batch)  # has no such loss
        mine = torch.arange(mesh.rank, SEQUENCES, mesh.world_size).chunk(case["accumulate"])
        stats = engine.train_step([{k: v[part] for k, v in batch.items()} for part in mine])
        metrics.append(stats.metrics)
        shares.append(spy.losses()["coupling"])
    state = {}
    for key, value in model_state(model).items():
        state[key] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return {"metrics": metrics, "shares": shares, "state": state, "seen": spy.seen}


def check(case: dict[str, Any]) -> None:
    """Losses, every parameter after two steps, and that the loss is there once a step."""
    results, oracle = run_ranks(engine_run, case["world"], case), oracle_run(case)
    keys: set[str] = set()
    for step, expected in enumerate(oracle["losses"]):
        assert expected > 0.1
        assert sum(r["shares"][step] for r in results) == pytest.approx(expected, rel=1e-9)
    for result in results:
        for metrics, expected in zip(result["metrics"], oracle["losses"], strict=True):
            assert metrics["balance/coupling"] == pytest.approx(expected, rel=1e-9)
            assert metrics["train/balance_loss"] == pytest.approx(expected, rel=1e-9)
        for key, value in result["state"].items():
            expected = oracle["state"][key]
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9, msg=key)
        keys.update(result["state"])
        check_noise(result["seen"], oracle["seen"], 2 if case.get("recompute") else 1)
        assert all(map(torch.equal, result["seen"], results[0]["seen"]))
    assert keys == set(oracle["state"])


def check_noise(seen: list[Tensor], expected: list[Tensor], forwards: int) -> None:
    """One use a step, layer and forward; a repeated forward, in reverse order, has the same."""
    assert len(seen) == STEPS * LAYERS * forwards
    for step in range(STEPS):
        first = seen[step * LAYERS * forwards :][:LAYERS]
        repeated = seen[step * LAYERS * forwards + LAYERS :][:LAYERS][::-1]
        assert forwards == 1 or all(map(torch.equal, first, repeated))
        for mine, theirs in zip(first, expected[step * LAYERS :], strict=False):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def strided(ep: int) -> ExpertPlacement:
    return ExpertPlacement((torch.arange(EXPERTS) % ep).repeat(LAYERS, 1), ep)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), (4, 2), (2, 1)])
def test_equals_loops_on_one_process(world: int, ep: int, recompute: bool) -> None:
    check({**CASE, "world": world, "ep": ep, "recompute": recompute, "table": strided(ep)})


@pytest.mark.parametrize("family", ["gpt_oss", "gateless"])
def test_every_layout_of_the_gate(family: str) -> None:
    """Alternating and transposed; none, then it is the up projection."""
    check({**CASE, "family": family, "world": 2, "ep": 2})


def test_any_placement_and_borrowed_experts() -> None:
    table = random_table(4, EXPERTS, 2)
    check({**CASE, "world": 4, "ep": 2, "table": table, "planner": RandomPlanner(3)})


def test_experts_split_within_themselves() -> None:
    """One expert per rank and EDP 2: sharded on dim 1, gathered where the loss is made."""
    results = run_ranks(engine_run, 4, {**CASE, "family": "two_experts", "ep": 2})
    oracle = oracle_run({**CASE, "family": "two_experts", "world": 4})
    for result in results:
        for key, value in result["state"].items():
            torch.testing.assert_close(value, oracle["state"][key], rtol=1e-8, atol=1e-9, msg=key)


def test_the_loss_reaches_all_rows_and_gates() -> None:
    """So that the comparison of parameters sees each of them."""
    with_loss, without = (
        oracle_run(CASE)["state"],
        oracle_run({**CASE, "coefficient": 0.0})["state"],
    )
    for key, value in with_loss.items():
        change = (value - without[key]).abs()
        if key.endswith("mlp.gate.weight"):
            assert float(change.amax(1).min()) > 1e-3
        elif key.endswith("gate_up_proj"):
            assert float(change[:WIDTH].max()) > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16_keeps_proxies_in_fp32(recompute: bool) -> None:
    """The router is sharded by itself then, and freed before the experts run. The loss is large
    here, so that what bf16 does to the model's own gradients does not count."""
    case = {**CASE, "world": 4, "ep": 2, "recompute": recompute, "coefficient": 100.0, "steps": 1}
    results, oracle = run_ranks(engine_run, 4, {**case, "bf16": True}), oracle_run(case)
    start = logical(whole_model("qwen3_moe").state_dict())
    for result in results:
        assert all(proxy_ED.dtype == torch.float32 for proxy_ED in result["seen"])
        (metrics,) = result["metrics"]
        assert metrics["balance/coupling"] == pytest.approx(oracle["losses"][0], rel=1e-3)
        keys = [key for key in result["state"] if "mlp.gate." in key or "gate_up_proj" in key]
        assert len(keys) == LAYERS * (1 + EXPERTS // 4)
        for key in keys:
            expected = oracle["state"][key] - start[key]
            error = result["state"][key].double() - start[key] - expected
            assert float(error.norm() / expected.norm()) < 0.01, key


def test_proxies_stay_nearest_to_their_own_row() -> None:
    row_ED = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row_ED[3] = row_ED[2] * 1.01
    row_ED[5] = 0.0
    assert float(radius(row_ED)[5]) == 0.0
    for step in range(200):
        proxy_ED = row_ED * (1 + radius(row_ED) * uniform(row_ED, 0, step, 0))
        assert torch.equal(torch.cdist(proxy_ED, row_ED).argmin(1), torch.arange(6))
    for corner in (-1.0, 1.0):  # the farthest that noise can go: half way
        away_E = (row_ED * radius(row_ED) * corner).norm(dim=1)
        assert float(away_E[2]) == pytest.approx(float((row_ED[2] - row_ED[3]).norm()) / 2)


def test_noise_is_keyed_by_seed_step_and_layer() -> None:
    like = torch.zeros(4, 3)
    keys = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    noise = [uniform(like, *key) for key in keys]
    assert all(not torch.equal(noise[0], other) for other in noise[1:])
    assert torch.equal(noise[0], uniform(like.double(), *keys[0]).float())


def test_gradients_of_norms() -> None:
    """Also where a product is zero, whose norm has the gradient 0."""
    generator = torch.Generator().manual_seed(3)
    proxy_ED = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    gate_SFD = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(coupling._GateNorms.apply, (proxy_ED, gate_SFD))
    zero_SFD = torch.zeros_like(gate_SFD).requires_grad_()
    norm_ES = coupling._GateNorms.apply(proxy_ED, zero_SFD)
    grads = torch.autograd.grad(norm_ES.sum(), (proxy_ED, zero_SFD))
    assert all(float(grad.abs().max()) == 0.0 for grad in grads)


def test_a_schedule_that_ends() -> None:
    assert run_ranks(ended_run, 1) == [([True, False], [3.0, 0.0])]


def ended_run() -> tuple[list[bool], list[float]]:
    model = whole_model("qwen3_moe")
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    parallelize(model, mesh)
    engine = TorchEngine(
        model,
        mesh,
        make_optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=RATE),
        make_schedule=constant,
        balancers=[Coupling(**OPTIONS, until=1)],
    )
    metrics = [engine.train_step([sequences(0, 64)]).metrics for _ in range(2)]
    has_loss = [m["balance/coupling"] > 0 for m in metrics]
    return has_loss, [m["balance/coupling_coefficient"] for m in metrics]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"strength": 0.0}, "balance.coupling.strength (0.0) must be > 0, <= 1"),
        ({"strength": 1.5}, "balance.coupling.strength (1.5) must be > 0, <= 1"),
        ({"coefficient": 0.0}, "balance.coupling.coefficient (0.0) must be > 0"),
        ({"seed": -1}, "balance.coupling.seed (-1) must be >= 0"),
        ({"steps": 5}, "balance.coupling.steps (5)"),
    ],
)
def test_values_out_of_bounds(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        Coupling(**options)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [({"num_experts": 1, "num_experts_per_tok": 1}, "2 or more experts"), ({}, "has none")],
)
def test_models_that_it_cannot_be_used_with(overrides: dict[str, Any], expected: str) -> None:
    (message,) = run_ranks(refused_run, 1, overrides)
    assert "balance.coupling" in message and expected in message


def refused_run(overrides: dict[str, Any]) -> str:
    model: Any = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", **overrides))
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    parallelize(model, mesh)
    assert len(moe_layers(model)) == LAYERS
    if not overrides:  # rows that are not as wide as what experts get
        model.model.layers[0].mlp.gate.weight = nn.Parameter(torch.zeros(EXPERTS, 16))
    with pytest.raises(ValueError) as caught:
        Coupling().attach(model, mesh)
    return str(caught.value)


def test_the_configuration_has_the_defaults() -> None:
    path = Path(__file__).parents[2] / "configs" / "balance" / "coupling.yaml"
    options: Any = OmegaConf.to_container(OmegaConf.load(path))
    given = options["coupling"]
    assert given.pop("_target_") == f"{Coupling.__module__}.{Coupling.__name__}"
    made, default = Coupling(**given), Coupling()
    assert vars(made).keys() == vars(default).keys()
    for name in ("coefficient", "strength", "seed"):
        assert getattr(made, name) == getattr(default, name)
