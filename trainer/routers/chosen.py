"""The router of a run, refused before any work where it does not fit."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate

from configs.schema import Config
from parallel.mesh import ParallelMesh
from trainer.routers.base import Router
from trainer.routers.groups import GroupBalanced


def chosen_router(config: Config, model: Any, mesh: ParallelMesh) -> Router:
    """The configured router.

    Args:
        model: on any device.

    Raises:
        ValueError: for a family or sizes that it does not fit, for one that looks ahead unless that
            is allowed, for a balancer that it leaves without effect, for experts that move where
            they must not, and for an export of what plain transformers would not choose.
    """
    router: Router = instantiate(config.router)
    router.prepare(model, mesh)
    name = type(router).__name__
    if router.looks_ahead and not config.train.allow_lookahead:
        raise ValueError(
            f"router ({name}) lets a token's experts depend on later tokens of its sequence; the "
            f"model will not have them when it generates. Set train.allow_lookahead=true if that "
            f"is meant, or use another router"
        )
    if isinstance(router, GroupBalanced) and router.groups is None and config.relocate.every:
        raise ValueError(
            f"relocate.every ({config.relocate.every}) would move experts out of their rank's "
            f"group; set relocate.every=0, or router.groups to a number"
        )
    if router.replaces_weights and "coupling" in config.balance:
        raise ValueError(
            f"balance=coupling compares experts with the family's router weights, which router "
            f"({name}) does not use; choose another balance"
        )
    if config.checkpoint.export and not router.exports:
        raise ValueError(
            f"checkpoint.export (true) would write a {model.config.model_type} in which plain "
            f"transformers choose other experts than router ({name}); set checkpoint.export=false"
        )
    return router
