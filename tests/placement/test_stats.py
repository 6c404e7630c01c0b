"""Statistics against loops over tokens; what files and wrong counts do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import preferences
from placement.stats import COUNTS, RoutingStats
from placement.synthetic import SyntheticRouter
from placement.trace import Trace


def some_trace(
    tokens: int, layers: int, experts: int, top_k: int, ranks: int, seed: int, absent: float = 0.2
) -> Trace:
    """Distinct random choices, some of them "no expert"."""
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(2)[:, :, :top_k]
    ids[rng.random(ids.shape) < absent] = experts
    return Trace(
        ids,
        experts,
        source_T=rng.integers(0, ranks, tokens),
        sequence_T=np.arange(tokens) // 4,
        token_T=rng.integers(0, 9, tokens),
        domain_T=rng.integers(0, 3, tokens),
    )


def counted(trace: Trace, ranks: int) -> dict[str, np.ndarray]:
    """The same counts, token by token."""
    layers, experts = trace.num_layers, trace.num_experts
    load, source = np.zeros((layers, experts)), np.zeros((layers, ranks, experts))
    pair = np.zeros((layers - 1, experts, experts))
    coactive = np.zeros((layers, experts, experts))
    by_token, by_domain = np.zeros((9, layers, experts)), np.zeros((3, layers, experts))
    assert trace.source_T is not None and trace.token_T is not None and trace.domain_T is not None
    for token, chosen_LK in enumerate(trace.ids_TLK):
        chosen = [[e for e in row.tolist() if e < experts] for row in chosen_LK]
        for layer, row in enumerate(chosen):
            for e in row:
                load[layer, e] += 1
                source[layer, trace.source_T[token], e] += 1
                by_token[trace.token_T[token], layer, e] += 1
                by_domain[trace.domain_T[token], layer, e] += 1
                for other in row:
                    coactive[layer, e, other] += e != other
                if layer + 1 < layers:
                    for follower in chosen[layer + 1]:
                        pair[layer, e, follower] += 1
    return {
        "load_LE": load,
        "pair_LEE": pair,
        "coactive_LEE": coactive,
        "source_LRE": source,
        "by_token": by_token,
        "by_domain": by_domain,
    }


def assert_counts(stats: RoutingStats, expected: dict[str, np.ndarray], factor: float = 1) -> None:
    for name in COUNTS:
        counts = getattr(stats, name)
        assert counts.dtype == torch.float64
        np.testing.assert_array_equal(counts.numpy(), expected[name] * factor, err_msg=name)
    for name in ("by_token", "by_domain"):
        table = getattr(stats, name).table.toarray()
        wanted = expected[name].reshape(len(expected[name]), -1)[: len(table)] * factor
        np.testing.assert_array_equal(table, wanted, err_msg=name)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 30),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_counts_equal_loops_over_tokens(
    tokens: int, layers: int, experts: int, top_k: int, ranks: int, seed: int
) -> None:
    trace = some_trace(tokens, layers, experts, min(top_k, experts), ranks, seed)
    stats = RoutingStats.of_trace(trace, ranks)
    assert_counts(stats, counted(trace, ranks))
    assert stats.tokens == tokens
    stats.check()


@pytest.mark.parametrize("most_added", [1, 30, 10**6])
def test_layer_by_layer_is_the_whole_trace(
    monkeypatch: pytest.MonkeyPatch, most_added: int
) -> None:
    """However often the rows that wait are added to the table."""
    monkeypatch.setattr(preferences, "MOST_ADDED", most_added)
    trace = some_trace(50, 3, 6, 2, 2, seed=5)
    stats = RoutingStats(num_layers=3, num_experts=6, num_ranks=2)
    for start in (0, 20):
        part = trace.take(np.arange(start, min(start + 20, 50) if start == 0 else 50))
        assert part.source_T is not None
        for layer in range(3):
            stats.observe(
                layer,
                torch.from_numpy(part.ids_TLK[:, layer]),
                part.source_T,
                token_T=part.token_T,
                domain_T=part.domain_T,
            )
    assert_counts(stats, counted(trace, 2))


def test_merged_parts_are_the_whole_and_decay_is_a_factor(tmp_path: Path) -> None:
    trace = some_trace(60, 3, 5, 2, 3, seed=6)
    whole = counted(trace, 3)
    stats = RoutingStats.of_trace(trace.take(np.arange(0, 25)), 3)
    stats.merge(RoutingStats.of_trace(trace.take(np.arange(25, 60)), 3))
    assert_counts(stats, whole)
    stats.decay(0.25)
    assert_counts(stats, whole, 0.25)
    assert stats.tokens == 15
    stats.save(tmp_path / "stats.npz")
    loaded = RoutingStats.load(tmp_path / "stats.npz")
    assert_counts(loaded, whole, 0.25)
    assert (loaded.tokens, loaded.top_k, loaded.num_ranks) == (15, 2, 3)


def test_the_same_rows_from_other_ranks() -> None:
    trace = some_trace(60, 3, 5, 2, 3, seed=6)
    stats = RoutingStats.of_trace(trace, 3).with_sources(2)
    expected = counted(trace, 3)
    load_LE = expected["load_LE"]
    assert_counts(stats, expected | {"source_LRE": np.stack([load_LE, load_LE], 1) / 2})
    assert (stats.tokens, stats.top_k, stats.num_ranks) == (60, 2, 2)
    stats.check()


def test_rows_per_rank_of_token_ids() -> None:
    trace = some_trace(40, 2, 4, 2, 1, seed=7, absent=0)
    stats = RoutingStats.of_trace(trace)
    home_LE = np.array([[0, 1, 1, 0], [1, 1, 0, 0]])
    rows_GR = stats.by_token.rows_per_rank(home_LE, 2)
    assert trace.token_T is not None
    for kind in range(len(rows_GR)):
        mine = trace.ids_TLK[trace.token_T == kind]
        expected = [
            sum((home_LE[layer][mine[:, layer]] == r).sum() for layer in (0, 1)) for r in (0, 1)
        ]
        if len(mine):
            np.testing.assert_allclose(rows_GR[kind], np.array(expected) / len(mine))
        else:
            np.testing.assert_allclose(rows_GR[kind].sum(), 4)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("load_LE", lambda c: c[0, 1].add_(1), "source_LRE does not sum to load_LE"),
        ("source_LRE", lambda c: c[1, 0, 2].sub_(1e9), "negative or not finite"),
        ("load_LE", lambda c: c[0, 0].fill_(float("nan")), "negative or not finite"),
        ("coactive_LEE", lambda c: c[0, 1, 2].add_(1), "not symmetric"),
        ("coactive_LEE", lambda c: c[1, 3, 3].add_(1), "an expert with itself"),
        ("pair_LEE", lambda c: c[0, 1, 2].add_(10000), "more than 2 transitions per row"),
    ],
)
def test_counts_that_do_not_add_up_are_refused(
    tmp_path: Path, name: str, change: object, words: str
) -> None:
    stats = RoutingStats.of_trace(some_trace(60, 3, 5, 2, 3, seed=6), 3)
    change(getattr(stats, name))  # type: ignore[operator]
    with pytest.raises(ValueError, match=words):
        stats.check()
    stats.save(tmp_path / "stats.npz")
    with pytest.raises(ValueError, match=r"stats\.npz.*" + words):
        RoutingStats.load(tmp_path / "stats.npz")


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match=r"stats\.npz: not a readable statistics file"):
        RoutingStats.load(path)
    RoutingStats.of_trace(some_trace(60, 3, 5, 2, 3, seed=6), 3).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"stats\.npz: not a readable statistics file"):
        RoutingStats.load(path)


def test_wrong_observations_are_refused() -> None:
    stats = RoutingStats(num_layers=2, num_experts=4, num_ranks=2)
    ids = np.array([[0, 1]])
    with pytest.raises(ValueError, match=r"layer \(2\) must be >= 0 and < 2"):
        stats.observe(2, ids)
    with pytest.raises(ValueError, match=r"expert ids of layer 0 \(0\.\.5\)"):
        stats.observe(0, np.array([[0, 5]]))
    with pytest.raises(ValueError, match=r"source_rank \(2\) must be >= 0 and < 2"):
        stats.observe(0, ids, 2)
    stats.observe(0, ids)
    with pytest.raises(ValueError, match="layer 1 has 2 tokens, layer 0 had 1"):
        stats.observe(1, np.array([[0, 1], [1, 2]]))
    with pytest.raises(ValueError, match=r"\(2, 4, 1\) into \(2, 4, 2\)"):
        stats.merge(RoutingStats(2, 4))
    with pytest.raises(ValueError, match=r"2 MoE layers x 4 experts, the model has 3 x 4"):
        stats.check_model(3, 4)
    for factor in (0, 1.5):
        with pytest.raises(ValueError, match=f"decay \\({factor}\\)"):
            stats.decay(factor)
    with pytest.raises(ValueError, match=r"stats.num_experts \(0\)"):
        RoutingStats(1, 0)


def test_the_synthetic_router_has_the_structure_that_it_is_asked_for() -> None:
    def dependence(strength: str) -> float:
        """Share of transitions above what independent choices would give."""
        trace = SyntheticRouter(4, 16, strength).sample(100, 128, 1)
        pair_EE = RoutingStats.of_trace(trace).pair_LEE[1]
        independent_EE = torch.outer(pair_EE.sum(1), pair_EE.sum(0)) / pair_EE.sum()
        return float((pair_EE - independent_EE).clamp(min=0).sum() / pair_EE.sum())

    none, low, medium, high = (dependence(s) for s in ("none", "low", "medium", "high"))
    assert none < 0.1 < low < medium < high

    first, again = (SyntheticRouter(2, 8).sample(3, 5, 2) for _ in range(2))
    np.testing.assert_array_equal(first.ids_TLK, again.ids_TLK)
    with pytest.raises(ValueError, match="strength \\('huge'\\) must be one of"):
        SyntheticRouter(2, 8, "huge")
    with pytest.raises(ValueError, match=r"top_k \(9\) must be >= 1 and <= num_experts \(8\)"):
        SyntheticRouter(2, 8).sample(1, 1, 9)
