"""`python -m launch plan`: what fits on a cluster, how long a step takes, what to start."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from rich.console import Console
from transformers import PretrainedConfig

from configs.compose import load_sizing
from configs.describe import sizing_help_text
from configs.errors import COMPOSE_ERRORS, explain
from configs.schema import ModelConfig, Precision
from configs.sizing_schema import Recomputed, SizingConfig, check_sizing, num_ranks_of
from launch.sizing.memory import Engine
from launch.sizing.meshes import Given, Sizing
from launch.sizing.table import show, write_json
from trainer.hf_checkpoint import read_config
from trainer.modeling import family_config, override

EXIT_CONFIG, EXIT_NOTHING_FITS = 2, 1
FULL_ERROR = "HYDRA_FULL_ERROR"


def size(arguments: Sequence[str]) -> int:
    """Plan what the command line says; returns the exit code.

    0: something fits. 1: nothing does. 2: refused before any work.
    """
    if "--help" in arguments or "-h" in arguments:
        print(sizing_help_text())
        return 0
    try:
        config = load_sizing(*arguments)
        check_sizing(config)
        sizing = sizing_of(config)
    except (*COMPOSE_ERRORS, ValueError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exception(error)
        print(f"error: {explain(error, SizingConfig)}", file=sys.stderr)
        return EXIT_CONFIG
    choices = sizing.choices()
    show(sizing, choices, config.rows, Console())
    if config.json is not None:
        write_json(Path(config.json), sizing, choices)
    return 0 if any(choice.fits for choice in choices) else EXIT_NOTHING_FITS


def sizing_of(config: SizingConfig) -> Sizing:
    """What a checked configuration plans for.

    Raises:
        ValueError: for a model that cannot be read, and an EP size that nothing takes.
    """
    sizing = Sizing(model_config(config.model), given(config))
    if not sizing.fitting_ep():
        ranks, per_node = num_ranks_of(config), config.cluster.ranks_per_node or 1
        every = sizing.model.fitting_ep(ranks, per_node)
        use = f"use one of {every}" if every else "none does; change cluster.ranks_per_node"
        raise ValueError(
            f"mesh.ep ({'null' if config.mesh.ep is None else config.mesh.ep}) must divide the "
            f"ranks ({ranks}) and the experts ({sizing.model.num_experts}), lie evenly on nodes "
            f"and leave stacks that split over the other ranks; {use}"
        )
    return sizing


def model_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration of a family, or of a checkpoint in a directory, with its overrides.

    Raises:
        ValueError: for unknown families and fields, and a directory without a configuration.
    """
    overrides: dict[str, Any] = dict(model.overrides)
    if model.source is not None:
        return override(read_config(Path(model.source)), overrides)
    assert model.family is not None
    return family_config(model.family, overrides)


def given(config: SizingConfig) -> Given:
    """The checked configuration as plain values."""
    cluster, train = config.cluster, config.train
    assert cluster.ranks_per_node and cluster.memory_gib
    bf16 = train.precision is Precision.bf16
    recompute = {
        Recomputed.none: (False,),
        Recomputed.full: (True,),
        Recomputed.either: (False, True),
    }[train.activation_checkpointing]
    return Given(
        num_ranks=num_ranks_of(config),
        ranks_per_node=cluster.ranks_per_node,
        memory_gib=cluster.memory_gib,
        cluster=cluster,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        bf16=bf16,
        recompute=recompute,
        refetch=train.refetch_borrowed,
        ep=None if config.mesh.ep is None else (config.mesh.ep,),
        engines=tuple(Engine(name) for name in config.engines if not (bf16 and name == "zero1")),
        planner=instantiate(config.planner),
        skew=config.skew,
        seed=config.seed,
        reserve=config.reserve,
        compute_share=config.compute_share,
        bucket=config.bucket_elements,
    )
