"""Expert merging on real ranks against loops over the whole stacks."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.compose import load
from parallel.model import moe_layers
from placement.table import ExpertPlacement
from tests.ranks import run_ranks
from tests.trainer.checkpoint_runs import merge, save, split_dims, whole
from tests.trainer.relocation_runs import LAYERS, make_engine, random_table, step
from tests.trainer.test_run import TINY, corpus, metrics
from trainer.balance.merging import MergeExperts, local_of
from trainer.checkpoint import Checkpointer
from trainer.engine import TorchEngine
from trainer.run import run
from trainer.state import model_state, optimizer_state

State = dict[str, Tensor]
SIMILARITY = "balance/merge_similarity"
NO_COUNTS = torch.zeros(LAYERS, 8, dtype=torch.int64)


def strided(num_experts: int, ep: int) -> ExpertPlacement:
    """Expert e at home on rank e mod EP."""
    return ExpertPlacement((torch.arange(num_experts) % ep).expand(LAYERS, num_experts).clone(), ep)


def merging(engine: TorchEngine, **options: Any) -> MergeExperts:
    merger = MergeExperts(**options)
    merger.attach(engine.model, engine.mesh)
    engine.balancers = [*engine.balancers, merger]
    return merger


def oracle(state: State, rate: float, number: int, interleaved: bool = False) -> tuple[State, Any]:
    """The model after a merge, and the mean cosine of neighbours before it."""
    after, cosines = dict(state), []
    prefixes = {key.rpartition(".experts.")[0] for key in state if ".experts." in key}
    for prefix in sorted(prefixes):
        keys = [key for key in state if key.startswith(f"{prefix}.experts.")]
        experts: dict[int, State] = {}
        for key in keys:
            number_text, name = key.removeprefix(f"{prefix}.experts.").split(".")
            experts.setdefault(int(number_text), {})[name] = state[key]
        gates = {}
        for expert, tensors in experts.items():
            both = tensors["gate_up_proj"]
            gates[expert] = (both[:, ::2] if interleaved else both[: len(both) // 2]).flatten()
        for expert in experts:
            cosine = {
                other: float(F.cosine_similarity(gates[expert], gates[other], dim=0))
                for other in experts
                if other != expert
            }
            chosen = sorted(cosine, key=lambda other: (-round(cosine[other], 9), other))[:number]
            cosines += [cosine[other] for other in chosen]
            for name, weight in experts[expert].items():
                away = [experts[other][name] - weight for other in chosen]
                moved = weight + rate * torch.stack(away).mean(0)
                after[f"{prefix}.experts.{expert}.{name}"] = moved
    return after, sum(cosines) / len(cosines)


def merged_twice(case: dict[str, Any], ties: bool = False) -> dict[str, Any]:
    """Weights before and after a merge, and after another one with all experts elsewhere."""
    case = dict(case)
    neighbours = case.pop("neighbours", 3)
    engine = make_engine(**case)
    step(engine, 0)  # so that there are moments
    if ties:
        for _, layer in moe_layers(engine.model):
            tie_gates(layer)
    merger = merging(engine, interval=2, alpha=0.5, steps=8, neighbours=neighbours)
    moments = whole(optimizer_state(engine.model, engine.optimizer))
    states, similarities = [whole(model_state(engine.model))], []
    for number in range(2):
        assert merger.after_step(NO_COUNTS) == {}
        similarities.append(merger.after_step(NO_COUNTS)[SIMILARITY])
        states.append(whole(model_state(engine.model)))
        after = whole(optimizer_state(engine.model, engine.optimizer))
        assert number or all(torch.equal(after[key], moments[key]) for key in moments)
        experts = moe_layers(engine.model)[0][1].num_experts
        engine.relocate(random_table(5, experts, engine.mesh.ep_size))
    return {"states": states, "similarities": similarities, "dims": split_dims(engine)}


@torch.no_grad()
def tie_gates(layer: Any) -> None:
    """The same gate for all experts, up to its sign by id: two kinds."""
    stack = layer.experts.stacks()["gate_up_proj"]
    gate = torch.linspace(-1, 2, stack[0].numel(), dtype=stack.dtype).view(stack.shape[1:]).sin()
    for local, expert in zip(local_of(stack), layer.experts_in(stack), strict=True):
        half = len(local) // 2
        local[:half] = gate[:half] * (1.7**expert) * (-1) ** expert


CASES: dict[str, tuple[int, set[int], dict[str, Any]]] = {  # ranks, dims that EDP splits
    "one process": (1, {0}, {"ep": 1}),
    "EP 2, strided": (2, {0}, {"ep": 2, "table": strided(8, 2)}),
    "EDP 2": (2, {0}, {"ep": 1}),
    "EP 4": (4, {0}, {"ep": 4, "table": random_table(1, 8, 4), "neighbours": 7}),
    "EP 2 x EDP 2, strided": (4, {0}, {"ep": 2, "table": strided(8, 2), "neighbours": 4}),
    "fp32": (4, {0}, {"ep": 2, "table": strided(8, 2), "dtype": torch.float32}),
    "experts split within": (
        4,
        {1},
        {"ep": 2, "table": strided(6, 2), "model": {"num_experts": 6}},
    ),
    "three ranks, odd sizes": (
        3,
        {1},
        {"ep": 1, "model": {"num_experts": 7, "moe_intermediate_size": 9, "hidden_size": 36}},
    ),
    "interleaved, biases": (4, {0}, {"ep": 2, "family": "gpt_oss", "table": strided(8, 2)}),
    "interleaved, split within": (
        4,
        {1},
        {"ep": 2, "family": "gpt_oss", "model": {"num_local_experts": 6}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mesh_equals_loops_over_the_whole_stacks(name: str) -> None:
    world, dims, case = CASES[name]
    case = {"dtype": torch.float64, **case}
    results = run_ranks(merged_twice, world, case)
    check(results, case)
    assert all(result["dims"] == dims for result in results)


def check(results: list[dict[str, Any]], case: dict[str, Any]) -> None:
    tolerance = 1e-12 if case["dtype"] == torch.float64 else 1e-6
    number, interleaved = case.get("neighbours", 3), case.get("family") == "gpt_oss"
    states = [merge([result["states"][place] for result in results]) for place in range(3)]
    for place, rate in enumerate((0.5 * 6 / 8, 0.5 * 4 / 8)):
        expected, similarity = oracle(states[place], rate, number, interleaved)
        for key, value in expected.items():
            found = states[place + 1][key]
            torch.testing.assert_close(found, value, rtol=0, atol=tolerance, msg=key)
            moved = (found - states[place][key]).abs().max()
            assert (moved > 1e-4) == (".experts." in key), key
        for result in results:
            assert result["similarities"][place] == pytest.approx(similarity, abs=tolerance)


def test_of_equal_neighbours_the_lower_ids_on_every_mesh() -> None:
    for world, ep in ((1, 1), (2, 2), (2, 1)):
        case = {"ep": ep, "dtype": torch.float64, "neighbours": 2}
        check(run_ranks(merged_twice, world, case, True), case)


def test_equal_experts_stay_bit_for_bit() -> None:
    for before, after, similarity in run_ranks(equal_run, 2):
        assert similarity == pytest.approx(1, abs=1e-12)
        assert all(torch.equal(after[key], before[key]) for key in before)


@torch.no_grad()
def equal_run() -> tuple[State, State, float]:
    engine = make_engine(2, table=strided(8, 2))
    for _, layer in moe_layers(engine.model):
        for stack in layer.experts.stacks().values():
            local_S, generator = local_of(stack), torch.Generator().manual_seed(stack.shape[1])
            local_S.copy_(torch.randn(local_S.shape[1:], generator=generator).expand_as(local_S))
    before = whole(model_state(engine.model))
    found = merging(engine, interval=1, alpha=0.7, neighbours=3).after_step(NO_COUNTS)
    return before, whole(model_state(engine.model)), found[SIMILARITY]


def test_frozen_stacks_stay() -> None:
    for before, after in run_ranks(frozen_run, 4):
        for key, value in after.items():
            same = torch.equal(value, before[key])
            assert same == (not key.endswith("down_proj")), key


def frozen_run() -> tuple[State, State]:
    engine = make_engine(2, frozen=("gate_up_proj",))
    before = whole(model_state(engine.model))
    merging(engine, interval=1, alpha=0.7).after_step(NO_COUNTS)
    return before, whole(model_state(engine.model))


def test_training_is_the_same_on_every_mesh_and_after_a_resume(tmp_path: Path) -> None:
    """Merges after steps 2 and 4, none after step 6, the end of the warm-up."""
    (one,) = run_ranks(trained, 1, 1, None)
    merges = [SIMILARITY in found for found in one]
    assert merges == [False, True, False, True, False, False, False, False]
    saved = run_ranks(trained, 4, 2, str(tmp_path))
    resumed = run_ranks(trained, 2, 2, str(tmp_path), 3)
    for found in (*saved, *([*one[:3], *rest] for rest in resumed)):
        for a, b in zip(found, one, strict=True):
            assert (SIMILARITY in a) == (SIMILARITY in b)
            for name in ("train/loss", "train/grad_norm", SIMILARITY):
                assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-9)
    (plain,) = run_ranks(trained, 1, 1, None, 0, 100)
    assert [a["train/loss"] == b["train/loss"] for a, b in zip(one, plain, strict=True)] == (
        [True, True, *[False] * 6]
    )


def trained(ep: int, folder: str | None, start: int = 0, interval: int = 2) -> list[Any]:
    """Metrics of eight steps, with a checkpoint after three of them."""
    engine = make_engine(ep, table=strided(8, ep), dtype=torch.float64)
    merger = merging(engine, interval=interval, alpha=0.3, steps=6, neighbours=3)
    checkpointer = Checkpointer(folder, mesh=engine.mesh) if folder else None
    if start and checkpointer is not None:
        path = checkpointer.resolve("auto")
        extra = checkpointer.load(str(path), engine.model, engine.optimizer)
        engine.load_state_dict(extra["engine"])
        assert merger.step == start
    results = []
    for number in range(start, 8):
        results.append(step(engine, number))
        if number == 2 and checkpointer is not None:
            save(engine, checkpointer, 3)
            checkpointer.wait()
    return results


class Live(TorchDispatchMode):
    """Watches how many bytes are alive of those that operations made.

    Args:
        model: whose parameters were there before.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.old = {local_of(p).untyped_storage().data_ptr() for p in model.parameters()}
        self.made: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.made.append(weakref.ref(out))
        alive = [tensor for ref in self.made if (tensor := ref()) is not None]
        self.made = [weakref.ref(tensor) for tensor in alive]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        self.peak = max(self.peak, sum(storages[key] for key in storages.keys() - self.old))
        return out


def test_memory_of_two_stacks_of_one_rank() -> None:
    for peak, stack, expert in run_ranks(measured, 4):
        assert 2 * stack <= peak <= 2 * stack + 2 * expert


@torch.no_grad()
def measured() -> tuple[int, int, int]:
    """Peak bytes of a merge, of this rank's largest stack of a layer, and of one expert in it."""
    sizes = {"num_experts": 16, "moe_intermediate_size": 64, "hidden_size": 64}
    engine = make_engine(4, model=sizes)
    merger = merging(engine, interval=1)
    stack = local_of(moe_layers(engine.model)[0][1].experts.stacks()["gate_up_proj"])
    with pytest.MonkeyPatch.context() as patch, Live(engine.model) as live:
        patch.setattr("trainer.balance.merging.BLOCK", 64)
        merger.after_step(NO_COUNTS)
    return live.peak, stack.nbytes, stack[0].nbytes


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"interval": 0}, r"balance.merge_experts.interval \(0\) must be >= 1"),
        ({"steps": 0}, r"balance.merge_experts.steps \(0\) must be >= 1"),
        ({"neighbours": 0}, r"balance.merge_experts.neighbours \(0\) must be >= 1"),
        ({"alpha": 0.0}, r"balance.merge_experts.alpha \(0.0\) must be > 0, < 1"),
        ({"alpha": 1.0}, r"balance.merge_experts.alpha \(1.0\) must be > 0, < 1"),
        ({"alpha": math.nan}, r"balance.merge_experts.alpha \(nan\) must be > 0, < 1"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MergeExperts(**options)


def test_more_neighbours_than_others_are_refused() -> None:
    (said,) = run_ranks(refused, 1)
    assert said == (
        "balance.merge_experts.neighbours (8) must be <= 7: a layer has 8 experts; "
        "use fewer neighbours"
    )


def refused() -> str:
    engine = make_engine(1)
    merging(engine, neighbours=7)
    with pytest.raises(ValueError) as error:
        merging(engine, neighbours=8)
    return str(error.value)


def test_no_work_between_merges() -> None:
    merger = MergeExperts(interval=3, steps=5)  # without a model
    assert [merger.after_step(NO_COUNTS) for _ in range(2)] == [{}, {}]
    merger.load_state_dict(json.loads(json.dumps({"step": 5})))
    assert merger.after_step(NO_COUNTS) == {}
    assert merger.state_dict() == {"step": 6}
    assert merger.losses() == {}


def test_a_run_beside_a_balancer(tmp_path: Path) -> None:
    text = corpus(tmp_path / "text")
    run_ranks(whole_run, 2, str(text), str(tmp_path / "run"))
    lines = metrics(tmp_path / "run")
    assert [SIMILARITY in line for line in lines] == [False, True, False, True, False]
    assert all(line["train/balance_loss"] > 0 for line in lines)


def whole_run(text: str, folder: str) -> None:
    files = f"data.sources.text.paths={text}/*.txt"
    merge_options = "balance=[auto,merge_experts]", "balance.merge_experts.interval=2"
    changes = "train.steps=5", "train.log_every=1", "checkpoint.export=false", "train.generate=0"
    run(load(*TINY, files, f"run.dir={folder}", *merge_options, *changes))
