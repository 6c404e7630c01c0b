"""An MoE grown to a multiple of its experts, each a copy of one that it had (arXiv:2604.19835)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.upcycle.layout import check_choice

MODES = ("double", "hyperplane", "noise")
ALLOCATIONS = ("uniform", "utility")


@dataclass(frozen=True)
class Expand:
    """Copies of experts, of their router rows and of their selection biases.

    Args:
        multiple: experts for one before.
        mode: double: tokens choose `multiple` times as many, all copies of those that they chose
            before; the function is kept. hyperplane: as many as before; in every layer a plane
            divides the tokens between the two copies. noise: as many as before; copies differ by
            noise, and take the places of other experts.
        allocation: uniform: as many copies of each. utility: more of those whose loss gradient is
            larger (noise).
        max_copies: of an expert, itself included, by utility.
        amplitude: length of the plane's normal vector that is added to the router rows of one
            copy and taken from the other's (hyperplane).
        noise: bound of the uniform noise on copies' router biases, on their rows in families
            without (noise).
        apart: how far copies differ in `down`, relative to its deviation; the differences cancel
            over the copies of an expert (double). 0: copies learn the same and stay alike.
        calibration: text file (utility). sequences: of it, each one batch. length: of one, in
            tokens.
    """

    multiple: int = 2
    mode: str = "double"
    allocation: str = "uniform"
    max_copies: int = 3
    amplitude: float = 16.0
    noise: float = 1e-3
    apart: float = 0.0
    calibration: str | None = None
    sequences: int = 8
    length: int = 512

    def check(self) -> None:
        """Refuse settings that do not fit together.

        Raises:
            ValueError: naming key, value, bound and remedy.
        """
        check_choice("recipe.mode", self.mode, MODES)
        check_choice("recipe.allocation", self.allocation, ALLOCATIONS)
        if self.multiple < 2:
            raise ValueError(f"recipe.multiple ({self.multiple}) must be >= 2")
        if self.mode == "hyperplane" and self.multiple != 2:
            raise ValueError(
                f"recipe.multiple ({self.multiple}) must be 2 with recipe.mode=hyperplane: a plane "
                f"has two sides"
            )
        for key, value in (("amplitude", self.amplitude), ("noise", self.noise)):
            if not value >= 0:
                raise ValueError(f"recipe.{key} ({value}) must be >= 0")
        if not self.apart >= 0 or (self.apart and self.mode != "double"):
            raise ValueError(
                f"recipe.apart ({self.apart}) must be >= 0, and 0 without recipe.mode=double: only "
                f"there a token always gets all copies"
            )
        if self.allocation == "uniform":
            if self.calibration:
                raise ValueError(
                    f"recipe.calibration ({self.calibration}) is for recipe.allocation=utility; "
                    f"leave it out"
                )
            return
        if self.mode != "noise":
            raise ValueError(
                f"recipe.allocation=utility needs recipe.mode=noise, not {self.mode}, which needs "
                f"as many copies of every expert"
            )
        if not self.calibration:
            raise ValueError("recipe.allocation=utility needs recipe.calibration=FILE.txt")
        if self.max_copies < self.multiple:
            raise ValueError(
                f"recipe.max_copies ({self.max_copies}) must be >= recipe.multiple "
                f"({self.multiple}), the mean"
            )


def allocate(utility: Sequence[float], total: int, max_copies: int) -> list[int]:
    """Copies of every expert: one each, then one at a time to the expert with the most utility
    per copy that has not `max_copies` yet, the first of equals.

    Args:
        total: of all copies, between the number of experts and `max_copies` times it.
    """
    copies = [1] * len(utility)
    for _ in range(total - len(copies)):
        free = [expert for expert, count in enumerate(copies) if count < max_copies]
        copies[max(free, key=lambda expert: utility[expert] / copies[expert])] += 1
    return copies


def parents(copies: Sequence[int]) -> list[int]:
    """Of every expert: first all that there were, then their second copies, and so on."""
    return [
        expert
        for number in range(max(copies))
        for expert, count in enumerate(copies)
        if number < count
    ]
