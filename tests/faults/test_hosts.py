"""A few of the faults on emulated hosts (`python -m tests.faults` has all), real ones each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster, missing
from tests.faults.scenarios import Suite, link_cut, slow_host, struck

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    """Network namespaces need Linux, root and its tools; CI has them."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    folder = tmp_path_factory.mktemp("hosts")
    with Cluster(folder, 3) as cluster:
        yield Suite(folder, cluster)


def test_a_killed_rank_is_named_on_the_other_host_and_the_run_goes_on(suite: Suite) -> None:
    outcome = struck(suite, "backward")
    assert outcome.detected_s is not None and outcome.detected_s < 20


def test_a_short_cut_of_a_link_costs_time_alone(suite: Suite) -> None:
    link_cut(suite, 5)


def test_a_slow_host_is_named_within_twenty_steps(suite: Suite) -> None:
    slow_host(suite)


def test_a_cluster_leaves_nothing_behind(tmp_path: Path) -> None:
    with Cluster(tmp_path, 3) as cluster:
        spaces = [*map(cluster.space, range(3)), cluster.switch]
        cluster.start(0, ["sleep", "1000"], tmp_path / "log")
        assert all(Path("/run/netns", space).exists() for space in spaces)
    assert not any(Path("/run/netns", space).exists() for space in spaces)
