"""Host memory: keep or give back what was freed, and work in blocks that stay in the cache."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

CACHE_ROWS = 256
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
PAGES_OF_ITS_OWN = 1 << 17  # bytes, from which a block is given back at once


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks of any size; for training on CPUs. True where it took effect.

    Large tensors otherwise come from fresh pages in every step, and faulting these in costs as
    much as the elementwise work of a MoE layer (measured: `tests/benchmarks/layer.py`).
    """
    return _set(M_MMAP_MAX, 0) and _set(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> bool:
    """Let glibc give back freed blocks at once; for work on one large tensor after another. True
    where it took effect."""
    return _set(M_MMAP_THRESHOLD, PAGES_OF_ITS_OWN)


def _set(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    return bool(mallopt(option, value))


def cache_blocks(x_MF: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows: on a CPU so few that the temporaries of an elementwise pass over
    one stay in the cache, elsewhere all in one block."""
    return x_MF.split(CACHE_ROWS) if x_MF.device.type == "cpu" else (x_MF,)
