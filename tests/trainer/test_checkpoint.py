"""Checkpoints on real ranks: another mesh and placement, asynchronous, kept and refused."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from parallel.mesh import ParallelMesh
from parallel.model import parallelize
from parallel.planners import home_plan
from placement.table import ExpertPlacement
from tests.families import tiny_config
from tests.ranks import run_ranks
from trainer.balance import LossFreeBias
from trainer.checkpoint import Checkpointer, CheckpointError, CheckpointReader
from trainer.checkpoint_files import CheckpointWriter
from trainer.engine import TorchEngine
from trainer.state import logical_layout, model_state, optimizer_state

SEQUENCES, LENGTH, LAYERS = 8, 6, 2
EXPERTS = {"qwen3_moe": "num_experts", "glm4_moe": "n_routed_experts"}


def make_model(family: str, num_experts: int, seed: int = 0) -> nn.Module:
    """An unsplit float64 model."""
    config = tiny_config(family, **{EXPERTS[family]: num_experts})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).double()


@pytest.fixture(scope="module", autouse=True)
def families_imported() -> None:
    """Import what models need once, not in every forked rank."""
    for family in EXPERTS:
        make_model(family, 2)


def make_placement(name: str, num_experts: int, ep: int) -> ExpertPlacement:
    contiguous = ExpertPlacement.contiguous(LAYERS, num_experts, ep)
    if name == "contiguous":
        return contiguous
    generator = torch.Generator().manual_seed(11)
    rows = [row[torch.randperm(num_experts, generator=generator)] for row in contiguous.home_LE]
    return ExpertPlacement(torch.stack(rows), ep)


def make_engine(
    family: str = "qwen3_moe",
    num_experts: int = 8,
    *,
    ep: int = 1,
    placement: str = "shuffled",
    seed: int = 0,
    **options: Any,
) -> TorchEngine:
    """An engine whose learning rate falls from step to step."""
    mesh = ParallelMesh.build(ep=ep, device_type="cpu")
    model = make_model(family, num_experts, seed)
    table = make_placement(placement, num_experts, ep)
    parallelize(model, mesh, placement=table, planner=home_plan)
    return TorchEngine(
        model.float() if options.get("bf16") else model,
        mesh,
        make_optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
        make_schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.7**step),
        balancers=[LossFreeBias(0.05)] if family == "glm4_moe" else [],
        **options,
    )


def train(engine: TorchEngine, step: int) -> float:
    """One optimizer step on the global batch of that step; its loss."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 64, (SEQUENCES, LENGTH + 1), generator=generator)
    positions = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    mine = slice(engine.mesh.rank, None, engine.mesh.world_size)
    batch = {"input_ids": ids[mine, :-1], "labels": ids[mine, 1:], "position_ids": positions[mine]}
    return engine.train_step([batch]).metrics["train/loss"]


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of this rank's tensors, sharded ones gathered."""
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for key, value in state.items()
    }


def snapshot(engine: TorchEngine) -> dict[str, Tensor]:
    """Everything that a checkpoint holds of this rank, by key."""
    state = whole(model_state(engine.model))
    moments = whole(optimizer_state(engine.model, engine.optimizer))
    steps = torch.stack([values["step"] for values in engine.optimizer.state.values()])
    return {**state, **{f"optimizer {k}": v for k, v in moments.items()}, "step": steps.unique()}


def extra_of(engine: TorchEngine, **more: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(engine.model.config.to_dict(), default=str))
    return {"model_config": config, "engine": engine.state_dict(), **more}


def save(engine: TorchEngine, checkpointer: Checkpointer, step: int, **more: Any) -> None:
    checkpointer.save(step, engine.model, engine.optimizer, extra_of(engine, **more))


def merge(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One dict from those of all ranks, which must agree where they overlap."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for key, value in part.items():
            assert torch.equal(merged.setdefault(key, value), value), key
    return merged


def uninterrupted(case: dict[str, Any], directory: str) -> dict[str, Any]:
    """Two steps, a save, one more step."""
    engine = make_engine(**case)
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    for step in range(2):
        train(engine, step)
    saved = snapshot(engine)
    save(engine, checkpointer, 2, data={"position": 16})
    loss = train(engine, 2)
    checkpointer.wait()
    return {"saved": saved, "loss": loss, "state": snapshot(engine), "dims": split_dims(engine)}


def split_dims(engine: TorchEngine) -> set[int]:
    """The dims of the stacks of experts over which EDP splits them."""
    stacks = [p for n, p in engine.model.named_parameters() if ".experts.experts." in n]
    return {placement.dim for stack in stacks for placement in stack.placements}


def resumed(case: dict[str, Any], directory: str) -> dict[str, Any]:
    """The same third step on another mesh, from other weights."""
    engine = make_engine(**case, seed=1)
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    path = checkpointer.resolve("auto")
    assert path is not None
    extra = checkpointer.load(path, engine.model, engine.optimizer)
    engine.load_state_dict(extra["engine"])
    loaded = snapshot(engine)
    return {
        "saved": loaded,
        "loss": train(engine, 2),
        "state": snapshot(engine),
        "extra": extra,
        "dims": split_dims(engine),
    }


SAVED = {  # ranks and mesh of the run that saves
    "qwen3, EP 4": (4, {"family": "qwen3_moe", "ep": 4, "placement": "contiguous"}),
    "glm4, EP 4": (4, {"family": "glm4_moe", "ep": 4, "placement": "contiguous"}),
    "qwen3, experts split": (4, {"family": "qwen3_moe", "num_experts": 6, "ep": 2}),
}
RESUMED = {  # ranks, EP, placement of the run that loads
    "EP 4": (4, 4, "contiguous"),
    "EP 2": (2, 2, "shuffled"),
    "EP 1": (1, 1, "contiguous"),
    "EP 2 x EDP 2": (4, 2, "shuffled"),
    "EP 1 x EDP 2": (2, 1, "shuffled"),
}
SPLIT_WITHIN = ("qwen3, experts split", "EP 2 x EDP 2")  # 3 experts per rank over 2 ranks
PAIRS = [
    *[("qwen3, EP 4", load) for load in RESUMED],
    *[("glm4, EP 4", load) for load in ("EP 4", "EP 2", "EP 1")],
    *[("qwen3, experts split", load) for load in RESUMED if load != "EP 4"],  # of 6 experts
]


@pytest.fixture(scope="module")
def saved_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Directory and results of every run in SAVED."""
    runs = {}
    for name, (world, case) in SAVED.items():
        directory = str(tmp_path_factory.mktemp("checkpoints"))
        runs[name] = directory, run_ranks(uninterrupted, world, case, directory)
    return runs


@pytest.mark.parametrize(("name", "load"), PAIRS)
def test_next_step_is_the_same_on_another_mesh(
    name: str, load: str, saved_runs: dict[str, Any]
) -> None:
    directory, before = saved_runs[name]
    world, ep, placement = RESUMED[load]
    case = {**SAVED[name][1], "ep": ep, "placement": placement}
    after = run_ranks(resumed, world, case, directory)
    assert before[0]["dims"] == ({1} if name == "qwen3, experts split" else {0})
    assert after[0]["dims"] == ({1} if (name, load) == SPLIT_WITHIN else {0})
    saved, loaded = merge([r["saved"] for r in before]), merge([r["saved"] for r in after])
    assert saved.keys() == loaded.keys()
    for key, value in saved.items():
        assert torch.equal(loaded[key], value), key
    for result in after:
        assert result["loss"] == pytest.approx(before[0]["loss"], abs=1e-10)
        assert result["extra"]["data"] == {"position": 16}
    want, got = merge([r["state"] for r in before]), merge([r["state"] for r in after])
    # routers of glm4 compute in fp32, so that their sums depend on the number of rows per rank
    tolerance = 0.0 if load == "EP 4" else 1e-7 if name == "glm4, EP 4" else 1e-10
    for key, value in want.items():
        error = (got[key] - value).abs() - tolerance * value.abs()
        assert float(error.max()) <= tolerance, key
    assert any(not torch.equal(want[key], saved[key]) for key in want)  # the step did something


def test_the_selection_bias_is_part_of_the_checkpoint(saved_runs: dict[str, Any]) -> None:
    saved = merge([r["saved"] for r in saved_runs["glm4, EP 4"][1]])
    biases = [value for key, value in saved.items() if key.endswith("e_score_correction_bias")]
    assert len(biases) == LAYERS
    assert all(bool((bias != 0).any()) for bias in biases)


@pytest.mark.parametrize("name", list(SAVED))
def test_reader_needs_no_process_group(name: str, saved_runs: dict[str, Any]) -> None:
    directory, results = saved_runs[name]
    saved = merge([r["saved"] for r in results])
    reader = CheckpointReader(Path(directory) / "step-00000002")
    keys = reader.keys()
    assert keys == sorted(k for k in saved if not k.startswith("optimizer ") and k != "step")
    for key in keys:
        assert torch.equal(reader.get(key), saved[key]), key
        assert reader[key].dtype == saved[key].dtype
    assert reader.step == 2
    assert reader.extra["data"] == {"position": 16}
    with pytest.raises(ValueError, match=r"step-00000002: has no tensor model\.nothing"):
        reader.get("model.nothing")


def layouts(case: dict[str, Any]) -> dict[str, Tensor]:
    return logical_layout(make_engine(**case).model)


def test_layout_is_that_of_the_unsplit_model() -> None:
    want = {}
    for name, value in make_model("glm4_moe", 8).state_dict().items():
        prefix, _, parameter = name.rpartition(".")
        if prefix.endswith(".experts"):
            want.update({f"{prefix}.{e}.{parameter}": v for e, v in enumerate(value)})
        else:
            want[name] = value
    for layout in run_ranks(layouts, 2, {"family": "glm4_moe", "ep": 2}):
        assert layout.keys() == want.keys()
        for key, value in want.items():
            assert (layout[key].shape, layout[key].dtype) == (value.shape, value.dtype), key


def save_untrained(directory: str) -> dict[str, Any]:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    save(engine, checkpointer, 0)
    again = make_engine(ep=2, seed=1)
    path = checkpointer.directory / "step-00000000"
    checkpointer.wait()
    checkpointer.load(path, again.model, again.optimizer)
    return {"losses": [(train(engine, 0), train(again, 0)) for _ in range(2)]}


def test_run_that_was_stopped_before_its_first_step(tmp_path: Path) -> None:
    for result in run_ranks(save_untrained, 2, str(tmp_path)):
        for loss, again in result["losses"]:
            assert loss == again


class HeldWriter:
    """Holds back the background's writing until it is let go."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        write = CheckpointWriter.write_data

        def held(writer: CheckpointWriter, *args: Any) -> Any:
            assert self.go.wait(60)
            return write(writer, *args)

        patch.setattr(CheckpointWriter, "write_data", held)


def train_while_saving(directory: str) -> dict[str, Any]:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    train(engine, 0)
    saved = snapshot(engine)
    with pytest.MonkeyPatch.context() as patch:
        writer = HeldWriter(patch)
        save(engine, checkpointer, 1)
        polled, before = checkpointer.poll(), checkpointer.latest()
        train(engine, 1)
        changed = snapshot(engine)
        writer.go.set()
        checkpointer.wait()
    again = make_engine(ep=2, seed=3)
    path = checkpointer.latest()
    assert path is not None
    checkpointer.load(path, again.model, again.optimizer)
    return {
        "saved": saved,
        "changed": changed,
        "loaded": snapshot(again),
        "polled": polled,
        "polled after": checkpointer.poll(),
        "latest before": before,
        "latest": path,
    }


def test_asynchronous_save_keeps_the_values_of_the_call(tmp_path: Path) -> None:
    for result in run_ranks(train_while_saving, 2, str(tmp_path)):
        assert result["polled"] is False
        assert result["polled after"] is True
        assert result["latest before"] is None
        assert result["latest"] == tmp_path / "step-00000001"
        for key, value in result["saved"].items():
            assert torch.equal(result["loaded"][key], value), key
        assert not torch.equal(
            result["changed"]["lm_head.weight"], result["saved"]["lm_head.weight"]
        )


def save_many(directory: str, asynchronous: bool) -> list[list[str]]:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(directory, mesh=engine.mesh, keep=2, asynchronous=asynchronous)
    seen = []
    for step in (9, 10, 11, 100_000_000):
        save(engine, checkpointer, step)  # waits for the one before
        seen.append(sorted(path.name for path in Path(directory).iterdir()))
    checkpointer.wait()
    seen.append(sorted(path.name for path in Path(directory).iterdir()))
    assert checkpointer.latest() == Path(directory) / "step-100000000"
    return seen


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    names = ["step-00000009", "step-00000010", "step-00000011", "step-100000000"]
    seen = run_ranks(save_many, 2, str(tmp_path / "sync"), False)[0]
    assert seen == [names[:1], names[:2], names[1:3], names[2:], names[2:]]
    seen = run_ranks(save_many, 2, str(tmp_path / "async"), True)[0]
    assert seen[-1] == names[2:]
    assert {"step-00000009", "step-00000010"} <= set(seen[2])  # until the newer one is complete


def save_after_evaluation(directory: str) -> dict[str, Any]:
    """Weights that stay gathered in bf16 after an evaluation are not what is saved."""
    engine = make_engine(ep=1, bf16=True, reshard_after_forward=False)
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    train(engine, 0)
    saved = snapshot(engine)
    ids = torch.arange(LENGTH)[None]
    engine.eval_step({"input_ids": ids, "labels": ids, "position_ids": ids})
    save(engine, checkpointer, 1)
    checkpointer.wait()
    return saved


def test_masters_are_saved_after_an_evaluation(tmp_path: Path) -> None:
    saved = merge(run_ranks(save_after_evaluation, 2, str(tmp_path)))
    reader = CheckpointReader(tmp_path / "step-00000001")
    keys = reader.keys()
    for key in keys:
        assert torch.equal(reader.get(key), saved[key]), key
    assert reader.get("lm_head.weight").dtype == torch.float32


def message(call: Any) -> str:
    """What a call that must fail says."""
    try:
        call()
    except (ValueError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def load_into(directory: str, path: str, change: str) -> str:
    """The refusal to load a checkpoint into a run that differs from the one that saved it."""
    engine = make_engine(num_experts=4 if change == "experts" else 8, ep=2)
    if change == "top-k":
        engine.model.config.num_experts_per_tok = 3
        engine.model.config.rms_norm_eps = 0.5
    if change == "buffer":
        engine.model.register_buffer("extra_buffer", torch.zeros(3))
    if change == "no norm":
        del engine.model.model.norm
    if change == "dtype":
        engine.model.float()
    if change == "optimizer":
        engine.optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1, momentum=0.9)
    checkpointer = Checkpointer(directory, mesh=engine.mesh)
    return message(lambda: checkpointer.load(path, engine.model, engine.optimizer))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("experts", "of another model: num_local_experts is 8 there and 4 here"),
        (
            "top-k",
            "num_experts_per_tok is 2 there and 3 here; rms_norm_eps is 1e-06 there and 0.5 here",
        ),
        ("buffer", "extra_buffer is missing there"),
        ("no norm", "model.norm.weight is unknown here"),
        ("dtype", "is torch.float64 (64, 32) there and torch.float32 (64, 32) here"),
        (
            "optimizer",
            "its state is ['exp_avg', 'exp_avg_sq', 'lr', 'step'] there and "
            "['lr', 'momentum_buffer'] here",
        ),
    ],
)
def test_another_model_is_refused(change: str, said: str, saved_runs: dict[str, Any]) -> None:
    directory, _ = saved_runs["qwen3, EP 4"]
    path = f"{directory}/step-00000002"
    for text in run_ranks(load_into, 2, directory, path, change):
        assert text.startswith(f"ValueError: checkpoint {path} is of another")
        assert said in text


def resolve_cases(directory: str) -> dict[str, Any]:
    engine = make_engine(ep=2)
    checkpointer = Checkpointer(directory, mesh=engine.mesh, asynchronous=False)
    said: dict[str, Any] = {"auto, empty": checkpointer.resolve("auto")}
    said["none, empty"] = checkpointer.resolve("none")
    for step in (1, 2):
        save(engine, checkpointer, step)
    said["auto"] = checkpointer.resolve("auto")
    said["path"] = checkpointer.resolve(f"{directory}/step-00000002")
    for resume in ("none", "missing", "", "step-00000001"):
        path = resume if resume == "none" else f"{directory}/{resume}"
        said[resume] = message(lambda path=path: checkpointer.resolve(path))
    said["again"] = message(lambda: save(engine, checkpointer, 2))
    said["keep"] = message(lambda: Checkpointer(directory, mesh=engine.mesh, keep=0))
    return said


def test_where_to_start(tmp_path: Path) -> None:
    first, second = run_ranks(resolve_cases, 2, str(tmp_path))
    assert first == second
    newest = tmp_path / "step-00000002"
    assert (first["auto, empty"], first["none, empty"]) == (None, None)
    assert (first["auto"], first["path"]) == (newest, newest)
    later = f"but {tmp_path} holds checkpoints up to step 2; use checkpoint.resume=auto"
    assert f"checkpoint.resume (none) starts at step 0, {later}" in first["none"]
    assert f"step-00000001) starts at step 1, {later}" in first["step-00000001"]
    assert "missing: there is no such folder" in first["missing"]
    assert f"complete.json is missing; {newest} is complete" in first[""]
    assert f"checkpoint {newest} exists; checkpoints are never overwritten" in first["again"]
    assert first["keep"] == "ValueError: checkpoint.keep (0) must be >= 1"


def latest_of(directory: str) -> Path | None:
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    return Checkpointer(directory, mesh=mesh).latest()


def test_newer_format_is_not_passed_over(
    tmp_path: Path, saved_runs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "step-00000007"
    path.mkdir()
    (path / "complete.json").write_text('{"format": 2, "files": {}}')
    with caplog.at_level(logging.WARNING):
        assert run_ranks(latest_of, 1, str(tmp_path)) == [path]
    directory, _ = saved_runs["qwen3, EP 4"]
    for text in run_ranks(load_into, 2, directory, str(path), "nothing"):
        assert text.endswith(
            f"checkpoint {path}: its format (2) is newer than 1, the newest that this version "
            f"reads; update Evenkeel"
        )
