"""Build an expert-parallel model, fresh or from a checkpoint; each rank makes its part."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parallel.layer import ExpertParallel
from parallel.mesh import ParallelMesh
from parallel.model import moe_layers, parallelize
from parallel.plan import Planner
from placement.table import ExpertPlacement
from trainer.state import model_state

UNDECLARED = ("head_dim",)  # read by attention layers of families that do not declare it


class WeightSource(Protocol):
    """What a model's weights are read from: a checkpoint, or one that is made on the way."""

    @property
    def config(self) -> PretrainedConfig: ...

    def read(self, key: str) -> Tensor:
        """The tensor of a logical key."""
        ...


def local_checkpoint(source: str) -> str:
    """The directory of a Hugging Face checkpoint: as given, or fetched from the hub by its id.

    Raises:
        ValueError: if there is no such directory and the hub has or gives no such model.
    """
    if Path(source).is_dir():
        return source
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt"]
    try:
        return str(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"model.source ({source}) is neither a directory nor a model that the Hugging Face hub "
            f"gave out: {error}"
        ) from error


def family_config(family: str, overrides: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a model family of `transformers` with some of its fields set.

    Raises:
        ValueError: for an unknown family or a field that the family does not have.
    """
    if family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(family, list(CONFIG_MAPPING), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"model.family ({family}) is not a model of transformers{hint}")
    default = AutoConfig.for_model(family)
    _refuse_unknown(default, overrides)
    return AutoConfig.for_model(family, **overrides)


def override(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    """A configuration of the same family with some fields changed.

    Raises:
        ValueError: for a field that the family does not have.
    """
    _refuse_unknown(config, overrides)
    stored_as = config.attribute_map
    changed = {stored_as.get(field, field): value for field, value in overrides.items()}
    return type(config).from_dict({**config.to_dict(), **changed})


def _refuse_unknown(config: PretrainedConfig, overrides: dict[str, Any]) -> None:
    known = {*config.to_dict(), *config.attribute_map, *UNDECLARED}
    for field in overrides:
        if field not in known and not hasattr(config, field):
            near = difflib.get_close_matches(field, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"model.overrides.{field}: {config.model_type} has no such field{hint}"
            )


def meta_model(config: PretrainedConfig) -> nn.Module:
    """The model without storage: shapes and modules only.

    Raises:
        ValueError: if the family has no causal language model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"model.family ({config.model_type}) has no causal language model: {error}"
        ) from error


def build_model(
    config: PretrainedConfig,
    mesh: ParallelMesh,
    *,
    seed: int,
    placement: ExpertPlacement | None = None,
    planner: Planner,
    checkpoint: WeightSource | None = None,
    **layers: Any,
) -> nn.Module:
    """The model with this rank's experts, in fp32 on the CPU, the same for every number of ranks.

    Fresh weights depend on the seed, the parameter's name and the expert alone. With a
    checkpoint each rank reads the dense parameters and only its own experts.

    Args:
        layers: further options of `parallelize`.
    """
    model: Any = parallelize(
        meta_model(config), mesh, placement=placement, planner=planner, **layers
    )
    model.to_empty(device="cpu")
    if any(p.dtype != torch.float32 for p in model.parameters()):
        model.float()
    tied = (
        model.get_output_embeddings() is not None and config.get_text_config().tie_word_embeddings
    )
    initialise(model, seed)
    if tied:
        model.tie_weights()
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


@torch.no_grad()
def initialise(model: Any, seed: int) -> None:
    """Fill parameters and buffers by the family's own rules, from generators keyed by meaning."""
    layers = {id(layer.experts.family): (name, layer) for name, layer in moe_layers(model)}
    skip = {id(layer.experts) for _, layer in moe_layers(model)}
    for name, module in model.named_modules():
        if id(module) in layers:
            _initialise_experts(model, *layers[id(module)], seed)
        elif id(module) not in skip:
            with seeded(seed, name):
                model._init_weights(module)


def _initialise_experts(model: Any, name: str, layer: ExpertParallel, seed: int) -> None:
    """Expert by expert: the family's rule on a stack of one."""
    experts = layer.experts
    for slot, expert in enumerate(layer.local_experts):
        for parameter in experts.names:
            one = getattr(experts, parameter)[slot : slot + 1]
            experts.family.register_parameter(parameter, nn.Parameter(one, False))
        with seeded(seed, f"{name}.{expert}"):
            model._init_weights(experts.family)
        for parameter in experts.names:
            delattr(experts.family, parameter)


@contextmanager
def seeded(seed: int, key: str) -> Iterator[None]:
    """Random numbers inside depend on the seed and the key alone."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little"))
        yield


@torch.no_grad()
def load_checkpoint(model: nn.Module, checkpoint: WeightSource) -> None:
    """Copy a Hugging Face checkpoint into the model: dense parameters and this rank's experts.

    Raises:
        ValueError: for a missing key or another shape, naming file and key.
    """
    for key, tensor in model_state(model).items():
        tensor.copy_(checkpoint.read(key))
