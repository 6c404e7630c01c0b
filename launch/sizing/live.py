"""Bytes of live tensors while code runs, real ones or those of FakeTensorMode."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every storage that is allocated inside, from its first tensor to its end.

    Args:
        existing: tensors from before, which are not counted.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {storage_key(tensor) for tensor in existing}
        self._changes: list[tuple[int, int]] = []  # serial number of the storage, bytes
        self._serials: dict[int, int] = {}
        self._ends: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """Most bytes alive at once, those of some tensors left out; nothing counts afterwards."""
        for end in self._ends:
            end.detach()
        left_out = {self._serials.get(storage_key(tensor)) for tensor in without}
        alive = most = 0
        for serial, change in self._changes:
            if serial not in left_out:
                alive += change
                most = max(most, alive)
        return most

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key in self._known or not storage.nbytes():
            return
        serial, size = len(self._changes), storage.nbytes()
        self._known.add(key)
        self._serials[key] = serial
        self._changes.append((serial, size))
        self._ends.append(weakref.finalize(storage, self._end, key, serial, size))

    def _end(self, key: int, serial: int, size: int) -> None:
        self._changes.append((serial, -size))
        self._known.discard(key)
        self._serials.pop(key, None)


def storage_key(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor, whichever view of it this is."""
    return tensor.untyped_storage()._cdata
