"""Trace files: ours, bare arrays, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from placement.trace import Trace, load_trace
from tests.placement.test_stats import some_trace


def test_a_saved_trace_comes_back(tmp_path: Path) -> None:
    trace = some_trace(30, 3, 6, 2, 2, seed=1)
    trace.save(tmp_path / "trace.npz")
    loaded = load_trace(tmp_path / "trace.npz")
    np.testing.assert_array_equal(loaded.ids_TLK, trace.ids_TLK)
    assert loaded.num_experts == 6
    for name in ("source_T", "sequence_T", "token_T", "domain_T"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(trace, name))


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("choices", [0, 2])
def test_bare_arrays_are_traces(tmp_path: Path, suffix: str, choices: int) -> None:
    """[tokens, layers] is ExFlow's format."""
    ids = np.array([[0, 3], [2, 1], [1, 0]])
    if choices:
        ids = np.stack([ids, (ids + 1) % 4], 2)
    path = tmp_path / f"trace.{suffix}"
    if suffix == "npy":
        np.save(path, ids)
    else:
        np.savez(path, anything=ids)
    trace = load_trace(path)
    assert trace.num_experts == 4
    np.testing.assert_array_equal(trace.ids_TLK, ids.reshape(3, 2, -1))
    assert load_trace(path, num_experts=8).num_experts == 8


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with pytest.raises(ValueError, match="not a readable"):
        load_trace(path)
    path.write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(ValueError, match="not a readable"):
        load_trace(path)
    np.savez(path, one=np.zeros(3), two=np.zeros(3))
    with pytest.raises(ValueError, match=r"has the arrays \['one', 'two'\]; `ids` is missing"):
        load_trace(path)
    np.savez(path, ids=np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match=r"must be \[tokens, layers\]"):
        load_trace(path)
    some_trace(30, 3, 6, 2, 2, seed=1).save(path)
    with pytest.raises(ValueError, match="a model with 6 experts per layer, expected 8"):
        load_trace(path, num_experts=8)
    with pytest.raises(
        ValueError, match=r"token 1 chooses an expert outside 0..3 in layer 0 \(4\)"
    ):
        Trace(np.array([[[0]], [[4]]]), 3)
    with pytest.raises(ValueError, match=r"token 0 chooses an expert twice in layer 1 \(2\)"):
        Trace(np.array([[[0, 1], [2, 2]]]), 3)
    with pytest.raises(ValueError, match=r"trace\.source must be 1 whole numbers"):
        Trace(np.array([[[0]]]), 3, source_T=np.array([0, 1]))
    with pytest.raises(ValueError, match=r"trace\.ids must be whole numbers"):
        Trace(np.array([[[0.5]]]), 3)
