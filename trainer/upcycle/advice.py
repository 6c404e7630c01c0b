"""What to know before training what a recipe makes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from configs.upcycle_schema import Routing
from trainer.upcycle.expanded import ExpandedModel
from trainer.upcycle.layout import Scores
from trainer.upcycle.model import UpcycledModel
from trainer.upcycle.plan import Plan
from trainer.upcycle.recipes.innovator import Innovator

LANE = 8  # neurons; grouped products want rows of a multiple of 16 bytes


def advice(plan: Plan) -> Iterator[str]:
    """Lines about choices that train badly without an error."""
    if isinstance(plan.model, ExpandedModel):
        yield from _expanded(plan.model, plan.form.model.dtype)
    else:
        yield from _upcycled(plan.model)


def _expanded(model: ExpandedModel, dtype: torch.dtype) -> Iterator[str]:
    recipe = model.recipe
    if recipe.mode == "double" and not recipe.apart:
        yield (
            "all copies of an expert are chosen together and learn the same; recipe.apart=0.01 "
            "sets them apart and keeps the function"
        )
    if recipe.mode == "double" and not model.fp32_scores:
        yield (
            "this trainer keeps routers in fp32; elsewhere in bf16, scores of different experts "
            "collide and a few tokens in a thousand miss a copy"
        )
    if recipe.mode == "hyperplane" and dtype is not torch.float32:
        yield (
            f"router rows of length {recipe.amplitude:g} and more lose digits in "
            f"{str(dtype).removeprefix('torch.')}; dtype=float32 keeps them"
        )


def _upcycled(model: UpcycledModel) -> Iterator[str]:
    layout = model.layout
    renormalised = model.routing is not Routing.softmax
    scores = model.router.scores
    if renormalised and layout.silent:
        yield "routed experts begin silent: routers have no gradient until their `down` moves"
    elif renormalised and layout.alike:
        chosen = layout.top_k // layout.parts
        ever = "ever" if chosen == 1 else "until experts differ"
        yield (
            f"weights sum to 1 over experts that are alike, so the loss gives routers no gradient "
            f"{ever}; balancing moves them (balance=aux_loss or loss_free)"
        )
    if scores is Scores.equal:
        yield (
            "all scores are equal, and tokens go to the same experts; router_init.std > 0 spreads "
            "them"
        )
    if model.scores_collide:
        yield (
            "this trainer keeps routers in fp32; elsewhere in bf16, scores of copies collide and a "
            "few tokens in a thousand get parts of several copies, which target=glm4_moe "
            "routing=sigmoid excludes"
        )
    if isinstance(model.recipe, Innovator) and layout.silent:
        yield (
            "of the disciplines' FFNs only gate and up are kept, as routed experts begin silent; "
            "recipe.start=half keeps them whole"
        )
    yield from model.router.advice(model.models, layout.num_rows)
    if layout.width % LANE:
        yield (
            f"experts have {layout.width} neurons, no multiple of {LANE}: grouped products in bf16 "
            f"refuse that"
        )
