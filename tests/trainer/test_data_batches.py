"""The global order: every sequence once per epoch, on any number of ranks, across resumes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest

from trainer.data.batches import GlobalBatches, Mixture, check_batch_size, split_batch


def through_json(state: dict[str, Any]) -> Any:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("resumed_world", [1, 2, 3])
def test_every_sequence_once_per_epoch(world: int, resumed_world: int) -> None:
    """With a stop in mid-epoch, and other ranks after it. 12 does not divide 101."""
    size, batch = 101, 12
    seen: list[int] = []
    stream = GlobalBatches(size, batch, seed=3)
    for _ in range(13):
        ids = stream.next()
        for rank in range(world):
            seen += itertools.chain(*split_batch(ids, rank, world, 12 // world // 3))
    state = through_json(stream.state_dict())
    stream = GlobalBatches(size, batch, seed=3)
    stream.load_state_dict(state)
    while len(seen) < 5 * size:
        ids = stream.next()
        for rank in range(resumed_world):
            seen += itertools.chain(*split_batch(ids, rank, resumed_world, 2))
    whole = [n for ids in itertools.islice(GlobalBatches(size, batch, 3), 100) for n in ids]
    for epoch in range(4):
        of_epoch = whole[epoch * size : (epoch + 1) * size]
        assert sorted(of_epoch) == list(range(size))
    batches = [seen[start : start + batch] for start in range(0, len(seen), batch)]
    expected = [whole[start : start + batch] for start in range(0, len(seen), batch)]
    assert [sorted(ids) for ids in batches] == [sorted(ids) for ids in expected]


def test_order_depends_on_seed_and_epoch() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return GlobalBatches(50, 1, seed).mixture.epoch(seed, number).tolist()

    orders = [tuple(epoch(seed, number)) for seed in range(3) for number in range(3)]
    assert len(set(orders)) == 9
    assert tuple(epoch(1, 2)) == orders[5]
    # a wrong mean position would show that some sequences tend to come early
    early = Counter(n for number in range(400) for n in epoch(0, number)[:10])
    assert min(early.values()) > 40
    assert max(early.values()) < 130


def test_resume_with_another_batch_size() -> None:
    whole = list(itertools.chain(*itertools.islice(GlobalBatches(30, 1, 0), 90)))
    stream = GlobalBatches(30, 4, 0)
    first = [*stream.next(), *stream.next()]
    other = GlobalBatches(30, 7, 0)
    other.load_state_dict(stream.state_dict())
    assert first + other.next() + other.next() == whole[:22]
    assert other.epoch == pytest.approx(22 / 30)


def test_a_batch_larger_than_an_epoch() -> None:
    ids = GlobalBatches(5, 12, 0).next()
    assert len(ids) == 12
    assert sorted(ids[:5]) == sorted(ids[5:10]) == list(range(5))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (GlobalBatches(30, 4, 1), r"has seed 1, this run 0: seed changed"),
        (GlobalBatches(31, 4, 0), r"has sizes \[31\], this run \[30\]: data or train\.seq_len"),
        (
            GlobalBatches(30, 4, 0, Mixture((10, 20), (10, 20))),
            r"has sizes \[10, 20\], this run \[30\]",
        ),
    ],
)
def test_state_of_another_stream(other: GlobalBatches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalBatches(30, 4, 0).load_state_dict(other.state_dict())


def test_changed_weights_are_refused() -> None:
    one, two = (Mixture.build({"a": 10, "b": 20}, {"a": 1, "b": w}) for w in (1, 2))
    with pytest.raises(ValueError, match=r"has draws \[15, 15\].*: data\.weights changed"):
        GlobalBatches(30, 4, 0, two).load_state_dict(GlobalBatches(30, 4, 0, one).state_dict())


def test_shares_by_weight() -> None:
    mixture = Mixture.build({"a": 10, "b": 90, "c": 1}, {"a": 3, "b": 1, "c": 1})
    assert sum(mixture.draws) == 101
    assert mixture.draws == (61, 20, 20)
    assert Mixture.build({"a": 10, "b": 90}, None).draws == (10, 90)
    assert Mixture.build({"a": 10, "b": 90}, {"a": 1, "b": 0}).draws == (100, 0)


def test_weighted_sources_are_dealt_out_evenly() -> None:
    """Over many epochs, no sequence is ever more than one deal ahead of another of its source."""
    mixture = Mixture.build({"a": 7, "b": 40, "c": 3}, {"a": 3, "b": 1, "c": 1})
    count = sum(mixture.sizes)
    groups = {"a": range(7), "b": range(7, 47), "c": range(47, 50)}
    seen: Counter[int] = Counter()
    for epoch in range(12):
        ids = mixture.epoch(0, epoch).tolist()
        assert len(ids) == count
        shares = [sum(n in group for n in ids) for group in groups.values()]
        assert shares == [30, 10, 10]
        seen.update(ids)
        for group in groups.values():
            times = [seen[n] for n in group]
            assert max(times) - min(times) <= 1
    assert mixture.epoch(0, 3).tolist() != mixture.epoch(1, 3).tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, r"data\.weights names \['a'\] but data\.sources has \['a', 'b'\]"),
        ({"a": 1.0, "b": -1.0}, r"data\.weights \(.*\) must be >= 0"),
        ({"a": 0.0, "b": 0.0}, r"and one of them > 0"),
        ({"a": 1.0, "b": float("nan")}, r"must be >= 0"),
    ],
)
def test_bad_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture.build({"a": 10, "b": 20}, weights)


@pytest.mark.parametrize(
    ("batch", "world", "micro", "message"),
    [
        (
            10,
            4,
            2,
            r"train\.batch_size \(10\) must be a multiple of ranks \(4\) x "
            r"train\.micro_batch_size \(2\) = 8; use 8 or 16",
        ),
        (3, 4, 1, r"= 4; use 4$"),
    ],
)
def test_indivisible_batches(batch: int, world: int, micro: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch_size(batch, world, micro)
    with pytest.raises(ValueError, match=message):
        split_batch(list(range(batch)), 0, world, micro)


def test_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match="the training split has no sequences"):
        GlobalBatches(0, 1, 0)
    with pytest.raises(ValueError, match=r"train\.batch_size \(0\) must be >= 1"):
        GlobalBatches(1, 0, 0)
