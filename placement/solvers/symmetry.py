"""Ranks that a problem cannot tell apart, and one labelling of them per placement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from placement.problem import Problem


@dataclass(frozen=True)
class Symmetry:
    """Blocks of interchangeable ranks, and sets of blocks that are interchangeable as wholes.

    Attributes:
        blocks: ranks, every rank in one block; any permutation within a block costs nothing.
        swaps: indices into `blocks`, every block in one set; whole blocks of a set may swap.
    """

    blocks: list[list[int]]
    swaps: list[list[int]]

    @property
    def order(self) -> int:
        """Number of relabellings that change no cost."""
        inside = math.prod(math.factorial(len(block)) for block in self.blocks)
        return inside * math.prod(math.factorial(len(swap)) for swap in self.swaps)

    def before(self) -> list[tuple[int, int]]:
        """Pairs of ranks; the first has the lower first expert in a canonical labelling."""
        within = [pair for block in self.blocks for pair in pairwise(block)]
        heads = [[self.blocks[index][0] for index in swap] for swap in self.swaps]
        return within + [pair for head in heads for pair in pairwise(head)]

    def relabel(self, home_NE: np.ndarray) -> np.ndarray:
        """Canonical label of every rank, for each of N placements of a layer; int64 [N, R].

        Ranks of a block, and blocks of a set, are numbered by their lowest experts.
        """
        num_ranks = sum(len(block) for block in self.blocks)
        first_NR = np.stack([(home_NE == rank).argmax(1) for rank in range(num_ranks)], axis=1)
        row_N = np.arange(len(home_NE))
        label_NR = np.empty(first_NR.shape, dtype=np.int64)
        for swap in self.swaps:
            blocks_BG = np.array([self.blocks[index] for index in swap])
            order_NB = first_NR[:, blocks_BG].min(2).argsort(1)
            for place, block_G in enumerate(blocks_BG):
                here_NG = blocks_BG[order_NB[:, place]]
                order_NG = np.take_along_axis(first_NR, here_NG, 1).argsort(1)
                label_NR[row_N[:, None], np.take_along_axis(here_NG, order_NG, 1)] = block_G
        return label_NR


def symmetry(problem: Problem) -> Symmetry:
    """Relabellings of ranks that keep every cost and limit of a problem.

    Found among permutations within blocks and swaps of whole blocks, which are all there are for
    flat and two-level distances. A limit on moves, which compares labels, leaves none.
    """
    ranks = list(range(problem.num_ranks))
    if problem.max_moves is not None:
        return Symmetry([[rank] for rank in ranks], [[rank] for rank in ranks])

    def keeps(left: list[int], right: list[int]) -> bool:
        permuted_R = np.array(ranks)
        permuted_R[left], permuted_R[right] = right, left
        same = np.array_equal(
            problem.distance_RR[np.ix_(permuted_R, permuted_R)], problem.distance_RR
        )
        if problem.slowness_R is not None and problem.load_weight:
            same &= np.array_equal(problem.slowness_R[permuted_R], problem.slowness_R)
        if problem.linear_LER is not None:
            same &= np.array_equal(problem.linear_LER[:, :, permuted_R], problem.linear_LER)
        return bool(same)

    blocks: list[list[int]] = []
    for rank in ranks:
        for block in blocks:
            if keeps([block[0]], [rank]):
                block.append(rank)
                break
        else:
            blocks.append([rank])
    swaps: list[list[int]] = []
    for index, block in enumerate(blocks):
        for swap in swaps:
            head = blocks[swap[0]]
            if len(head) == len(block) and keeps(head, block):
                swap.append(index)
                break
        else:
            swaps.append([index])
    return Symmetry(blocks, swaps)
