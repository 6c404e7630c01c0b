"""How a model's parameters map to the tensors of its family's Hugging Face files.

Three names of one value: the *logical key* (the parameter's name in memory; for an expert the
expert's id stands before the parameter's own name), the *stack* it is a slice of in memory
(`...experts.gate_up_proj` [E, ...]), and the *disk key* in the safetensors files. The mapping
between the last two is the library's own; nothing here knows the keys of any family.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict


class Parameter(NamedTuple):
    """One logical key: the tensor in memory that holds it, which expert of it, and its shape."""

    name: str
    expert: int | None
    shape: torch.Size


@dataclass(frozen=True)
class Piece:
    """Logical keys that are converted together and the disk keys that come out, in order.

    With `row` set the one disk tensor stacks all experts and this piece is row `row` of it.
    """

    keys: tuple[str, ...]
    disk: tuple[str, ...]
    row: int | None = None


# the disk keys, in natural order, by the pattern of the library's conversion that they match;
# None where a key is only renamed
Source = dict[str | None, list[str]]


class HFFormat:
    """The tensors of one model in memory and on disk, from its configuration alone.

    Attributes:
        parameters: every logical key, in model order, tied parameters once.
        dtypes: of every tensor on disk, by disk key. shapes: likewise.
        pieces: what to convert, one piece at a time, to write the model.

    Raises:
        ValueError: if the family has no causal language model or its files cannot be written
            piece by piece.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> None:
        self.model = meta_model(config, dtype)
        self._in_memory = remove_tied_weights_from_state_dict(self.model.state_dict(), self.model)
        self._stacks = _expert_stacks(self.model)
        self.parameters = dict(self._parameters())
        # what a model built from its configuration is saved with; set so that it is found once
        self.model._weight_conversions = [
            change
            for change in get_model_conversion_mapping(self.model, add_legacy=False)
            if not isinstance(change, PrefixChange)
        ]
        self.pieces = [*self._dense_pieces(), *self._expert_pieces()]
        whole = revert_weight_conversion(self.model, dict(self._in_memory))
        self.shapes = {key: tensor.shape for key, tensor in whole.items()}
        self.dtypes = self._disk_dtypes(dtype)
        self._check_pieces()

    def to_disk(self, piece: Piece, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a piece on disk, from those of its logical keys."""
        state = {}
        for key, tensor in tensors.items():
            parameter = self.parameters[key]
            state[parameter.name] = tensor if parameter.expert is None else tensor[None]
        converted = revert_weight_conversion(self.model, state)
        return dict(zip(piece.disk, converted.values(), strict=True))

    def sources(self, disk_keys: Iterable[str]) -> tuple[dict[str, Source], list[str]]:
        """Which disk keys make up every tensor in memory, by its name there, and the disk keys
        that belong to none; those that the library skips for this family are in neither."""
        renamings, converters = self._loading
        state = self.model.state_dict()
        sources: dict[str, Source] = defaultdict(lambda: defaultdict(list))
        unexpected = []
        for key in sorted(disk_keys, key=dot_natural_key):
            name, pattern = rename_source_key(
                key, renamings, converters, self.model.base_model_prefix, state
            )
            if name not in state and key in state:
                name, pattern = key, None
            if name in state:
                for target in self._targets(name, pattern):
                    sources[target][pattern].append(key)
            elif not self._skipped(key):
                unexpected.append(key)
        return sources, unexpected

    def from_disk(self, name: str, tensors: list[tuple[str | None, str, Tensor]]) -> Tensor:
        """The tensor `name` in memory, or a stack of one expert of it.

        Args:
            tensors: (pattern, disk key, tensor), patterns and keys as `sources` gives them.
        """
        pattern = tensors[0][0]
        if pattern is None:
            return tensors[0][2]
        converter = deepcopy(self._converter_of(pattern))
        own = next(target for target in converter.target_patterns if target in name)
        first = name.replace(own, converter.target_patterns[0])
        for matched, key, tensor in tensors:
            assert matched is not None
            converter.add_tensor(first, key, matched, cast(Any, tensor))
        made = converter.convert(first, model=self.model, config=self.model.config)[name]
        return made[0] if isinstance(made, list) else made

    def _parameters(self) -> Iterator[tuple[str, Parameter]]:
        for name, tensor in self._in_memory.items():
            if name not in self._stacks:
                yield name, Parameter(name, None, tensor.shape)
                continue
            for expert in range(len(tensor)):
                yield expert_key(name, expert), Parameter(name, expert, tensor.shape[1:])

    def _dense_pieces(self) -> list[Piece]:
        """One piece per dense tensor; those that share a disk tensor together in one."""
        disk_of = {
            name: tuple(revert_weight_conversion(self.model, {name: tensor}))
            for name, tensor in self._in_memory.items()
            if name not in self._stacks
        }
        together: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, disk in disk_of.items():
            together[disk].append(name)
        return [Piece(tuple(names), disk) for disk, names in together.items()]

    def _expert_pieces(self) -> Iterator[Piece]:
        """One piece per expert and stack: marked experts show which disk tensor holds which."""
        for name in self._in_memory:
            if name not in self._stacks:
                continue
            shape = self._in_memory[name].shape
            marks = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
            marked = marks.expand(-1, *[2] * (len(shape) - 1))
            disk = revert_weight_conversion(self.model, {name: marked})
            own: dict[int, list[str]] = defaultdict(list)
            stacked = tuple(key for key, tensor in disk.items() if tensor.dim() == len(shape))
            for key, tensor in disk.items():
                if key not in stacked:
                    own[int(tensor.flatten()[0])].append(key)
            for expert in range(shape[0]):
                keys = (expert_key(name, expert),)
                yield Piece(keys, stacked, expert) if stacked else Piece(keys, tuple(own[expert]))

    def _check_pieces(self) -> None:
        """The pieces together give exactly what the library writes for the whole model."""
        shapes: dict[str, torch.Size] = {}
        made: dict[str, list[torch.Size]] = {}  # by tensor in memory: all its experts are alike
        for piece in self.pieces:
            name = self.parameters[piece.keys[0]].name
            if name not in made:
                empty = {k: self._in_memory[self.parameters[k].name] for k in piece.keys}
                if name in self._stacks:
                    empty = {k: stack[0] for k, stack in empty.items()}
                made[name] = [tensor.shape for tensor in self.to_disk(piece, empty).values()]
            for key, shape in zip(piece.disk, made[name], strict=True):
                stacked = piece.row is not None
                shapes[key] = self._in_memory[name].shape[:1] + shape[1:] if stacked else shape
        if shapes != self.shapes:
            differing = sorted(
                key for key in {*shapes, *self.shapes} if shapes.get(key) != self.shapes.get(key)
            )
            raise ValueError(
                f"model family {self.model.config.model_type}: its Hugging Face files cannot be "
                f"written piece by piece, first at {differing[0]}"
            )

    def _disk_dtypes(self, wanted: torch.dtype) -> dict[str, torch.dtype]:
        """`wanted` for all tensors but those that the family keeps in another one."""
        kept = self.model._get_dtype_plan(wanted)
        dtypes = {}
        for piece in self.pieces:
            name = self.parameters[piece.keys[0]].name
            own = self._in_memory[name].dtype
            dtype = next((kept[pattern] for pattern in kept if re.search(pattern, name)), own)
            dtypes.update(dict.fromkeys(piece.disk, dtype))
        return dtypes

    def _skipped(self, disk_key: str) -> bool:
        patterns = {*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"}
        return any(re.search(pattern, disk_key) for pattern in patterns)

    @cached_property
    def _loading(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        mapping = get_model_conversion_mapping(self.model)
        return (
            [change for change in mapping if isinstance(change, WeightRenaming)],
            [change for change in mapping if isinstance(change, WeightConverter)],
        )

    def _converter_of(self, pattern: str) -> WeightConverter:
        _, converters = self._loading
        return next(c for c in converters if pattern in c.source_patterns)

    def _targets(self, name: str, pattern: str | None) -> list[str]:
        if pattern is None:
            return [name]
        targets = self._converter_of(pattern).target_patterns
        return [name.replace(targets[0], target) for target in targets]


def expert_key(stack: str, expert: int) -> str:
    """The logical key of one expert of a stacked parameter."""
    module, _, parameter = stack.rpartition(".")
    return f"{module}.{expert}.{parameter}"


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The model without storage, in the given dtype where the family leaves the choice.

    Raises:
        ValueError: if the family has no causal language model.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # of a shared expert that is not there
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            return AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"model family {config.model_type} cannot be built as a causal language model: {error}"
        ) from error


def _expert_stacks(model: Any) -> set[str]:
    """Names of the parameters that stack all experts of a layer along dim 0."""
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
        for parameter, value in module.named_parameters(recurse=False)
        if value.shape[0] == module.num_experts
    }
