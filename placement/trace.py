"""Routing traces: which experts every token chose in every layer, and where it came from.

T tokens, L MoE layers, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
ABOUT_TOKENS = ("source", "sequence", "token", "domain")


@dataclass(frozen=True)
class Trace:
    """Recorded or made routing.

    Attributes:
        ids_TLK: expert ids; `num_experts` means "no expert". A token's choices are distinct.
        num_experts: E.
        source_T: rank that each token came from. sequence_T: which sequence it belongs to.
        token_T: its id in the vocabulary. domain_T: the kind of text. Each int [T], or None where
            it is not known.

    Raises:
        ValueError: for shapes that do not fit, ids out of range, or a token that chooses an expert
            twice in a layer, naming the token and the layer.
    """

    ids_TLK: Ints
    num_experts: int
    source_T: Ints | None = None
    sequence_T: Ints | None = None
    token_T: Ints | None = None
    domain_T: Ints | None = None

    def __post_init__(self) -> None:
        ids, experts = self.ids_TLK, self.num_experts
        if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"trace.ids must be whole numbers [tokens, layers, choices], got {ids.dtype} of "
                f"shape {ids.shape}"
            )
        _refuse(ids, (ids < 0) | (ids > experts), f"an expert outside 0..{experts}")
        ordered = np.sort(ids, axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] < experts)
        _refuse(ordered[:, :, 1:], twice, "an expert twice")
        for name in ABOUT_TOKENS:
            values = getattr(self, f"{name}_T")
            if values is None:
                continue
            if values.shape != (len(ids),) or not np.issubdtype(values.dtype, np.integer):
                raise ValueError(
                    f"trace.{name} must be {len(ids)} whole numbers, one per token, got "
                    f"{values.dtype} of shape {values.shape}"
                )
            if len(values) and values.min() < 0:
                raise ValueError(f"trace.{name} has a negative number ({values.min()})")

    @property
    def num_tokens(self) -> int:
        return self.ids_TLK.shape[0]

    @property
    def num_layers(self) -> int:
        return self.ids_TLK.shape[1]

    @property
    def top_k(self) -> int:
        return self.ids_TLK.shape[2]

    def take(self, which: npt.NDArray) -> Trace:
        """The trace of some tokens, by index or mask."""
        about: dict[str, Any] = {f"{name}_T": getattr(self, f"{name}_T") for name in ABOUT_TOKENS}
        taken: dict[str, Any] = {n: None if v is None else v[which] for n, v in about.items()}
        return replace(self, ids_TLK=self.ids_TLK[which], **taken)

    def save(self, path: str | Path) -> None:
        """Write `path` (.npz): ids [T, L, K] and what is known about the tokens."""
        about = {name: getattr(self, f"{name}_T") for name in ABOUT_TOKENS}
        known = {name: values for name, values in about.items() if values is not None}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, ids=self.ids_TLK, num_experts=self.num_experts, **known)


def joined(traces: Sequence[Trace]) -> Trace:
    """One trace of the tokens of all; they know the same about their tokens."""
    about: dict[str, Any] = {f"{name}_T": None for name in ABOUT_TOKENS}
    for name in about:
        parts = [getattr(trace, name) for trace in traces]
        if parts[0] is not None:
            about[name] = np.concatenate(parts)
    return Trace(np.concatenate([t.ids_TLK for t in traces]), traces[0].num_experts, **about)


def load_trace(path: str | Path, num_experts: int | None = None) -> Trace:
    """Read a trace: what `Trace.save` wrote, or any array of expert ids.

    An .npy or single-array .npz of shape [tokens, layers] (ExFlow's format, arXiv:2401.08383) or
    [tokens, layers, choices] is taken as it is.

    Args:
        num_experts: where the file does not say; default: the largest id + 1.

    Raises:
        ValueError: if the file is no trace, or says another number of experts.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if hasattr(loaded, "files") else {"ids": loaded}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"trace {path}: not a readable .npy or .npz file ({error})") from error
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError(f"trace {path}: not a readable .npz file (it holds more than arrays)")
    if len(arrays) == 1:
        arrays = {"ids": next(iter(arrays.values()))}
    if "ids" not in arrays:
        raise ValueError(f"trace {path}: has the arrays {sorted(arrays)}; `ids` is missing")
    ids = arrays["ids"]
    if ids.ndim == 2:
        ids = ids[:, :, None]
    if ids.ndim != 3 or ids.size == 0:
        raise ValueError(
            f"trace {path}: ids must be [tokens, layers] or [tokens, layers, choices] and not "
            f"empty, got shape {ids.shape}"
        )
    said = int(arrays["num_experts"]) if "num_experts" in arrays else None
    if said is not None and num_experts is not None and said != num_experts:
        raise ValueError(
            f"trace {path}: is of a model with {said} experts per layer, expected {num_experts}"
        )
    experts = said or num_experts or int(ids.max()) + 1
    about = {f"{name}_T": arrays[name] for name in ABOUT_TOKENS if name in arrays}
    try:
        return Trace(ids, experts, **about)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _refuse(ids: Ints, wrong: npt.NDArray[np.bool_], what: str) -> None:
    if wrong.any():
        token, layer, choice = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"trace: token {token} chooses {what} in layer {layer} ({ids[token, layer, choice]})"
        )
