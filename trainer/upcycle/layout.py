"""What a recipe makes of a dense FFN: how many experts, how wide, and how they are routed.

N routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from configs.upcycle_schema import Routing


class Matrix(Enum):
    """The matrices of an FFN `down(act(gate(x)) * up(x))`: `gate` and `up` have a row per neuron,
    `down` a column."""

    gate = "gate"
    up = "up"
    down = "down"


class Scores(Enum):
    """How far apart the scores of different router rows begin.

    equal: not at all. close: by so little that weights are as good as equal. free: as they come.
    """

    equal = "equal"
    close = "close"
    free = "free"


class DenseShape(NamedTuple):
    """Sizes of a dense model: layers, hidden size, neurons of an FFN; how many such models there
    are, and whether all have the same weights."""

    num_layers: int
    hidden: int
    width: int
    num_models: int = 1
    same: bool = True


@dataclass(frozen=True)
class Layout:
    """The MoE layers that a recipe makes; all are alike.

    Attributes:
        num_experts: routed experts. top_k: of them per token. width: neurons of a routed expert.
        shared_width: neurons of the shared expert, 0 for none.
        parts: over how many experts the dense FFN's neurons are spread; 1 for copies.
        row_of_N: the router row that every expert has. Experts with the same row have the same
            score; if there are `parts` of them, they are the parts of one copy.
        silent: routed experts begin with zero output.
        alike: all that a token may choose computes the same, so that a renormalised router has
            no gradient until experts differ.
        inexact: why the MoE does not begin as the dense model did; empty if it does.
        num_models: dense models that it is made of.
        averages: tensors outside the FFN are the mean of the models', not the first one's.
    """

    num_experts: int
    top_k: int
    width: int
    row_of_N: tuple[int, ...]
    shared_width: int = 0
    parts: int = 1
    silent: bool = False
    alike: bool = False
    inexact: str = ""
    num_models: int = 1
    averages: bool = False

    @property
    def num_rows(self) -> int:
        """Different router rows."""
        return max(self.row_of_N) + 1

    @property
    def copies_are_contiguous(self) -> bool:
        """Experts with the same router row are neighbours."""
        return list(self.row_of_N) == sorted(self.row_of_N)

    def factor(self, routing: Routing) -> float:
        """What the routed experts' outputs are multiplied by to add up to the dense FFN's.

        With weights that sum to 1, each part has the weight 1/parts; in a softmax over all
        experts at equal scores, top_k/N of the weights are lost.
        """
        if self.silent:
            return 1.0
        lost = self.num_experts / self.top_k if routing is Routing.softmax else 1.0
        return self.parts * lost

    def inexact_for(self, routing: Routing, scores: Scores, whole_groups: bool) -> str:
        """Why the MoE does not begin as the dense model did; empty if it does.

        Args:
            scores: how the router's begin. whole_groups: the target chooses experts with one
                router row together, whatever the scores.
        """
        if self.inexact or self.silent:
            return self.inexact
        if routing is Routing.softmax and scores is Scores.free:
            return (
                "softmax weights of the chosen experts do not sum to a constant: use "
                "router_init=zero"
            )
        if self.parts == 1 or (scores is not Scores.free and self.top_k == self.num_experts):
            return ""
        if self.top_k == self.num_experts == self.num_rows:
            return "experts hold different neurons, and their weights differ: use router_init=zero"
        if self.num_experts != self.num_rows * self.parts:
            return "experts hold different neurons, and a token does not reach all of them"
        if scores is Scores.free or whole_groups:
            return ""
        return "scores of copies tie, and which part of which copy a token gets is left to chance"


def check_experts(num_experts: int, top_k: int) -> None:
    """Refuse numbers of experts that cannot be routed.

    Raises:
        ValueError: naming key, value and bound.
    """
    if num_experts < 2:
        raise ValueError(f"recipe.num_experts ({num_experts}) must be >= 2")
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"recipe.top_k ({top_k}) must be between 1 and recipe.num_experts ({num_experts})"
        )


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of some words.

    Raises:
        ValueError: naming key, value and the words.
    """
    if value not in choices:
        raise ValueError(f"{key} ({value}) must be {' or '.join(choices)}")
