"""Routers that begin with what the model's FFNs get on a user's text.

The dense model (of several, the first) is run whole, in the dtype of its files. Its numbers depend
in the last digits on machine and number of threads, and so do the rows.

P prompts or texts, n tokens, H hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from trainer.upcycle.calibration import Tokens, ffn_inputs, prompt_tokens, text_tokens
from trainer.upcycle.dense import DenseModel
from trainer.upcycle.layout import DenseShape, Scores
from trainer.upcycle.recipe import LayerFFN
from trainer.upcycle.routers import RouterInit, check_positive, normal, with_std

GRAM_BYTES = 2 << 30  # of the layers whose sums are in memory at a time, at most
CONDITION = 5.0  # of unit rows, above which they are nearly parallel
TIE = 1e-3  # noise that sets rows of one text apart, relative to their size


class Prompt(NamedTuple):
    """Texts that an expert is for, and texts that it is not for."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True)
class Prompts(RouterInit):
    """Mean inputs of the FFN over the tokens of prompts.

    A row is the unit mean over the positive prompts, less the unit mean over the negative ones.

    Args:
        prompts: YAML or JSON file: a list with `positive`, and if wanted `negative`, a text or a
            list of texts, per expert (per copy of parts, or one for every so many experts in
            order).
        length: tokens of a prompt that are read. std: root of the mean square of a row.
        batch_size: prompts at a time.
    """

    prompts: str | None = None
    length: int = 512
    std: float = 0.02
    batch_size: int = 8
    scores = Scores.free

    @property
    def files(self) -> list[Path]:
        return [Path(str(self.prompts))]

    def check(self, models: Sequence[DenseModel], num_rows: int) -> None:
        check_positive("router_init.std", self.std)
        check_positive("router_init.length", self.length)
        check_positive("router_init.batch_size", self.batch_size)
        prompts = read_prompts(self.prompts)
        check_divides("router_init.prompts", len(prompts), num_rows)
        self._means(models)

    def advice(self, models: Sequence[DenseModel], num_rows: int) -> Iterator[str]:
        values = [torch.linalg.svdvals(F.normalize(rows, dim=1)) for rows in self._means(models)]
        conditions = [float(value[0] / value[-1]) for value in values]
        worst = max(range(len(values)), key=conditions.__getitem__)
        if conditions[worst] > CONDITION:
            yield (
                f"router rows are nearly parallel (condition number {conditions[worst]:.3g} in "
                f"layer {worst}, {CONDITION:g} is much): tokens score alike for all experts; make "
                f"the prompts differ more or give negative ones"
            )

    def rows(self, ffn: LayerFFN, num_rows: int) -> Tensor:
        return repeated(with_std(self._means(ffn.models)[ffn.layer], self.std), ffn, num_rows)

    def _means(self, models: Sequence[DenseModel]) -> list[Tensor]:
        prompts = tuple(read_prompts(self.prompts))
        return prompt_rows(models[0].checkpoint.path, prompts, self.length, self.batch_size)


@dataclass(frozen=True)
class Ridge(RouterInit):
    """Ridge regression of whose text a token is of on the inputs of the FFN.

    Scores begin as `scale` times the prediction, which is about 1 for the own text and 0 for
    others. X^T X of several layers is in memory, 8 H^2 bytes each; the model is run once for as
    many layers as fit into 2 GiB.

    Args:
        texts: a text file per expert (per copy of parts, or one for every so many experts in
            order).
        sequences: of a text that are read. length: of one, in tokens.
        ridge: added to the diagonal of X^T X. scale: see above.
    """

    texts: Any = None
    sequences: int = 32
    length: int = 512
    ridge: float = 1.0
    scale: float = 4.0
    scores = Scores.free

    @property
    def files(self) -> list[Path]:
        return [Path(file) for file in self._texts]

    def check(self, models: Sequence[DenseModel], num_rows: int) -> None:
        check_positive("router_init.ridge", self.ridge)
        check_positive("router_init.scale", self.scale)
        if len(self._texts) < 2:
            raise ValueError(
                f"router_init.texts ({self.texts}) must be at least 2 text files, [a.txt,b.txt]"
            )
        check_divides("router_init.texts", len(self._texts), num_rows)
        domain_tokens(models[0].checkpoint.path, self._texts, self.sequences, self.length)

    def rows(self, ffn: LayerFFN, num_rows: int) -> Tensor:
        model = ffn.models[0]
        settings = self.sequences, self.length, model.shape, self.ridge
        found = ridge_rows(model.checkpoint.path, self._texts, *settings)
        return repeated(self.scale * found[ffn.layer], ffn, num_rows)

    @property
    def _texts(self) -> tuple[str, ...]:
        return (self.texts,) if isinstance(self.texts, str) else tuple(self.texts or ())


def read_prompts(file: str | None) -> list[Prompt]:
    """The prompts of a file.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    wanted = "a list of {positive: [TEXT, ...], negative: [TEXT, ...]}, one per expert"
    if not file:
        raise ValueError(f"router_init.prompts must be a YAML or JSON file with {wanted}")
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"router_init.prompts ({file}) cannot be read: {error}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"router_init.prompts ({file}) must be {wanted}")
    prompts = []
    for number, entry in enumerate(content):
        known = isinstance(entry, dict) and entry.keys() <= {"positive", "negative"}
        texts = [_texts_of(entry.get(key)) if known else None for key in ("positive", "negative")]
        if not texts[0] or texts[1] is None:
            raise ValueError(
                f"router_init.prompts ({file}): entry {number} is {entry!r}, not {wanted}"
            )
        if sorted(texts[0]) == sorted(texts[1]):
            raise ValueError(
                f"router_init.prompts ({file}): entry {number} has the same positive and negative "
                f"texts"
            )
        prompts.append(Prompt(texts[0], texts[1]))
    return prompts


def _texts_of(value: Any) -> tuple[str, ...] | None:
    texts = [value] if isinstance(value, str) else value or []
    is_good = isinstance(texts, list) and all(isinstance(t, str) and t for t in texts)
    return tuple(texts) if is_good else None


@lru_cache(maxsize=1)
def prompt_rows(
    checkpoint: Path, prompts: tuple[Prompt, ...], length: int, batch_size: int
) -> list[Tensor]:
    """Rows of all layers, float32 [P, H] each. Those of the last call are kept."""
    sides = [(number, side) for number in range(len(prompts)) for side in (0, 1)]
    owners = [(number, side) for number, side in sides for _ in prompts[number][side]]
    texts = [text for number, side in sides for text in prompts[number][side]]
    tokens = prompt_tokens(checkpoint, texts, length=length)
    total: dict[tuple[int, int, int], Tensor] = {}
    num_layers = 0
    for layer, sequence, x_nH in by_sequence(checkpoint, tokens, batch_size=batch_size):
        key = (layer, *owners[sequence])
        total[key] = total.get(key, 0) + x_nH.double().sum(0)  # its direction is the mean's
        num_layers = max(num_layers, layer + 1)
    rows = []
    for layer in range(num_layers):
        units = {key[1:]: F.normalize(x_H, dim=0) for key, x_H in total.items() if key[0] == layer}
        rows.append(torch.stack([units[p, 0] - units.get((p, 1), 0) for p in range(len(prompts))]))
    return [rows_PH.float() for rows_PH in rows]


def by_sequence(
    checkpoint: Path, tokens: Tokens, *, layers: Sequence[int] | None = None, batch_size: int = 1
) -> Iterator[tuple[int, int, Tensor]]:
    """Inputs of the FFNs: (layer, number of the sequence, x_nH of its tokens)."""
    numbers = torch.arange(len(tokens.ids_ST)).split(batch_size)
    batch_of: Counter[int] = Counter()
    for layer, x_nH in ffn_inputs(checkpoint, tokens, layers=layers, batch_size=batch_size):
        batch = numbers[batch_of[layer]]
        batch_of[layer] += 1
        lengths = tokens.mask_ST[batch].sum(1).tolist()
        for sequence, own_nH in zip(batch.tolist(), x_nH.split(lengths), strict=True):
            yield layer, sequence, own_nH


class Sums:
    """X^T X and X^T Y of a layer, to which tokens are added as they come.

    Args:
        hidden: H. domains: texts, of which each token is of one.
    """

    def __init__(self, hidden: int, domains: int) -> None:
        self.xx_HH = torch.zeros(hidden, hidden, dtype=torch.float64)
        self.xy_HP = torch.zeros(hidden, domains, dtype=torch.float64)

    def add(self, x_nH: Tensor, domain: int) -> None:
        """Tokens of one text."""
        x_nH = x_nH.double()
        self.xx_HH.addmm_(x_nH.T, x_nH)
        self.xy_HP[:, domain] += x_nH.sum(0)

    def solve(self, ridge: float) -> Tensor:
        """(X^T X + ridge I)^-1 X^T Y, transposed: float32 [P, H]. Uses X^T X up."""
        self.xx_HH.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(self.xx_HH)
        return torch.cholesky_solve(self.xy_HP, factor).T.float()


def domain_tokens(
    checkpoint: Path, texts: tuple[str, ...], sequences: int, length: int
) -> list[Tokens]:
    """The first sequences of every text."""
    return [
        text_tokens(checkpoint, file, sequences=sequences, length=length, key="router_init.texts")
        for file in texts
    ]


@lru_cache(maxsize=1)
def ridge_rows(
    checkpoint: Path,
    texts: tuple[str, ...],
    sequences: int,
    length: int,
    shape: DenseShape,
    ridge: float,
) -> list[Tensor]:
    """Rows of all layers, float32 [P, H] each. Those of the last call are kept."""
    tokens = domain_tokens(checkpoint, texts, sequences, length)
    together = max(1, GRAM_BYTES // (8 * shape.hidden**2))
    rows = []
    for first in range(0, shape.num_layers, together):
        layers = range(first, min(first + together, shape.num_layers))
        sums = {layer: Sums(shape.hidden, len(texts)) for layer in layers}
        for domain, own in enumerate(tokens):
            for layer, x_nH in ffn_inputs(checkpoint, own, layers=layers):
                sums[layer].add(x_nH, domain)
        rows += [sums.pop(layer).solve(ridge) for layer in layers]
    return rows


def check_divides(key: str, number: int, num_rows: int) -> None:
    """Refuse a number of texts that cannot be shared out over the rows.

    Raises:
        ValueError: naming both.
    """
    if num_rows % number:
        raise ValueError(
            f"{key} has {number} entries, which must divide the number of router rows "
            f"({num_rows}): one per expert, or one for every so many in order"
        )


def repeated(rows_PH: Tensor, ffn: LayerFFN, num_rows: int) -> Tensor:
    """Every row as often as there are experts for it; noise sets those apart."""
    times = num_rows // len(rows_PH)
    if times == 1:
        return rows_PH
    rows = rows_PH.repeat_interleave(times, 0)
    return rows + normal(ffn, num_rows, TIE) * rows.square().mean(1, keepdim=True).sqrt()
