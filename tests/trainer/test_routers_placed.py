"""Routers that know where experts live, against loops over rows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.compose import load
from tests.ranks import run_ranks
from tests.trainer import router_loops as loops
from tests.trainer.test_routers import EXPERTS, TOKENS, TOP_K, chosen, engine_run, fitted, scores
from tests.trainer.test_routers_stateful import trained
from trainer.routers.base import Router
from trainer.routers.placed import Local, Rectified


def placed(router: Router, rank: int = 0, home: tuple[int, ...] = (0, 1, 0, 1, 1, 0, 0, 1)) -> Any:
    """On one rank of an EP group of two nodes."""
    fit = fitted(router)
    fit.mesh = SimpleNamespace(ep_rank=rank, node_of_ep_ranks=lambda: [0, 1])
    fit.paths = [SimpleNamespace(home_E=torch.tensor(home))]
    return fit


def rectified(scores_TE: Tensor, capacity: float, here: list[int], fill: bool) -> loops.Rows:
    """Refused rows try the rank's own experts in rounds, first tokens first; room that is left
    goes to the best of the tokens whose next expert has it."""
    table, num_tokens = scores_TE.tolist(), len(scores_TE)
    room = math.ceil(capacity * num_tokens * TOP_K / EXPERTS)
    own = [loops.best(row, TOP_K) for row in table]
    kept = loops.switch(scores_TE, TOP_K, capacity, "position")
    has = [set(row) for row in own]

    def number(expert: int) -> int:
        return sum(row.count(expert) for row in kept)

    for turn in range(len(here)):
        left = {e: room - number(e) for e in here}
        for token in range(num_tokens):
            wish = loops.best(table[token], len(here), here)[turn]
            refused = [k for k in range(TOP_K) if kept[token][k] == EXPERTS]
            if refused and wish not in has[token] and left[wish] > 0:
                kept[token][refused[0]] = wish
                has[token].add(wish)
                left[wish] -= 1
    if not fill:
        return kept
    left = {e: room - number(e) for e in range(EXPERTS)}
    wishes = []
    for token in range(num_tokens):
        others = [e for e in range(EXPERTS) if e not in has[token]]
        wishes.append(loops.best(table[token], 1, others)[0])
        kept[token].append(EXPERTS)
    for token in sorted(range(num_tokens), key=lambda t: -table[t][wishes[t]]):
        if left[wishes[token]] > 0:
            kept[token][-1] = wishes[token]
            left[wishes[token]] -= 1
    return kept


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("capacity", [0.3, 0.6, 1.0, 1.25])
@pytest.mark.parametrize("rank", [0, 1])
def test_rectified(rank: int, capacity: float, fill: bool) -> None:
    """Against the loop; nobody has more than the room, nor a token an expert twice."""
    moved = 0
    for seed in range(4):
        for tokens in (TOKENS, 7, 1):
            router = placed(Rectified(capacity, fill=fill), rank)
            scores_TE = scores(seed, tokens)
            rows = chosen(router, scores_TE)
            here = [e for e in range(EXPERTS) if router.homes(0)[e] == rank]
            assert rows == rectified(scores_TE, capacity, here, fill)
            room = math.ceil(capacity * tokens * TOP_K / EXPERTS)
            flat = [e for row in rows for e in row]
            assert all(flat.count(e) <= room for e in range(EXPERTS))
            assert all(len(set(r) - {EXPERTS}) == len(r) - r.count(EXPERTS) for r in rows)
            dropped = loops.switch(scores_TE, TOP_K, capacity, "position")
            moved += sum(row.count(EXPERTS) for row in dropped)
            moved -= sum(row[:TOP_K].count(EXPERTS) for row in rows)
            plain = [loops.best(row, TOP_K) for row in scores_TE.tolist()]
            assert chosen(router, scores_TE, training=False) == plain
    assert moved > 0


def test_rectified_drops_nothing_where_its_rank_has_room() -> None:
    router = placed(Rectified(1.25), home=(0,) * EXPERTS)
    for seed in range(5):
        assert all(EXPERTS not in row for row in chosen(router, scores(seed)))


def test_local_prefers_its_node_less_and_less() -> None:
    near = [1, 3, 4, 7]
    for seed in range(4):
        router, scores_TE = placed(Local(0.2, half_life=2), rank=1), scores(seed)
        shares = []
        for step in (1, 3, 5, 200):
            router.step = step
            bonus = 0.2 * 0.5 ** ((step - 1) / 2)
            want = [
                loops.best([s + bonus * (e in near) for e, s in enumerate(row)], TOP_K)
                for row in scores_TE.tolist()
            ]
            got = chosen(router, scores_TE)
            assert got == want
            shares.append(sum(e in near for row in got for e in row))
        plain = [loops.best(row, TOP_K) for row in scores_TE.tolist()]
        assert got == plain == chosen(router, scores_TE, training=False)
        assert shares[0] > shares[2] >= shares[3]


def test_what_they_depend_on() -> None:
    """What they say of looking ahead and of other sequences is so."""
    for make in (lambda: Rectified(0.6), lambda: Rectified(0.6, fill=True), Local):
        looked = coupled = False
        for seed in range(8):
            router = placed(make())
            first, others = scores(seed, 16), scores(seed + 10, 16)
            changed = torch.cat([first[:8], others[8:]])
            looked |= chosen(router, first)[:8] != chosen(router, changed)[:8]
            beside = [chosen(router, torch.cat([o, first]))[16:] for o in (others, scores(99, 16))]
            coupled |= beside[0] != beside[1]
        assert looked == router.looks_ahead
        assert coupled == router.is_coupled


def test_the_bonus_saves_rows_between_nodes_and_is_logged(tmp_path: Any) -> None:
    """Two ranks that are nodes of their own; the placement alone decides what is near."""
    nodes = "mesh.ranks_per_node=1", "planner=home", "mesh.ep=2"
    plain = trained(tmp_path, *nodes, steps=3)
    near = trained(tmp_path, *nodes, "router=local", "router.bonus=10.0", steps=3)
    assert near[0]["router/local_bonus"] == 10.0
    assert near[0]["moe/rows_crossing"] == 0 < plain[0]["moe/rows_crossing"]


def rectified_run(recompute: bool) -> Any:
    return engine_run(lambda: Rectified(0.6), 2, "qwen3_moe", recompute)


def test_rectified_choices_are_kept_in_a_repeated_forward() -> None:
    plain, again = (run_ranks(rectified_run, 2, recompute) for recompute in (False, True))
    for a, b in zip(plain, again, strict=True):
        assert a[0] == b[0] and all(torch.equal(a[1][key], b[1][key]) for key in a[1])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"router.capacity \(0\) must be > 0"):
        Rectified(0)
    for make, key in ((lambda: Local(0), "bonus"), (lambda: Local(half_life=0), "half_life")):
        with pytest.raises(ValueError, match=rf"router.{key} \(0\) must be > 0"):
            make()
    assert load("experiment=quickstart", "router=rectified").router["fill"] is False
