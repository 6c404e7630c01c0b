"""Peak of the memory that tensors take inside a piece of code, counted operator by operator.

Storages are counted from their first use as an operator's result until they are freed, so the
figure is the same on every machine and needs no allocator statistics. What existed before does
not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the live bytes of tensors that are allocated inside.

    Gradients of parameters belong to the parameters, not to the activations: name them after the
    code has run, in `peak_bytes`, and they are left out from their allocation on.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {_key(tensor) for tensor in existing}
        self._events: list[tuple[int, int]] = []  # serial number of the storage, bytes
        self._serials: dict[int, int] = {}
        self._frees: list[weakref.finalize] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known or not storage.nbytes():
            return
        serial = len(self._events)
        self._known.add(key)
        self._serials[key] = serial
        self._events.append((serial, storage.nbytes()))
        self._frees.append(weakref.finalize(storage, self._free, key, serial, storage.nbytes()))

    def _free(self, key: int, serial: int, num_bytes: int) -> None:
        self._events.append((serial, -num_bytes))
        self._known.discard(key)
        self._serials.pop(key, None)

    def peak_bytes(self, gradients: Iterable[Tensor] = ()) -> int:
        """Most bytes alive at once, without the given tensors; counts no more afterwards."""
        for free in self._frees:
            free.detach()
        without = {self._serials.get(_key(tensor)) for tensor in gradients}
        alive = peak = 0
        for serial, num_bytes in self._events:
            if serial not in without:
                alive += num_bytes
                peak = max(peak, alive)
        return peak


def _key(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor, whichever view of it this is."""
    return tensor.untyped_storage()._cdata
