"""Host memory: keep what was freed instead of returning it to the system."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks of any size; for training on CPUs. True where it took effect.

    Large tensors otherwise come from fresh pages in every step, and faulting these in costs as
    much as the elementwise work of a MoE layer (measured: `tests/benchmarks/layer.py`).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
