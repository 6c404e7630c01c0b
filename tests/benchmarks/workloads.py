"""Imbalance workloads as data: which experts the tokens of every source rank choose.

T tokens of one source rank or of all, K choices, E experts, R ranks, L layers. Every token
chooses K *distinct* experts, as a real router does.

W0 to W7 follow the public list of Megatron-Core's token-imbalance benchmark (NVIDIA/Megatron-LM
pull request 7488). The hot set has max(K, E/R) experts; three tokens of four choose among them
alone, the fourth among all experts. Where the public list leaves the construction open:

- W1: the hot set is drawn once per seed, anywhere.
- W2: it is the experts of one rank, drawn once per seed (going on into the next rank if K > E/R).
- W3: as hot as W1 and W2, at equal distances over the experts. (The published expert max/mean of
  W3, 1.281, is that of no hot experts at all; "the same heat" is taken at its word here.)
- W4: every expert is as likely as any other; source rank r holds (2r + 1)/R times the mean tokens.
- W5: the first half of the experts, and so of the ranks, gets nothing.
- W6: the hot set is one rank's experts, the next rank's after every 3 steps.
- W7: as W4's choices with even sources; in every fourth step half of the tokens choose among the
  experts of one rank, as in W2.

The names of the grid are `percent:hot@place`: that share of all rows falls on so many hot experts
(arXiv:2601.17111, section 5, whose own generator repeats experts within a token). A hot expert
gets at most one row of a token, so h < K hot experts could hold no more than h/K of the rows. To
keep what the percentage says, a cell with h < K routes with K = h choices and K/h times the
tokens: as many rows, and `95:1@0` puts 95 % of all rows on rank 0.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

EVEN_EVERY = 4  # of so many tokens one chooses among all experts
ROTATE_EVERY = 3
BURST_EVERY = 4
PERCENTS = (30, 50, 80, 95)
HOT_EXPERTS = (1, 4, 16)
SPREAD = "spread"


@dataclass(frozen=True)
class RoutingShape:
    """Sizes of one step of routing: R ranks, E experts, K choices, mean tokens per source rank.

    Raises:
        ValueError: for sizes below 1, R that does not divide E, or K above E.
    """

    num_ranks: int
    num_experts: int
    top_k: int
    tokens: int

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_experts", "top_k", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"shape.{name} ({getattr(self, name)}) must be >= 1")
        if self.num_experts % self.num_ranks:
            raise ValueError(
                f"shape.num_ranks ({self.num_ranks}) must divide shape.num_experts "
                f"({self.num_experts}); choose another number of ranks"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"shape.top_k ({self.top_k}) must be <= shape.num_experts ({self.num_experts})"
            )

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def all_tokens(self) -> int:
        return self.num_ranks * self.tokens


@dataclass(frozen=True)
class Workload:
    """The routing of every source rank in every step, and nothing else.

    Attributes:
        name: as on the command line. shape: the sizes; sources may be uneven.
        draw: (seed, step) -> ids [T, K] of every source rank; the same arguments, the same ids.
            In recordings the id E means "no expert".
        part: step -> "" or the kind of step that must not be averaged with the others.
        period: steps after which every part has occurred.
    """

    name: str
    shape: RoutingShape
    draw: Callable[[int, int], list[Ids]]
    part: Callable[[int], str] = lambda step: ""
    period: int = 1

    def counts(self, seed: int, step: int) -> Ids:
        """Rows per source rank and expert, int64 [R, E]."""
        num_experts = self.shape.num_experts
        counts = [
            np.bincount(ids.ravel(), minlength=num_experts + 1) for ids in self.draw(seed, step)
        ]
        return np.stack(counts)[:, :num_experts]


def generator(name: str, seed: int, *step: int) -> np.random.Generator:
    """Random numbers keyed by workload and seed, and by the step where one is given."""
    return np.random.default_rng([zlib.crc32(name.encode()), seed, *step])


def distinct(rng: np.random.Generator, pool: Ids, num_tokens: int, top_k: int) -> Ids:
    """`top_k` different experts of a pool for every token, all equally likely: [T, K]."""
    if top_k > len(pool):
        raise ValueError(
            f"top_k ({top_k}) must be <= the experts to choose from ({len(pool)}); "
            f"use more experts or fewer choices"
        )
    return rng.permuted(np.tile(pool, (num_tokens, 1)), axis=1)[:, :top_k]


def heated(rng: np.random.Generator, shape: RoutingShape, hot: Ids, even_every: int) -> Ids:
    """All tokens' ids [T, K]: one of `even_every` tokens chooses among all, the others in `hot`."""
    ids = distinct(rng, np.arange(shape.num_experts), shape.all_tokens, shape.top_k)
    is_hot = np.arange(shape.all_tokens) % even_every != 0
    ids[is_hot] = distinct(rng, hot, int(is_hot.sum()), shape.top_k)
    return ids


def concentrated(rng: np.random.Generator, shape: RoutingShape, hot: Ids, percent: int) -> Ids:
    """All tokens' ids [T, K] with exactly `percent` of all rows (rounded) on the hot experts.

    Every token has the same number of hot choices, give or take one.
    """
    num_tokens, top_k = shape.all_tokens, shape.top_k
    hot_rows = (percent * num_tokens * top_k + 50) // 100
    hot_T = hot_rows // num_tokens + (rng.permutation(num_tokens) < hot_rows % num_tokens)
    cold = np.setdiff1d(np.arange(shape.num_experts), hot)
    from_hot = distinct(rng, hot, num_tokens, min(top_k, len(hot)))
    from_cold = distinct(rng, cold, num_tokens, min(top_k, len(cold)))
    take = np.concatenate(
        [
            np.arange(from_hot.shape[1]) < hot_T[:, None],
            np.arange(from_cold.shape[1]) < top_k - hot_T[:, None],
        ],
        axis=1,
    )
    return np.concatenate([from_hot, from_cold], axis=1)[take].reshape(num_tokens, top_k)


def block(shape: RoutingShape, start: int, num_hot: int) -> Ids:
    """Neighbouring experts from `start` on, around the end."""
    return (start + np.arange(num_hot)) % shape.num_experts


def spread(shape: RoutingShape, num_hot: int) -> Ids:
    """Experts at equal distances, so that no rank has more of them than it must."""
    return np.arange(num_hot) * shape.num_experts // num_hot


def evenly(ids_TK: Ids, shape: RoutingShape) -> list[Ids]:
    """The same number of tokens for every source rank."""
    return np.split(ids_TK, shape.num_ranks)


def raggedly(ids_TK: Ids, shape: RoutingShape) -> list[Ids]:
    """(2r + 1)/R times the mean number of tokens for source rank r, rounded; all in all the same.

    The tokens of ranks up to r add up to the square number (r + 1)^2 of such portions.
    """
    ends = shape.tokens * np.arange(1, shape.num_ranks) ** 2 // shape.num_ranks
    return np.split(ids_TK, ends)


def balanced(shape: RoutingShape, num_tokens: int) -> list[Ids]:
    """So many tokens on all ranks together, choosing experts in turn, split evenly."""
    places = np.arange(num_tokens * shape.top_k) % shape.num_experts
    return np.array_split(places.reshape(num_tokens, shape.top_k), shape.num_ranks)


def public_workloads(shape: RoutingShape) -> dict[str, Workload]:
    """W0 to W7 by name; see the head of this file for what each is."""
    num_hot = max(shape.top_k, shape.experts_per_rank)
    all_experts = np.arange(shape.num_experts)

    def w0(seed: int, step: int) -> list[Ids]:
        return balanced(shape, shape.all_tokens)

    def w1(seed: int, step: int) -> list[Ids]:
        hot = generator("W1", seed).permutation(shape.num_experts)[:num_hot]
        return evenly(heated(generator("W1", seed, step), shape, hot, EVEN_EVERY), shape)

    def rank_block(name: str, seed: int) -> Ids:
        rank = int(generator(name, seed).integers(shape.num_ranks))
        return block(shape, rank * shape.experts_per_rank, num_hot)

    def w2(seed: int, step: int) -> list[Ids]:
        hot = rank_block("W2", seed)
        return evenly(heated(generator("W2", seed, step), shape, hot, EVEN_EVERY), shape)

    def w3(seed: int, step: int) -> list[Ids]:
        hot = spread(shape, num_hot)
        return evenly(heated(generator("W3", seed, step), shape, hot, EVEN_EVERY), shape)

    def w4(seed: int, step: int) -> list[Ids]:
        rng = generator("W4", seed, step)
        return raggedly(distinct(rng, all_experts, shape.all_tokens, shape.top_k), shape)

    def w5(seed: int, step: int) -> list[Ids]:
        rng, chosen = generator("W5", seed, step), all_experts[shape.num_experts // 2 :]
        return evenly(distinct(rng, chosen, shape.all_tokens, shape.top_k), shape)

    def w6(seed: int, step: int) -> list[Ids]:
        hot = block(shape, step // ROTATE_EVERY * shape.experts_per_rank, num_hot)
        return evenly(heated(generator("W6", seed, step), shape, hot, EVEN_EVERY), shape)

    def w7(seed: int, step: int) -> list[Ids]:
        rng = generator("W7", seed, step)
        if is_burst(step):
            return evenly(heated(rng, shape, rank_block("W7", seed), 2), shape)
        return evenly(distinct(rng, all_experts, shape.all_tokens, shape.top_k), shape)

    def is_burst(step: int) -> bool:
        return step % BURST_EVERY == BURST_EVERY - 1

    workloads = [Workload(f"W{i}", shape, w) for i, w in enumerate((w0, w1, w2, w3, w4, w5))]
    workloads += [
        Workload("W6", shape, w6, lambda s: "stay" if s % ROTATE_EVERY else "move", ROTATE_EVERY),
        Workload("W7", shape, w7, lambda s: "burst" if is_burst(s) else "steady", BURST_EVERY),
    ]
    return {workload.name: workload for workload in workloads}


def grid_cell(name: str, shape: RoutingShape) -> Workload:
    """One cell of the concentration grid: `percent:hot@place`, place a rank or `spread`.

    Hot experts at a rank are the first of its experts; more than it has go on into the next
    ranks. With fewer hot experts than choices, K is their number (see the head of this file).

    Raises:
        ValueError: for a name that is no cell, or hot experts that would not be hot.
    """
    match = re.fullmatch(rf"(\d+):(\d+)@(\d+|{SPREAD})", name)
    if match is None:
        raise ValueError(
            f"workload {name!r} is neither W0..W7 nor percent:hot@place, "
            f"such as 95:1@0 or 50:16@{SPREAD}"
        )
    percent, num_hot, place = int(match[1]), int(match[2]), match[3]
    if place != SPREAD and int(place) >= shape.num_ranks:
        raise ValueError(f"workload {name}: rank {place} must be < the ranks ({shape.num_ranks})")
    if not 0 < num_hot * 100 < percent * shape.num_experts:
        raise ValueError(
            f"workload {name}: {num_hot} of {shape.num_experts} experts must be fewer than "
            f"{percent} % of them to be hot; use more experts"
        )
    if percent > 100:
        raise ValueError(f"workload {name}: percent ({percent}) must be <= 100")
    if num_hot < shape.top_k:
        tokens = shape.tokens * shape.top_k // num_hot
        shape = replace(shape, top_k=num_hot, tokens=tokens)
    if place == SPREAD:
        hot = spread(shape, num_hot)
    else:
        hot = block(shape, int(place) * shape.experts_per_rank, num_hot)

    def draw(seed: int, step: int) -> list[Ids]:
        return evenly(concentrated(generator(name, seed, step), shape, hot, percent), shape)

    return Workload(name, shape, draw)


def grid_names(shape: RoutingShape) -> list[str]:
    """The cells of the grid that are hot at these sizes: on rank 0, on another rank, spread."""
    other = 2 * shape.num_ranks // 3
    return [
        f"{percent}:{num_hot}@{place}"
        for percent in PERCENTS
        for num_hot in HOT_EXPERTS
        for place in dict.fromkeys((0, other, SPREAD))
        if num_hot * 100 < percent * shape.num_experts
        and not (num_hot == 1 and place == SPREAD)  # one expert cannot be spread
    ]


def workload(name: str, shape: RoutingShape) -> Workload:
    """A workload by its name on the command line."""
    public = public_workloads(shape)
    return public[name] if name in public else grid_cell(name, shape)


def recording(path: Path, num_ranks: int, num_experts: int, tokens: int) -> Workload:
    """Routing as a trainer saw it, replayed exactly.

    The file is one of `trainer/record.py`, an .npz with `ids` [T, L, K], or `ids` alone as .npy.
    Tokens stay with their `source` if the file names as many ranks as there are here; else they
    are split evenly, in order. A step replays one layer of the next `tokens` tokens of every
    rank; all layers of these come before the next tokens, and the file starts again at its end.
    The seed has no part in it.

    Raises:
        ValueError: naming what is wrong with the file.
    """
    ids_TLK, source_T, file_experts = _read(path, num_experts)
    if ids_TLK.ndim != 3 or not np.issubdtype(ids_TLK.dtype, np.integer) or not ids_TLK.size:
        raise ValueError(
            f"routing file {path}: expected integer ids [tokens, layers, choices], got "
            f"{ids_TLK.dtype} of shape {ids_TLK.shape}"
        )
    low, high = int(ids_TLK.min()), int(ids_TLK.max())
    if file_experts != num_experts or low < 0 or high > num_experts:
        raise ValueError(
            f"routing file {path} is of {file_experts} experts, with ids {low}..{high}; the shape "
            f"has {num_experts} experts: set --experts {file_experts}"
        )
    ordered = np.sort(ids_TLK, axis=2)
    is_repeated = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] < num_experts)
    if is_repeated.any():
        token, layer = np.argwhere(is_repeated.any(axis=2))[0].tolist()
        raise ValueError(
            f"routing file {path}: token {token} chooses an expert twice in layer {layer}"
        )
    if len(np.unique(source_T)) == num_ranks:
        of_rank = [ids_TLK[source_T == rank] for rank in np.unique(source_T)]
    else:
        of_rank = np.array_split(ids_TLK, num_ranks)
    num_layers, top_k = ids_TLK.shape[1:]
    num_windows = -(-max(map(len, of_rank)) // tokens)

    def draw(seed: int, step: int) -> list[Ids]:
        layer, start = step % num_layers, step // num_layers % num_windows * tokens
        return [ids[start : start + tokens, layer].astype(np.int64) for ids in of_rank]

    return Workload(path.stem, RoutingShape(num_ranks, num_experts, top_k, tokens), draw)


def _read(path: Path, num_experts: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
    """Ids [T, L, K], source [T] and number of experts; an .npy has one source, and as many experts
    as there should be unless it names others."""
    loaded = np.load(path)
    if isinstance(loaded, np.ndarray):
        return loaded, np.zeros(len(loaded)), max(num_experts, int(loaded.max(initial=0)) + 1)
    with loaded:
        missing = {"ids", "source", "num_experts"} - set(loaded)
        if missing:
            raise ValueError(
                f"routing file {path} holds {sorted(loaded)}, not {', '.join(sorted(missing))}; "
                f"record it with the trainer"
            )
        return loaded["ids"], loaded["source"], int(loaded["num_experts"])
