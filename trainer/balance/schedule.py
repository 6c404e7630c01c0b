"""A coefficient that changes with the optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHAPES = ("constant", "linear", "cosine", "inverse", "inverse_sqrt")


@dataclass(frozen=True)
class Schedule:
    """A coefficient by step; the first step is 1.

    Attributes:
        key: of the configuration. value: at step 1.
        shape: constant; linear and cosine: to `final` at step `steps` and on; inverse: value / n
            in step n; inverse_sqrt: value / sqrt(n).
        until: last step with a coefficient, 0 from there on; None for no end.

    Raises:
        ValueError: naming key, value and bound.
    """

    key: str
    value: float
    shape: str = "constant"
    steps: int | None = None
    final: float = 0.0
    until: int | None = None

    def __post_init__(self) -> None:
        stem = self.key.rpartition(".")[0]
        if not 0 < self.value < math.inf:
            raise ValueError(f"{self.key} ({self.value}) must be > 0; leave the balancer out for 0")
        if self.shape not in SHAPES:
            raise ValueError(f"{stem}.schedule ({self.shape}) must be one of {', '.join(SHAPES)}")
        if not 0 <= self.final < math.inf:
            raise ValueError(f"{stem}.final ({self.final}) must be >= 0")
        bends = self.shape in ("linear", "cosine")
        if bends and (self.steps is None or self.steps < 2):
            raise ValueError(
                f"{stem}.steps ({self.steps}) must be >= 2 with {stem}.schedule={self.shape}"
            )
        if not bends and (self.steps is not None or self.final):
            raise ValueError(
                f"{stem}.steps ({self.steps}) and {stem}.final ({self.final}) are for "
                f"{stem}.schedule=linear and cosine, not {self.shape}; leave them out"
            )
        if self.until is not None and self.until < 1:
            raise ValueError(f"{stem}.until ({self.until}) must be >= 1")

    @property
    def is_constant(self) -> bool:
        return self.shape == "constant" and self.until is None

    def at(self, step: int) -> float:
        """The coefficient in a step >= 1."""
        if self.until is not None and step > self.until:
            return 0.0
        if self.shape == "inverse":
            return self.value / step
        if self.shape == "inverse_sqrt":
            return self.value / math.sqrt(step)
        if self.steps is None:
            return self.value
        part = min(1.0, (step - 1) / (self.steps - 1))
        if self.shape == "cosine":
            part = 0.5 * (1 - math.cos(math.pi * part))
        return self.value + (self.final - self.value) * part
