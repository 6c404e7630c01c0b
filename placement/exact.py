"""Exact placement: dynamic programming where a layer has few partitions, else an integer program.

L layers, E experts, R ranks.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pulp

from placement.bounds import lower_bound
from placement.problem import Problem
from placement.solvers.partitions import OPERATIONS_PER_SECOND, operations, viterbi
from placement.solvers.program import Program, num_products

SOLVERS = ("auto", "highs", "cbc")
PRODUCTS_PER_SECOND = 5_000  # of the time limit: building them takes a fifth of it
ALWAYS_BUILT = 20_000  # products, however little time there is
SMALL_S, SMALL_PRODUCTS = 5.0, 5_000
PROGRAM_SHARE = 0.75  # of the time, for the program; what is left for a bound if it is not solved
CBC_DIGITS = 1e-3  # to which CBC prints its bound
TOLERANCE = 1e-6  # of all costs together: the solvers' tolerances


@dataclass(frozen=True)
class ExactResult:
    """What an exact solver found.

    Attributes:
        home_LE: int64 [L, E]; the start where nothing better was found, even if the start exceeds
            a limit.
        lower_bound: of the value of every placement within the limits.
        proven: no placement within the limits has a lower value, to the solvers' tolerances.
    """

    home_LE: np.ndarray
    lower_bound: float
    proven: bool
    seconds: float


def is_small(problem: Problem) -> bool:
    """Whether an optimum can be expected within seconds."""
    quick = operations(problem) <= SMALL_S * OPERATIONS_PER_SECOND
    return quick or num_products(problem) <= SMALL_PRODUCTS


def solve_exact(
    problem: Problem,
    *,
    start_LE: np.ndarray | None = None,
    solver: str = "auto",
    time_limit_s: float = 60.0,
) -> ExactResult:
    """An optimal placement, or the best found in time with a lower bound.

    Args:
        start_LE: a placement to begin with, by default the problem's.
        solver: of the integer program, `highs` or `cbc`; `auto` is dynamic programming where it
            fits the time, else HiGHS, or CBC where HiGHS is not installed.
        time_limit_s: of wall time.

    Raises:
        ValueError: for limits that no placement meets, a solver that is unknown or not installed,
            and a problem too large for the integer program in that time.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver ({solver!r}) must be one of {', '.join(SOLVERS)}")
    started = time.monotonic()
    if solver == "auto" and operations(problem) <= time_limit_s * OPERATIONS_PER_SECOND:
        home_LE = viterbi(problem)
        return ExactResult(home_LE, problem.value(home_LE), True, time.monotonic() - started)
    products = num_products(problem)
    if products > max(ALWAYS_BUILT, PRODUCTS_PER_SECOND * time_limit_s):
        raise ValueError(
            f"the integer program would have {products:,} products, too many for time_limit_s "
            f"({time_limit_s:g}); use method 'search', or at least "
            f"{products / PRODUCTS_PER_SECOND:.0f} s"
        )
    name = installed_solver(solver)
    start_LE = problem.start_LE if start_LE is None else start_LE
    program = Program(problem)
    program.begin(start_LE)
    building_s = time.monotonic() - started
    bound = minimise(program.lp, name, max(1.0, time_limit_s * PROGRAM_SHARE - building_s))
    stopped = program.lp.status == pulp.LpStatusInfeasible  # CBC says so when time is short, too
    if stopped and problem.violations(start_LE):
        raise ValueError(
            f"max_load_ratio ({problem.max_load_ratio}) and max_moves ({problem.max_moves}) leave "
            "no placement; raise one of them"
        )
    if stopped:
        bound = -np.inf
    home_LE = start_LE if stopped else _better(problem, start_LE, program.placement())
    bound = program.constant + program.unit * bound - TOLERANCE * program.scale
    value = problem.value(home_LE)
    proven = value <= bound + 2 * TOLERANCE * program.scale and not problem.violations(home_LE)
    if not proven and not problem.violations(home_LE):
        left_s = max(1.0, time_limit_s - (time.monotonic() - started))
        bound = max(bound, lower_bound(problem, time_limit_s=left_s, known_value=value))
        proven = value <= bound + TOLERANCE * program.scale
    return ExactResult(home_LE, value if proven else bound, proven, time.monotonic() - started)


def _better(problem: Problem, start_LE: np.ndarray, found_LE: np.ndarray | None) -> np.ndarray:
    """What was found, unless the start is as good and as much within the limits."""
    if found_LE is None or problem.violations(found_LE):
        return start_LE
    if problem.violations(start_LE) or problem.value(found_LE) < problem.value(start_LE):
        return found_LE
    return start_LE


def installed_solver(solver: str) -> str:
    """`highs` or `cbc`: the one named, or for `auto` the first that is installed.

    Raises:
        ValueError: if it is not installed.
    """
    available = {"highs": pulp.HiGHS, "cbc": pulp.PULP_CBC_CMD}
    names = list(available) if solver == "auto" else [solver]
    for name in names:
        if available[name]().available():
            return name
    raise ValueError(
        f"solver {' or '.join(names)} is not installed: pip install highspy (HiGHS), or use a "
        "machine for which PuLP brings CBC"
    )


def minimise(lp: pulp.LpProblem, name: str, time_limit_s: float) -> float:
    """Solve a program from its variables' values with `highs` or `cbc`; returns its lower bound."""
    if name == "highs":
        solver = _WarmHighs(msg=False, gapRel=0.0, timeLimit=time_limit_s)
        lp.solve(solver)
        return solver.lower_bound
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "cbc.log"
        lp.solve(
            pulp.PULP_CBC_CMD(
                msg=False, gapRel=0.0, timeLimit=time_limit_s, warmStart=True, logPath=str(log)
            )
        )
        text = log.read_text()
    found = re.findall(r"^Lower bound:\s+(\S+)", text, re.MULTILINE)
    if found:
        return float(found[-1]) - CBC_DIGITS
    # a program without costs has no objective's value
    return float(pulp.value(lp.objective) or 0.0) if "Optimal solution" in text else -np.inf


class _WarmHighs(pulp.HiGHS):
    """HiGHS that starts from the variables' values and keeps its lower bound."""

    lower_bound = -np.inf

    def callSolver(self, lp: Any) -> None:
        solution = type(lp.solverModel.getSolution())()
        solution.col_value = [variable.varValue or 0.0 for variable in lp.variables()]
        lp.solverModel.setSolution(solution)
        lp.solverModel.run()
        self.lower_bound = float(lp.solverModel.getInfo().mip_dual_bound)
