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
from trainer.upcycle.alike import check_alike, shape_of
from trainer.upcycle.dense import DenseModel, dense_model
from trainer.upcycle.expanded import ExpandedModel
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.recipe import Recipe
from trainer.upcycle.recipes.expand import Expand
from trainer.upcycle.routers import Random, RouterInit
from trainer.upcycle.targets import choose

MadeModel = UpcycledModel | ExpandedModel
STATE_BYTES = 16  # of a parameter in training: fp32 weight, gradient and two moments
# of the configuration, what decides the bytes that are written
DECIDING = (
    "target", "routing", "scale", "dtype", "seed", "max_shard_gb", "recipe", "router_init",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A conversion.

    Attributes:
        model: the tensors, made when asked for. form: their names, shapes and dtypes on disk.
        shards: their files. inexact: why the MoE does not begin as the dense model; empty if it
            does.
    """

    config: UpcycleConfig
    model: MadeModel
    form: HFFormat
    shards: list[Shard]
    inexact: str

    @property
    def num_bytes(self) -> int:
        """Of all weights together."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def parameters(self) -> tuple[int, int]:
        """All, and those that a token meets."""
        return parameter_counts(self.form.model)

    def source_files(self) -> list[Path]:
        """The sources' weights."""
        return [file for one in self.model.checkpoints for file in weight_files(one.path)]

    def identity(self, source_hashes: list[str]) -> str:
        """A digest of all that decides the written bytes."""
        resolved = self.config.resolved
        deciding = {key: resolved[key] for key in DECIDING}
        deciding |= {"sources": source_hashes, "made": self.model.noted()}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def make_plan(config: UpcycleConfig) -> Plan:
    """Read the headers of the checkpoints and plan the conversion.

    Raises:
        ValueError: for whatever cannot be converted, before anything is written.
    """
    checkpoints = [HFCheckpoint(local_checkpoint(path)) for path in config.sources]
    model = made(config, checkpoints, config.seed)
    form = HFFormat(model.config, getattr(torch, config.dtype) if config.dtype else model.dtype)
    shards = plan_shards(form, int(config.max_shard_gb * 2**30))
    inexact = model.inexact
    if isinstance(model, ExpandedModel):
        inexact = model.inexact_in(form.model.dtype)
    return Plan(config, model, form, shards, inexact)


def made(config: RecipeConfig, checkpoints: list[HFCheckpoint], seed: int) -> MadeModel:
    """The MoE that the recipe makes of dense models, or of an MoE.

    Raises:
        ValueError: for whatever the recipe cannot be done with.
    """
    recipe = instantiate(config.recipe)
    if isinstance(recipe, Expand):
        return expanded(config, recipe, checkpoints, seed)
    return upcycled(config, [dense_model(checkpoint) for checkpoint in checkpoints], seed)


def expanded(
    config: RecipeConfig, recipe: Expand, checkpoints: list[HFCheckpoint], seed: int
) -> ExpandedModel:
    """The MoE with more experts than the one in the checkpoint.

    Raises:
        ValueError: also for settings that belong to recipes for dense models.
    """
    if len(checkpoints) > 1:
        raise ValueError(f"source: recipe=expand takes one MoE, not {len(checkpoints)} models")
    model = ExpandedModel(checkpoints[0], recipe, seed)
    default = RecipeConfig()
    for key, own in (
        ("target", model.family),
        ("routing", model.routing),
        ("scale", default.scale),
    ):
        value = getattr(config, key)
        if value not in (getattr(default, key), own):
            raise ValueError(
                f"{key} ({getattr(value, 'value', value)}) is for dense sources; recipe=expand "
                f"keeps the MoE's own: leave it out"
            )
    if config.router_init is not None and instantiate(config.router_init) != Random():
        raise ValueError(
            "router_init is for dense sources; recipe=expand copies rows: leave it out"
        )
    return model


def upcycled(config: RecipeConfig, models: list[DenseModel], seed: int) -> UpcycledModel:
    """The MoE that recipe and router make of dense models."""
    recipe: Recipe = instantiate(config.recipe)
    router: RouterInit = instantiate(config.router_init)
    check_alike(models)
    layout = recipe.layout(shape_of(models))
    return UpcycledModel(
        models,
        recipe,
        choose(config.target, models[0], layout, config.routing),
        routing=config.routing,
        scale=config.scale,
        router=router,
        seed=seed,
    )


def describe(plan: Plan) -> dict[str, Any]:
    """The plan in lines for a table."""
    config, model = plan.config, plan.model
    total, active = plan.parameters
    before = HFFormat(model.checkpoints[0].config).model.parameters()
    kind = "dense" if isinstance(model, UpcycledModel) else "before"
    source = "the dense model" if isinstance(model, UpcycledModel) else "the source"
    gib = 2**30
    return {
        "source": ", ".join(config.sources),
        "target": f"{model.family}, {model.routing.value} routing",
        "experts": model.experts,
        "parameters": f"{total:,}, {active:,} active per token; "
        f"{kind} {sum(parameter.numel() for parameter in before):,}",
        "written": f"{plan.num_bytes / gib:.3g} GiB in {len(plan.shards)} files, "
        f"{str(plan.form.model.dtype).removeprefix('torch.')}",
        f"training on {config.gpus} GPUs": f"{total * STATE_BYTES / config.gpus / gib:.3g} GiB "
        "per GPU of weights, gradients and optimizer state",
        f"begins as {source}": "yes" if not plan.inexact else f"no: {plan.inexact}",
    }
