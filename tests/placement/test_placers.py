"""Placers: one call for all, random by seed, solved by statistics of this model and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate

from configs.compose import load
from configs.describe import FOLDER
from placement.objective import ExpertShape, cost
from placement.placers import OBJECTIVES, TWO_LEVEL, Solved, contiguous, random
from placement.stats import RoutingStats
from placement.synthetic import SyntheticRouter
from placement.table import ExpertPlacement
from placement.topology import Topology

LAYERS, EXPERTS, RANKS = 2, 8, 4
TOPOLOGY = Topology.even(2, 2, intra_gbps=80.0, inter_gbps=8.0, flops=1e12)
NAMES = sorted(path.stem for path in (FOLDER / "placement").glob("*.yaml"))


@pytest.fixture(scope="module")
def stats() -> RoutingStats:
    router = SyntheticRouter(LAYERS, EXPERTS, "high", skew=0.8)
    return RoutingStats.of_trace(router.sample(16, 32, 2), RANKS)


def placed(placer: Any) -> ExpertPlacement:
    """The call that the trainer and the sweep make."""
    placement: ExpertPlacement = placer(LAYERS, EXPERTS, RANKS, topology=TOPOLOGY, shape=None)
    return placement


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_called_alike(name: str, stats: RoutingStats, tmp_path: Path) -> None:
    node = yaml.safe_load((FOLDER / "placement" / f"{name}.yaml").read_text())
    given = ["experiment=quickstart", f"placement={name}", "seed=3"]
    if "stats" in node:
        stats.save(tmp_path / "stats.npz")
        given += [f"placement.stats={tmp_path / 'stats.npz'}", "placement.time_limit_s=5"]
    if "path" in node:
        ExpertPlacement.contiguous(LAYERS, EXPERTS, RANKS).save(tmp_path / "table.json")
        given.append(f"placement.path={tmp_path / 'table.json'}")
    placer = instantiate(load(*given).placement)
    placement = placer if isinstance(placer, ExpertPlacement) else placed(placer)
    assert (placement.num_layers, placement.num_experts, placement.num_ranks) == (2, 8, 4)
    if "seed" in node:
        assert getattr(placer, "seed", None) == 3 or placer.keywords["seed"] == 3


def test_random_placements_follow_the_seed() -> None:
    shape = (6, 16, 4)
    one, again, other = random(*shape, seed=1), random(*shape, seed=1), random(*shape, seed=2)
    assert torch.equal(one.home_LE, again.home_LE)
    assert not torch.equal(one.home_LE, other.home_LE)
    assert len({tuple(row) for row in one.home_LE.tolist()}) == 6  # every layer its own
    assert torch.equal(contiguous(*shape).home_LE, ExpertPlacement.contiguous(*shape).home_LE)


def test_random_placements_are_even_over_many_seeds() -> None:
    at_first_R = np.zeros(4)
    for seed in range(400):
        at_first_R[random(1, 4, 4, seed=seed).home_LE[0, 0]] += 1
    assert at_first_R.min() > 60  # 100 expected, 5 standard deviations are 43


@pytest.mark.parametrize("objective", ["home", "affinity", "moetuner", "load", "batched"])
def test_solved_placements_are_no_worse_than_contiguous(
    objective: str, stats: RoutingStats
) -> None:
    placer = Solved(stats, objective, "search", time_limit_s=5.0)
    solution = placer.solution(LAYERS, EXPERTS, RANKS, topology=TOPOLOGY)
    judge = OBJECTIVES[objective]
    values = [
        judge.judge(cost(placement, stats, TOPOLOGY, mode=judge.mode))
        for placement in (solution.placement, ExpertPlacement.contiguous(LAYERS, EXPERTS, RANKS))
    ]
    if objective != "batched":  # whose sources follow the placement, which the solver estimates
        assert values[0] < values[1]
    assert torch.equal(placed(placer).home_LE, solution.placement.home_LE)


def test_what_the_configuration_says_reaches_the_objective(
    stats: RoutingStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def solve(*given: Any, **named: Any) -> Any:
        seen.update(named, given=given)
        raise ValueError("seen")

    monkeypatch.setattr("placement.placers.solve", solve)
    shape = ExpertShape(64, 1000)
    placer = Solved(
        stats,
        "moetuner",
        "exact",
        dispatcher=TWO_LEVEL,
        load_weight=0.25,
        max_load_ratio=1.5,
        time_limit_s=7.0,
        seed=5,
    )
    with pytest.raises(ValueError, match="seen"):
        placer(LAYERS, EXPERTS, RANKS, topology=TOPOLOGY, shape=shape)
    objective = seen["objective"]
    assert (objective.mode, objective.two_level, objective.shape) == ("coherent", True, shape)
    assert (objective.load_weight, objective.max_load_ratio) == (0.25, 1.5)
    assert (seen["method"], seen["time_limit_s"], seen["seed"]) == ("exact", 7.0, 5)
    start = ExpertPlacement.contiguous(LAYERS, EXPERTS, RANKS)
    assert torch.equal(seen["given"][2].home_LE, start.home_LE)
    with pytest.raises(ValueError, match="seen"):
        Solved(stats, "affinity")(LAYERS, EXPERTS, RANKS, topology=TOPOLOGY)
    assert (seen["objective"].load_weight, seen["objective"].two_level) == (0.0, False)


def test_statistics_of_another_model_are_refused_before_any_work(
    stats: RoutingStats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("placement.placers.solve", lambda *_, **__: pytest.fail("it began"))
    path = tmp_path / "other.npz"
    stats.save(path)
    with pytest.raises(ValueError) as caught:
        Solved(str(path))(3, EXPERTS, RANKS, topology=TOPOLOGY)
    assert str(caught.value) == (
        f"placement.stats ({path}): the statistics are of 2 MoE layers x 8 experts, the model has "
        f"3 x 8; record them with this model"
    )
    with pytest.raises(ValueError, match="not a readable statistics file"):
        Solved(str(tmp_path / "none.npz"))(2, 8, 4, topology=TOPOLOGY)
    with pytest.raises(ValueError, match=r"placement.objective \('speed'\) must be one of home"):
        Solved(stats, "speed")
