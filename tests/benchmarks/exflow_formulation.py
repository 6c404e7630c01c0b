"""ExFlow's integer program (arXiv:2401.08383) beside ours, on the same tokens.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.exflow_formulation [--time-limit SECONDS]

Theirs has a cost variable for every token and transition between layers, which is at least the
distance of a group of ranks where the token's expert is in the group and its next one is not. It
grows with the tokens; ours counts transitions first. Both may take the same time, on one core.

T tokens, L layers, E experts, R ranks.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import pulp
from rich.console import Console
from rich.table import Table

from placement.exact import ExactResult, installed_solver, minimise, solve_exact
from placement.problem import Problem
from placement.solvers.levels import levels, ultrametric

INSTANCES = [  # layers, experts, nodes, ranks of a node, tokens
    (2, 8, 1, 2, 200),
    (2, 8, 1, 2, 400),
    (3, 8, 1, 2, 200),
    (4, 8, 1, 2, 200),
    (2, 8, 1, 4, 200),
    (2, 8, 1, 4, 400),
    (2, 8, 2, 2, 200),
    (3, 8, 1, 4, 200),
    (4, 8, 1, 4, 1000),
]
TOLERANCE = 1e-6  # of the objective, for the tolerances of the solver


@dataclass(frozen=True)
class PerToken:
    """A placement, what its tokens travel, and what any other's do at least."""

    home_LE: np.ndarray
    objective: float
    lower_bound: float
    proven: bool
    seconds: float


def solve_per_token(
    ids_TL: np.ndarray,
    num_experts: int,
    node_of_R: tuple[int, ...],
    distance_RR: np.ndarray,
    time_limit_s: float,
    solver: str = "auto",
) -> PerToken:
    """Minimise the distance that tokens travel between layers, one cost variable for each step.

    Args:
        ids_TL: the expert of every token in every layer.
        distance_RR: flat or two-level.

    Raises:
        ValueError: for distances that form no levels, or a solver that is not installed.
    """
    if not np.array_equal(ultrametric(distance_RR), distance_RR):
        raise ValueError("distance_RR must be flat, or smaller within nodes than between them")
    started = time.monotonic()
    tokens, layers = ids_TL.shape
    held = num_experts // len(node_of_R)
    program = pulp.LpProblem("per_token", pulp.LpMinimize)
    x = [
        [
            [
                program.add_variable(f"x_{layer}_{e}_{r}", cat=pulp.LpBinary)
                for r in range(len(node_of_R))
            ]
            for e in range(num_experts)
        ]
        for layer in range(layers)
    ]
    for rows in x:
        for row in rows:
            program += pulp.lpSum(row) == 1
        for column in zip(*rows, strict=True):
            program += pulp.lpSum(column) == held
    groups, reach = [], 0.0  # ranks, and the distance to the nearest rank of another group
    for level in levels(distance_RR):
        reach += level.gain
        for group in range(level.num_groups):
            groups.append((np.flatnonzero(level.group_R == group).tolist(), reach))
    costs = []
    for token in range(tokens):
        for layer in range(layers - 1):
            here = x[layer][int(ids_TL[token, layer])]
            there = x[layer + 1][int(ids_TL[token, layer + 1])]
            cost = program.add_variable(f"y_{token}_{layer}", 0)
            costs.append(cost)
            for ranks, distance in groups:
                left = pulp.lpSum(here[r] for r in ranks) - pulp.lpSum(there[r] for r in ranks)
                program += cost >= distance * left
    program += pulp.lpSum(costs)
    home_LE = np.tile(np.arange(num_experts) // held, (layers, 1))
    for rows, home_E in zip(x, home_LE, strict=True):
        for variables, home in zip(rows, home_E, strict=True):
            for rank, variable in enumerate(variables):
                variable.setInitialValue(int(rank == home))
    for cost, distance in zip(costs, _travelled(ids_TL, home_LE, distance_RR).ravel(), strict=True):
        cost.setInitialValue(float(distance))
    lower_bound = minimise(program, installed_solver(solver), time_limit_s)
    values_LER = np.array([[[v.varValue for v in row] for row in rows] for rows in x], dtype=float)
    if np.isfinite(values_LER).all():
        home_LE = values_LER.argmax(2)
    objective = float(_travelled(ids_TL, home_LE, distance_RR).sum())
    proven = objective <= lower_bound + TOLERANCE * max(1.0, objective)
    return PerToken(home_LE, objective, lower_bound, proven, time.monotonic() - started)


def _travelled(ids_TL: np.ndarray, home_LE: np.ndarray, distance_RR: np.ndarray) -> np.ndarray:
    """Distance of every token's steps, [T, L-1]."""
    home_TL = home_LE[np.arange(ids_TL.shape[1]), ids_TL]
    return distance_RR[home_TL[:, :-1], home_TL[:, 1:]]


def counted(ids_TL: np.ndarray, num_experts: int, distance_RR: np.ndarray) -> Problem:
    """The same tokens as transition counts, from a contiguous placement."""
    layers = ids_TL.shape[1]
    pair_LEE = np.zeros((layers - 1, num_experts, num_experts))
    for layer in range(layers - 1):
        np.add.at(pair_LEE[layer], (ids_TL[:, layer], ids_TL[:, layer + 1]), 1)
    load_LE = np.stack([np.bincount(ids, minlength=num_experts) for ids in ids_TL.T]).astype(float)
    home_E = np.arange(num_experts) * len(distance_RR) // num_experts
    nodes = tuple(range(len(distance_RR)))
    return Problem(nodes, distance_RR, pair_LEE, load_LE, np.tile(home_E, (layers, 1)))


def tokens_of(num_layers: int, num_experts: int, num_tokens: int, seed: int = 0) -> np.ndarray:
    """Experts of tokens that mostly follow one hidden successor, int64 [T, L]."""
    rng = np.random.default_rng(seed)
    ids_TL = rng.integers(0, num_experts, (num_tokens, num_layers))
    for layer in range(1, num_layers):
        successor_E = rng.permutation(num_experts)
        follows_T = rng.random(num_tokens) < 0.5
        ids_TL[:, layer] = np.where(follows_T, successor_E[ids_TL[:, layer - 1]], ids_TL[:, layer])
    return ids_TL


def compare(
    layers: int, experts: int, nodes: int, per_node: int, tokens: int, time_limit_s: float
) -> tuple[PerToken, ExactResult, ExactResult]:
    """Theirs, ours as `auto`, and ours as an integer program with HiGHS."""
    node_R = np.arange(nodes * per_node) // per_node
    distance_RR = np.where(node_R[:, None] == node_R, 1.0, 4.0)
    np.fill_diagonal(distance_RR, 0.0)
    ids_TL = tokens_of(layers, experts, tokens)
    problem = counted(ids_TL, experts, distance_RR)
    theirs = solve_per_token(ids_TL, experts, tuple(node_R), distance_RR, time_limit_s)
    ours = solve_exact(problem, time_limit_s=time_limit_s)
    assert theirs.objective == problem.value(theirs.home_LE)
    return theirs, ours, solve_exact(problem, solver="highs", time_limit_s=time_limit_s)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time-limit", type=float, default=120.0)
    time_limit_s = parser.parse_args().time_limit
    table = Table(title=f"Per token against counted, at most {time_limit_s:g} s each")
    columns = "layers x experts", "ranks", "tokens", "theirs: found", "bound", "s", "ours: found"
    for column in (*columns, "s", "ours as a program, s", "times faster"):
        table.add_column(column, justify="right")
    for layers, experts, nodes, per_node, tokens in INSTANCES:
        theirs, ours, program = compare(layers, experts, nodes, per_node, tokens, time_limit_s)
        table.add_row(
            f"{layers} x {experts}",
            f"{nodes} x {per_node}",
            str(tokens),
            f"{theirs.objective:g}",
            "optimal" if theirs.proven else f"{theirs.lower_bound:.1f}",
            f"{theirs.seconds:.2f}" if theirs.proven else f"> {theirs.seconds:.0f}",
            f"{ours.lower_bound:g}" + (" optimal" if ours.proven else ""),
            f"{ours.seconds:.4f}",
            f"{program.seconds:.2f}",
            f"{'' if theirs.proven else '> '}{theirs.seconds / ours.seconds:,.0f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
