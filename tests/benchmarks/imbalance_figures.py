"""What the imbalance benchmark found: medians, ideals, bytes, targets.

R ranks, N steps of one part of a workload.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from parallel.borrow import hops
from parallel.plan import DispatchPlan

HOME = "home"
EVEN = "even"  # the home plan on routing forced to be balanced: the ceiling, not an arm
CLOCKS = ("cpu", "cpu_median", "process", "wall")
LINKS = ("within", "across")
MEGABYTE = 1e6
MAD_TO_ERROR = 1.4826 * 1.2533  # of a median over sqrt(N), for normal scatter
TRIPS = {"forward": 2, "both": 4}  # of a row that is computed elsewhere; backward as forward
WEIGHT_TRIPS = {"forward": 1, "both": 2}  # of a borrowed expert: weights, then gradients


@dataclass(frozen=True)
class Sample:
    """One step of one arm on one rank.

    Attributes:
        forward, both: seconds of the forward pass and of forward and backward, by clock: CPU time
            of the rank's own thread (`cpu`), of its process (gloo's threads too), and wall time.
        planner: CPU seconds in the planner.
    """

    forward: dict[str, float]
    both: dict[str, float]
    planner: float


@dataclass(frozen=True)
class PlanFacts:
    """What follows from one plan, the same on every rank.

    Attributes:
        load_R: rows computed by every rank. borrowed: number of (expert, borrower) pairs.
        row_bytes, weight_bytes: of one trip of all rows computed elsewhere, and of all borrowed
            experts, by link class.
    """

    load_R: list[int]
    borrowed: int
    row_bytes: dict[str, int]
    weight_bytes: dict[str, int]

    @property
    def load_ratio(self) -> float:
        return max(self.load_R) * len(self.load_R) / sum(self.load_R)

    def bytes_over(self, link: str, what: str) -> int:
        """Bytes over the links of a class, `what` being `forward` or `both` passes."""
        return TRIPS[what] * self.row_bytes[link] + WEIGHT_TRIPS[what] * self.weight_bytes[link]

    @classmethod
    def of(
        cls, plan: DispatchPlan, node_of_R: Sequence[int], row_bytes: int, expert_bytes: int
    ) -> PlanFacts:
        """Facts of a plan.

        Rows are counted one by one; the executor sends a token once to a rank that computes
        several of its rows, so what it sends is less.

        Args:
            row_bytes: of one row in one direction. expert_bytes: of one expert's parameters.
        """
        rows = dict.fromkeys(LINKS, 0)
        for _, source, computing, number in plan.rows.tolist():
            if source != computing:
                rows[_link(node_of_R, source, computing)] += number * row_bytes
        weights = dict.fromkeys(LINKS, 0)
        for way in hops(plan.borrowed.tolist(), node_of_R):
            for _, source, destination in way:
                weights[_link(node_of_R, source, destination)] += expert_bytes
        return cls(plan.load_R().tolist(), len(plan.borrowed), rows, weights)


def _link(node_of_R: Sequence[int], source: int, destination: int) -> str:
    return LINKS[node_of_R[source] != node_of_R[destination]]


@dataclass(frozen=True)
class RankRecord:
    """What one rank measured on one workload.

    Attributes:
        steps: the measured steps. samples: of every arm, in the order of steps.
        plans: of every arm, in the order of steps.
        peak_bytes: of every arm, by part.
        error: of every arm but EVEN, greatest difference from the home plan's output and gradients
            on this rank, relative to the greatest value.
    """

    steps: list[int]
    samples: dict[str, list[Sample]]
    plans: dict[str, list[PlanFacts]]
    peak_bytes: dict[str, dict[str, int]]
    error: dict[str, float]


@dataclass(frozen=True)
class Arm:
    """One planner on one part of a workload; times are medians over steps.

    Attributes:
        forward_s, both_s: of the slowest rank of each step, by clock; `cpu` is the headline.
        speedup, share: over the home plan, and of the ideal speed-up, by pass, of cpu time.
        even_share: of the throughput on as many rows that the router spread evenly, by pass.
        noise: standard error of speedup["both"], relative, from the scatter over steps.
        load_ratio, borrowed, planner_us: medians; the planner on the slowest rank.
        megabytes: by pass, then link class; means.
        memory_ratio: peak activation memory of the worst rank against that of EVEN.
        memory_bytes: that peak. error: see RankRecord, worst rank.
    """

    forward_s: dict[str, float]
    both_s: dict[str, float]
    speedup: dict[str, float]
    share: dict[str, float]
    even_share: dict[str, float]
    noise: float
    load_ratio: float
    borrowed: float
    planner_us: float
    megabytes: dict[str, dict[str, float]]
    memory_ratio: float
    memory_bytes: int
    error: float


@dataclass(frozen=True)
class Cell:
    """All arms on one part of a workload.

    Attributes:
        name, part: of the workload. num_ranks, num_steps: R, N. rows: of all ranks, median.
        load_ratio: of the home plan. ideal: speed-up if the home plan's time followed rows and all
            ranks had the mean, by pass.
        arms: by name.
    """

    name: str
    part: str
    num_ranks: int
    num_steps: int
    rows: float
    load_ratio: float
    ideal: dict[str, float]
    arms: dict[str, Arm] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name} {self.part}".rstrip()


def summarize(name: str, part_of: Callable[[int], str], ranks: Sequence[RankRecord]) -> list[Cell]:
    """One cell for every part of a workload.

    Args:
        name, part_of: of the workload. ranks: the record of every rank; one arm is the home plan.
    """
    steps = ranks[0].steps
    parts = dict.fromkeys(part_of(step) for step in steps)
    return [
        _cell(name, part, [n for n, step in enumerate(steps) if part_of(step) == part], ranks)
        for part in parts
    ]


def _cell(name: str, part: str, chosen: list[int], ranks: Sequence[RankRecord]) -> Cell:
    def worst(arm: str, what: str, clock: str) -> npt.NDArray[np.float64]:
        """Seconds of the slowest rank of every step, [N]."""
        return np.array(
            [max(getattr(r.samples[arm][n], what)[clock] for r in ranks) for n in chosen]
        )

    home_plans = [ranks[0].plans[HOME][n] for n in chosen]
    level_N = np.array([1 / plan.load_ratio for plan in home_plans])
    home = {what: worst(HOME, what, "cpu") for what in TRIPS}
    ideal_s = {what: float(np.median(home[what] * level_N)) for what in TRIPS}
    even_s = {what: float(np.median(worst(EVEN, what, "cpu"))) for what in TRIPS}
    even_peak = max(rank.peak_bytes[EVEN][part] for rank in ranks)
    arms = {}
    for arm in ranks[0].samples:
        times = {
            what: {clock: float(np.median(worst(arm, what, clock))) for clock in CLOCKS}
            for what in TRIPS
        }
        plans = [ranks[0].plans[arm][n] for n in chosen]
        peak = max(rank.peak_bytes[arm][part] for rank in ranks)
        arms[arm] = Arm(
            forward_s=times["forward"],
            both_s=times["both"],
            speedup={w: float(np.median(home[w])) / times[w]["cpu"] for w in TRIPS},
            share={w: ideal_s[w] / times[w]["cpu"] for w in TRIPS},
            even_share={w: even_s[w] / times[w]["cpu"] for w in TRIPS},
            noise=relative_error(home["both"] / worst(arm, "both", "cpu")),
            load_ratio=statistics.median(plan.load_ratio for plan in plans),
            borrowed=statistics.median(plan.borrowed for plan in plans),
            planner_us=1e6
            * statistics.median(max(r.samples[arm][n].planner for r in ranks) for n in chosen),
            megabytes={
                what: {
                    link: statistics.mean(plan.bytes_over(link, what) for plan in plans) / MEGABYTE
                    for link in LINKS
                }
                for what in TRIPS
            },
            memory_ratio=peak / even_peak,
            memory_bytes=peak,
            error=max(rank.error.get(arm, 0.0) for rank in ranks),
        )
    return Cell(
        name=name,
        part=part,
        num_ranks=len(ranks),
        num_steps=len(chosen),
        rows=statistics.median(sum(plan.load_R) for plan in home_plans),
        load_ratio=statistics.median(plan.load_ratio for plan in home_plans),
        ideal={what: float(np.median(home[what])) / ideal_s[what] for what in TRIPS},
        arms=arms,
    )


def relative_error(ratio_N: npt.NDArray[np.float64]) -> float:
    """Standard error of the median of so many ratios, relative to it; nan for fewer than three."""
    if len(ratio_N) < 3:
        return math.nan
    median = np.median(ratio_N)
    scatter = np.median(np.abs(ratio_N - median))
    return float(MAD_TO_ERROR * scatter / median / math.sqrt(len(ratio_N)))


@dataclass(frozen=True)
class Target:
    """A figure that a planner should reach in every cell where it applies."""

    text: str
    bound: float
    at_most: bool
    value: Callable[[Cell, Arm], float | None]

    def verdict(self, arm: str, cells: Iterable[Cell]) -> Verdict:
        """The worst of an arm's figures against the bound."""
        found = [
            (value, cell.label)
            for cell in cells
            if arm in cell.arms and (value := self.value(cell, cell.arms[arm])) is not None
        ]
        if not found:
            return Verdict(self.text, self.bound, arm, None, "", None)
        value, where = max(found) if self.at_most else min(found)
        met = value <= self.bound if self.at_most else value >= self.bound
        return Verdict(self.text, self.bound, arm, value, where, met)


@dataclass(frozen=True)
class Verdict:
    """One arm against one target: the worst value, the cell it is from, and whether it is met."""

    target: str
    bound: float
    arm: str
    value: float | None
    where: str
    met: bool | None


TARGETS = (
    Target(
        "speed-up, 95 % of rows on one of 8 ranks",
        6.2,
        False,
        lambda cell, arm: (
            arm.speedup["both"] if cell.num_ranks == 8 and cell.load_ratio > 7.59 else None
        ),
    ),
    Target(
        "share of the ideal where that is > 1.5",
        0.85,
        False,
        lambda cell, arm: arm.share["both"] if cell.ideal["both"] > 1.5 else None,
    ),
    Target(
        "speed-up on balanced routing (W0)",
        0.98,
        False,
        lambda cell, arm: arm.speedup["both"] if cell.name == "W0" else None,
    ),
    Target("memory against the balanced case", 1.15, True, lambda cell, arm: arm.memory_ratio),
    Target("speed-up on any workload", 0.98, False, lambda cell, arm: arm.speedup["both"]),
)


def verdicts(cells: Sequence[Cell]) -> list[Verdict]:
    """Every planner but the home plan against every target, forward and backward."""
    return [target.verdict(arm, cells) for target in TARGETS for arm in compared(cells)]


def compared(cells: Sequence[Cell]) -> list[str]:
    """The arms that are compared with the home plan."""
    arms = dict.fromkeys(arm for cell in cells for arm in cell.arms)
    return [arm for arm in arms if arm not in (HOME, EVEN)]
