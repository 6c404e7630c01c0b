"""Made-up runs for the tests of the page: their folders, and what was put into them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.stats import RoutingStats
from trainer.page.history import NAME, History, Point

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sizes:
    """Of a made-up run; `rows` of a layer and step."""

    layers: int
    experts: int
    points: int
    ranks: int = 4
    rows: int = 4000
    every: int = 10
    top_k: int = 2
    tokens: int = 200
    seed: int = 0


RUN = Sizes(layers=4, experts=16, points=12)
COMPARED = Sizes(layers=3, experts=8, points=5, every=15, rows=70_000, seed=1)
LARGE = Sizes(layers=58, experts=256, points=100, ranks=8, rows=1_000_000, top_k=8, tokens=2000)


@dataclass(frozen=True)
class MadeRun:
    """A folder, the points of its history and the trace that its statistics are of."""

    path: Path
    points: list[Point]
    ids_TLK: npt.NDArray[np.int64]


def make_run(path: Path, sizes: Sizes) -> MadeRun:
    """A run of two domains in which expert 1 of layer 0 has no row from the third point on."""
    path.mkdir()
    generator = np.random.default_rng(sizes.seed)
    history, points = History(path / NAME, 0), []
    for number in range(1, sizes.points + 1):
        points.append(_point(number, sizes, generator))
        history.record(points[-1])
    (path / "config.yaml").write_text("data:\n  sources:\n    text: {}\n    </script>: {}\n")
    summary = {"steps": points[-1].step, "seconds": 8.25, "load_ratio": [1.9, 1.05]}
    (path / "summary.json").write_text(json.dumps({**summary, "validation_loss": None}))
    with (path / "metrics.jsonl").open("w") as file:
        for point in points:
            record = {"step": point.step, "train/loss": 3 / point.step, "moe/load_ratio": 1.2}
            record |= {"moe/max_violation": 0.5, "moe/max_violation_global": 0.4}
            file.write(json.dumps({**record, "moe/dead_experts": 1}) + "\n")
    shape = (sizes.tokens, sizes.layers, sizes.experts)
    ids_TLK = generator.random(shape).argsort(2)[:, :, : sizes.top_k]
    stats = RoutingStats(sizes.layers, sizes.experts, sizes.ranks)
    stats.observe_trace(ids_TLK, domain_T=np.arange(sizes.tokens) % 2)
    stats.save(path / f"stats/step-{points[-1].step // 100:08}.npz")
    return MadeRun(path, points, ids_TLK)


def _point(number: int, sizes: Sizes, generator: np.random.Generator) -> Point:
    shares_LE = generator.dirichlet(np.full(sizes.experts, 5.0), sizes.layers)
    load_LE = np.stack([generator.multinomial(sizes.rows, shares_E) for shares_E in shares_LE])
    if number >= 3:
        load_LE[0, 1] = 0
    home_LR = load_LE.reshape(sizes.layers, sizes.ranks, -1).sum(2)
    planned_LR = np.broadcast_to(home_LR.sum(1, keepdims=True) // sizes.ranks, home_LR.shape)
    bias_LE = generator.normal(scale=1e-3 * number, size=load_LE.shape).astype(np.float32)
    return Point(number * sizes.every, load_LE, bias_LE, home_LR, planned_LR)


def data_of(page: Path) -> Any:
    """What a page carries."""
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])
