"""What a conversion will write, known before a byte of it is.

The plan is everything: configuration, every tensor's name, shape, dtype and file, and what is
expected of the result.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from configs.upcycle_schema import RecipeConfig, UpcycleConfig
from trainer.export import Shard, plan_shards
from trainer.hf_checkpoint import HFCheckpoint, weight_files
from trainer.hf_format import HFFormat
from trainer.metrics import parameter_counts
from trainer.modeling import local_checkpoint
from trainer.upcycle.dense import DenseModel, dense_model
from trainer.upcycle.layout import Layout
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.recipe import Recipe
from trainer.upcycle.routers import RouterInit
from trainer.upcycle.targets import choose

STATE_BYTES = 16  # of a parameter in training: fp32 weight, gradient and two moments
# of the configuration, what decides the bytes that are written
DECIDING = ("target", "routing", "scale", "dtype", "seed", "max_shard_gb", "recipe", "router")
CHUNK = 1 << 22


@dataclass(frozen=True)
class Plan:
    """A conversion.

    Attributes:
        model: the tensors, made when asked for. form: their names, shapes and dtypes on disk.
        shards: their files. inexact: why the MoE does not begin as the dense model; empty if it
            does.
    """

    config: UpcycleConfig
    model: UpcycledModel
    form: HFFormat
    shards: list[Shard]
    inexact: str

    @property
    def layout(self) -> Layout:
        return self.model.layout

    @property
    def num_bytes(self) -> int:
        """Of all weights together."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def parameters(self) -> tuple[int, int]:
        """All, and those that a token meets."""
        return parameter_counts(self.form.model)

    def source_files(self) -> list[Path]:
        """The dense models' weights."""
        return [file for model in self.model.models for file in weight_files(model.checkpoint.path)]

    def identity(self, source_hashes: list[str]) -> str:
        """A digest of all that decides the written bytes."""
        resolved = self.config.resolved
        deciding = {key: resolved[key] for key in DECIDING} | {"sources": source_hashes}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def make_plan(config: UpcycleConfig) -> Plan:
    """Read the headers of the dense checkpoints and plan the conversion.

    Raises:
        ValueError: for whatever cannot be converted, before anything is written.
    """
    models = [dense_model(HFCheckpoint(local_checkpoint(path))) for path in config.sources]
    model = upcycled(config, models, config.seed)
    dtype = getattr(torch, config.dtype) if config.dtype else models[0].dtype
    form = HFFormat(model.config, dtype)
    whole_groups = getattr(model.config, "n_group", 1) > 1
    return Plan(
        config,
        model,
        form,
        plan_shards(form, int(config.max_shard_gb * 2**30)),
        model.layout.inexact_for(config.routing, model.router.scores, whole_groups),
    )


def upcycled(config: RecipeConfig, models: list[DenseModel], seed: int) -> UpcycledModel:
    """The MoE that recipe and router make of dense models."""
    recipe: Recipe = instantiate(config.recipe)
    router: RouterInit = instantiate(config.router)
    layout = recipe.layout(models[0].shape)
    return UpcycledModel(
        models,
        recipe,
        choose(config.target, models[0], layout, config.routing),
        routing=config.routing,
        scale=config.scale,
        router=router,
        seed=seed,
    )


def sha256(path: Path) -> str:
    """Of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def describe(plan: Plan) -> dict[str, Any]:
    """The plan in lines for a table."""
    layout, config = plan.layout, plan.config
    total, active = plan.parameters
    dense = sum(
        parameter.numel() for parameter in HFFormat(plan.model.models[0].config).model.parameters()
    )
    gib = 2**30
    shared = f", shared expert of {layout.shared_width}" if layout.shared_width else ""
    return {
        "source": ", ".join(config.sources),
        "target": f"{plan.model.target.family}, {config.routing.value} routing",
        "experts": f"{layout.num_experts} of width {layout.width}, top {layout.top_k}{shared}",
        "parameters": f"{total:,}, {active:,} active per token; dense {dense:,}",
        "written": f"{plan.num_bytes / gib:.3g} GiB in {len(plan.shards)} files, "
        f"{str(plan.form.model.dtype).removeprefix('torch.')}",
        f"training on {config.gpus} GPUs": f"{total * STATE_BYTES / config.gpus / gib:.3g} GiB "
        "per GPU of weights, gradients and optimizer state",
        "begins as the dense model": "yes" if not plan.inexact else f"no: {plan.inexact}",
    }
