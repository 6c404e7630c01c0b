"""Training with experts that move between steps, on real ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from parallel.mesh import ParallelMesh
from parallel.model import moe_layers, parallelize
from parallel.planners import home_plan
from placement.table import ExpertPlacement
from tests.families import tiny_config
from trainer.engine import TorchEngine

SEQUENCES, LENGTH, LAYERS = 8, 12, 2


def random_table(seed: int, num_experts: int, ep: int, layers: int = LAYERS) -> ExpertPlacement:
    """Every expert anywhere."""
    generator = torch.Generator().manual_seed(seed)
    row_E = torch.arange(num_experts) % ep
    rows = [row_E[torch.randperm(num_experts, generator=generator)] for _ in range(layers)]
    return ExpertPlacement(torch.stack(rows), ep)


def make_engine(
    ep: int,
    *,
    family: str = "qwen3_moe",
    dtype: torch.dtype = torch.float32,
    ranks_per_node: int | None = None,
    planner: Any = home_plan,
    table: ExpertPlacement | None = None,
    model: dict[str, Any] | None = None,
    layers: dict[str, Any] | None = None,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> TorchEngine:
    """An engine with fused AdamW.

    Args:
        model: overrides of the family's tiny configuration. frozen: names of stacks of experts.
        layers: arguments of `parallelize`. options: of the engine.
    """
    mesh = ParallelMesh.build(ep=ep, ranks_per_node=ranks_per_node, device_type="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        whole: Any = AutoModelForCausalLM.from_config(tiny_config(family, **(model or {})))
    whole.to(dtype)
    parallelize(whole, mesh, placement=table, planner=planner, **(layers or {}))
    for _, layer in moe_layers(whole):
        for name in frozen:
            getattr(layer.experts, name).requires_grad_(False)
    return TorchEngine(
        whole,
        mesh,
        make_optimizer=lambda m: torch.optim.AdamW(
            [p for p in m.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1, fused=True
        ),
        make_schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.95**step),
        balancers=[],
        **options,
    )


def step(engine: TorchEngine, number: int) -> dict[str, float]:
    """One optimizer step on the global batch of that number; its metrics."""
    return engine.train_step([batch(engine, number)]).metrics


def batch(engine: TorchEngine, number: int) -> dict[str, Tensor]:
    """This rank's part of a global batch; ranks have other numbers of tokens to predict."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 64, (SEQUENCES, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for sequence in range(SEQUENCES):
        labels[sequence, : sequence % 5] = -100
    positions = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    mine = slice(engine.mesh.rank, None, engine.mesh.world_size)
    return {"input_ids": ids[mine, :-1], "labels": labels[mine], "position_ids": positions[mine]}
