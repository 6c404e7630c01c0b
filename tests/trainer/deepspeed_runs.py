"""Runs of the DeepSpeed engine for its tests, on real ranks, and the same on one process.

In fp32, in which DeepSpeed computes. It is imported in the ranks only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.mesh import ParallelMesh
from parallel.model import parallelize
from parallel.plan import DispatchPlan
from parallel.planners import home_plan
from placement.table import ExpertPlacement
from tests.parallel.test_families import full_model
from tests.parallel.test_layer import RandomPlanner
from tests.trainer.checkpoint_runs import whole
from tests.trainer.test_engine import BALANCERS, SEQUENCES, constant, sequences
from trainer.engine import IGNORED, TorchEngine
from trainer.engine_deepspeed import DeepSpeedEngine
from trainer.state import model_state
from trainer.training_state import state_of

WORLD, STEPS, ACCUMULATE = 4, 3, 2
BUCKET = 1000  # elements: several per step, and parameters that do not fit into one
ADAMW = {"optimizer": "adamw", "clip": 0.5, "steps": STEPS}
SGD = {"optimizer": "sgd", "clip": 0.0, "steps": 1}  # shows scales that AdamW hides


class SometimesPlanner(RandomPlanner):
    """Moves rows and experts in one EP group and not in the other, now and then."""

    def __call__(self, counts_RE: Tensor, home_E: Tensor) -> DispatchPlan:
        if int(counts_RE[:, 0].sum()) % 2:
            return super().__call__(counts_RE, home_E)
        return home_plan(counts_RE, home_E)


def shuffled(model: Any, ep: int) -> ExpertPlacement:
    """A table in which no rank's experts are neighbours."""
    blocks = [m for n, m in model.named_modules() if n.endswith(".experts")]
    contiguous = ExpertPlacement.contiguous(len(blocks), blocks[0].num_experts, ep)
    order = torch.arange(blocks[0].num_experts).view(-1, 2).T.flatten()
    return ExpertPlacement(contiguous.home_LE[:, order], ep)


def lopsided(step: int, vocab_size: int) -> dict[str, Tensor]:
    """A global batch of which rank 0 has next to nothing to predict."""
    batch = sequences(step, vocab_size)
    batch["labels"][::WORLD, 2:] = IGNORED
    return batch


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05)
    # eps: so large that the rounding of gradients near 0 does not decide about their updates
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-3)


def make(
    case: dict[str, Any],
    kind: Any = DeepSpeedEngine,
    optimizer: Any = None,
    schedule: Any = constant,
    scale: float = 1,
) -> Any:
    """An engine of a kind, in fp32, with a moving planner and experts all over the place.

    Args:
        optimizer: makes it; default the case's. scale: of all weights.
    """
    model: Any = full_model(case.get("family", "qwen3_moe")).float()
    for parameter in model.parameters():
        parameter.data *= scale
    mesh = ParallelMesh.build(ep=case["ep"], device_type="cpu")
    table = shuffled(model, case["ep"])
    refetch = case.get("refetch", False)
    parallelize(model, mesh, placement=table, planner=SometimesPlanner(3), refetch=refetch)
    options: dict[str, Any] = {}
    if kind is DeepSpeedEngine:
        options = {
            "zero_stage": case["zero_stage"],
            "offload_optimizer": case.get("offload_optimizer", False),
            "bucket_elements": BUCKET,
            "persist_below": case.get("persist_below", 0),
        }
    return kind(
        model,
        mesh,
        make_optimizer=optimizer or (lambda m: make_optimizer(case["optimizer"], m.parameters())),
        make_schedule=schedule,
        balancers=BALANCERS[case.get("balancer", "none")](),
        bf16=case.get("bf16", False),
        recompute=case.get("recompute", False),
        max_grad_norm=case["clip"],
        **options,
    )


def train_step(engine: Any, step: int) -> Any:
    batch = lopsided(step, engine.model.config.vocab_size)
    mine = torch.arange(engine.mesh.rank, SEQUENCES, engine.mesh.world_size)
    parts = mine.chunk(ACCUMULATE)
    return engine.train_step([{k: v[part] for k, v in batch.items()} for part in parts])


def masters(engine: Any) -> dict[str, Tensor]:
    """Masters on this rank by logical key."""
    if isinstance(engine, TorchEngine):
        return whole(model_state(engine.model))
    saved = engine.optimizer.tensors(copy=True)
    return {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}


def result_of(engine: Any, steps: int) -> dict[str, Any]:
    metrics = [train_step(engine, step).metrics for step in range(steps)]
    batch = lopsided(9, engine.model.config.vocab_size)
    mine = slice(engine.mesh.rank, None, engine.mesh.world_size)
    validation = engine.eval_step({k: v[mine] for k, v in batch.items()})
    return {"metrics": metrics, "state": masters(engine), "validation": validation}


@cache
def plain(family: str, optimizer_name: str, clip: float, steps: int) -> dict[str, Any]:
    """The same training with the unsplit model on one process."""
    model: Any = full_model(family).float()
    optimizer = make_optimizer(optimizer_name, model.parameters())
    losses, norms = [], []
    for step in range(steps):
        loss = plain_loss(model, step)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(grads)))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".experts"):
            state |= {f"{prefix}.{e}.{last}": part for e, part in enumerate(value)}
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            state[name] = value
    with torch.no_grad():
        validation = float(plain_loss(model.eval(), 9))
    return {"losses": losses, "norms": norms, "state": state, "validation": validation}


def plain_loss(model: Any, step: int) -> Tensor:
    batch = lopsided(step, model.config.vocab_size)
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def saved(engine: Any) -> dict[str, Tensor]:
    """Everything that this rank saves."""
    return whole(state_of(engine.model, engine.optimizer).tensors(copy=True))
