"""What the page of a run shows, read from the run's folder and packed for the browser.

P recorded steps, L MoE layers, E experts, R ranks of an EP group, G domains.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from placement.stats import RoutingStats
from trainer.page.history import NAME, Point, read_history
from trainer.report import read_metrics

CURVES = {  # title -> metrics of docs/metrics.md
    "Loss (nats per token)": ("train/loss", "validation/loss"),
    "Validation (bits per byte)": ("validation/bits_per_byte",),
    "MaxVio of experts (max / mean - 1)": ("moe/max_violation", "moe/max_violation_global"),
    "Load ratio of ranks (max / mean)": ("moe/load_ratio", "moe/load_ratio_home"),
    "Experts without rows in a step": ("moe/dead_experts",),
    "Largest spread of selection biases": ("balance/bias_range",),
}
MOST_VALUES = 1000  # of a curve
LEVELS = 255  # of a share in a matrix
FACTS = {  # of summary.json
    "steps": "steps",
    "seconds": "wall time, s",
    "ranks": "ranks",
    "ep": "EP",
    "parameters": "parameters",
    "active_parameters": "active parameters per token",
    "tokens_per_s": "tokens/s",
    "loss": "training loss, nats per token",
    "validation_loss": "validation loss, nats per token",
    "bits_per_byte": "validation, bits per byte",
    "load_ratio": "load ratio of ranks, first and last step",
    "load_ratio_home": "without the planner",
    "max_violation": "MaxVio of experts, first and last step",
}
Array = npt.NDArray[Any]


def content(run_dir: Path) -> dict[str, Any]:
    """Everything that the page of one run shows, as plain values.

    Raises:
        ValueError: if the folder is no run, or what the page needs is missing or torn.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(
            f"{run_dir} is no run: it has no config.yaml; give the folder that run.dir named"
        )
    read = read_history(run_dir / NAME)
    loads_PLE = np.stack([point.load_LE for point in read.points])
    return {
        "name": str(run_dir),
        "facts": _facts(run_dir / "summary.json"),
        "torn": read.torn,
        "steps": [point.step for point in read.points],
        "layers": loads_PLE.shape[1],
        "experts": loads_PLE.shape[2],
        "load": packed(loads_PLE.astype(smallest_dtype(loads_PLE))),
        "violation": packed(_violations(loads_PLE)),
        "bias": _biases(read.points),
        "ranks": _ranks(read.points),
        "curves": _curves(run_dir / "metrics.jsonl"),
        "routing": _routing(run_dir),
    }


def packed(array_NX: Array) -> dict[str, Any]:
    """Little-endian bytes in base64, one string for every item of the first dim."""
    array = np.ascontiguousarray(array_NX, array_NX.dtype.newbyteorder("<"))
    return {
        "dtype": array_NX.dtype.name,
        "data": [base64.b64encode(item.tobytes()).decode("ascii") for item in array],
    }


def smallest_dtype(counts: Array) -> npt.DTypeLike:
    """The narrowest type that a browser has for these counts; float64 above 32 bits."""
    most = int(counts.max(initial=0))
    for dtype in (np.uint8, np.uint16, np.uint32):
        if most <= np.iinfo(dtype).max:
            return dtype
    return np.float64


def shares(counts_EE: Array, of_E: Array) -> tuple[Array, float]:
    """Every row of counts divided by its `of_E`, in 255 levels of the largest, uint8 [E, E].

    Returns:
        The levels, and the largest share. A row whose `of_E` is 0 has shares of 0.
    """
    share_EE = np.divide(
        counts_EE, of_E[:, None], out=np.zeros(counts_EE.shape), where=of_E[:, None] > 0
    )
    largest = float(share_EE.max(initial=0.0))
    levels_EE = np.rint(share_EE * (LEVELS / largest if largest else 0.0))
    return levels_EE.astype(np.uint8), largest


def _violations(loads_PLE: Array) -> Array:
    """MaxVio of every layer and recorded step, float32 [L, P]; 0 without rows."""
    mean_LP, max_LP = loads_PLE.mean(2).T, loads_PLE.max(2).T
    ratio_LP = np.divide(max_LP, mean_LP, out=np.ones_like(mean_LP), where=mean_LP > 0)
    return (ratio_LP - 1).astype(np.float32)


def _biases(points: Sequence[Point]) -> dict[str, Any] | None:
    """Selection biases of every layer, float32 [L, P, E]; None for families without."""
    biases = [point.bias_LE for point in points if point.bias_LE is not None]
    if len(biases) < len(points):
        return None
    return packed(np.stack(biases, axis=1))


def _ranks(points: Sequence[Point]) -> dict[str, Any] | None:
    """Rows of every rank, [P, L, R], at the steps that were made on several ranks.

    A run that went on with another EP size shows the steps of its last one.
    """
    num_ranks = 0 if points[-1].home_LR is None else points[-1].home_LR.shape[1]
    known = [
        (at, point.home_LR, point.planned_LR)
        for at, point in enumerate(points)
        if point.home_LR is not None
        and point.planned_LR is not None
        and point.home_LR.shape[1] == num_ranks
    ]
    if not known:
        return None
    at, home, planned = zip(*known, strict=True)
    return {
        "ranks": num_ranks,
        "at": list(at),
        "home": packed(np.stack(home).astype(np.float64)),
        "planned": packed(np.stack(planned).astype(np.float64)),
    }


def _curves(path: Path) -> list[dict[str, Any]]:
    """Title and lines of every chart; a line has a name, steps and values, None if not finite."""
    try:
        records = read_metrics(path)
    except ValueError:
        return []
    charts = []
    for title, names in CURVES.items():
        lines = []
        for name in names:
            points = [(step, record[name]) for step, record in records if name in record]
            points = [points[at] for at in _evenly(len(points), MOST_VALUES)]
            if points:
                steps, values = zip(*points, strict=True)
                lines.append({"name": name, "steps": steps, "values": [*map(_finite, values)]})
        if lines:
            charts.append({"title": title, "lines": lines})
    return charts


def _evenly(count: int, most: int) -> Iterator[int]:
    """So many of the numbers below count, first and last among them, at equal distances."""
    if count <= most:
        yield from range(count)
    else:
        yield from (round(at * (count - 1) / (most - 1)) for at in range(most))


def _finite(value: float | str) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _facts(path: Path) -> dict[str, str]:
    """Figures of a run that has ended; none before."""
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {
            text: ", ".join(_figure(v) for v in (value if isinstance(value, list) else [value]))
            for name, text in FACTS.items()
            if (value := summary.get(name)) is not None
        }
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not readable ({error}); remove it, or let the run end again"
        ) from error


def _figure(value: float | str) -> str:
    if isinstance(value, str):  # nan, inf
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _routing(run_dir: Path) -> dict[str, Any] | None:
    """Matrices of the newest routing statistics of a run; None if none are recorded.

    Of the tokens of an expert, the share that also chose another of the layer; of their rows in
    the next layer, the share of each expert. Domains: share of a domain's rows per expert.
    """
    files = sorted((run_dir / "stats").glob("step-*.npz"))
    if not files:
        return None
    stats = RoutingStats.load(files[-1])
    pair_LEE = stats.pair_LEE.numpy()
    return {
        "file": files[-1].name,
        "tokens": stats.tokens,
        "coactive": _matrices(stats.coactive_LEE.numpy(), stats.load_LE.numpy()),
        "affinity": _matrices(pair_LEE, pair_LEE.sum(2)),
        "domains": _domains(stats, run_dir / "config.yaml"),
    }


def _matrices(counts_LEE: Array, of_LE: Array) -> dict[str, Any]:
    layers = [shares(counts, of) for counts, of in zip(counts_LEE, of_LE, strict=True)]
    levels_LEE = np.array([levels for levels, _ in layers], np.uint8)
    return {**packed(levels_LEE), "largest": [largest for _, largest in layers]}


def _domains(stats: RoutingStats, config: Path) -> dict[str, Any] | None:
    """Share of every domain's rows per layer and expert, float32 [L, G, E]; None without."""
    counts = stats.by_domain
    if not counts.num_kinds:
        return None
    rows_GLE = counts.table.toarray().reshape(-1, stats.num_layers, stats.num_experts)
    total_GL1 = rows_GLE.sum(2, keepdims=True)
    share_GLE = np.divide(rows_GLE, total_GL1, out=np.zeros_like(rows_GLE), where=total_GL1 > 0)
    return {
        "names": _domain_names(config, counts.num_kinds),
        "tokens": counts.tokens_G.tolist(),
        **packed(share_GLE.transpose(1, 0, 2).astype(np.float32)),
    }


def _domain_names(path: Path, count: int) -> list[str]:
    """Names of the data sources, by place in the configuration; a number for what it lacks.

    Raises:
        ValueError: if the configuration is torn.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        names = list(config["data"]["sources"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run's configuration ({error})") from error
    return [names[at] if at < len(names) else f"domain {at}" for at in range(count)]
