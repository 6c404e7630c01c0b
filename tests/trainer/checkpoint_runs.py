"""Small runs that the checkpoint tests save and resume, on real ranks."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from parallel.mesh import ParallelMesh
from parallel.model import parallelize
from parallel.planners import home_plan
from placement.table import ExpertPlacement
from tests.families import tiny_config
from trainer.balance.bias import LossFreeBias
from trainer.checkpoint import Checkpointer, CheckpointError
from trainer.engine import TorchEngine
from trainer.state import model_state, optimizer_state

SEQUENCES, LENGTH, LAYERS = 8, 6, 2
EXPERTS = {"qwen3_moe": "num_experts", "glm4_moe": "n_routed_experts"}


def make_model(family: str, num_experts: int, seed: int = 0) -> nn.Module:
    """An unsplit float64 model."""
    config = tiny_config(family, **{EXPERTS[family]: num_experts})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).double()


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


def message(call: Any) -> str:
    """What a call that must fail says."""
    try:
        call()
    except (ValueError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")
