"""What a model does on a user's text: inputs of its FFNs (and so of routers), gradients of experts.

S sequences, T tokens of one, n tokens that are no padding, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.remote_code import why_not_read

KEY = "recipe.calibration"


class Tokens(NamedTuple):
    """Sequences of ids, padded at the end: ids_ST int64, mask_ST True where no padding is."""

    ids_ST: Tensor
    mask_ST: Tensor


def text_tokens(
    checkpoint: Path, file: str | None, *, sequences: int, length: int, key: str = KEY
) -> Tokens:
    """The first tokens of a text file, by the checkpoint's own tokenizer.

    Args:
        sequences: at most. length: of one, in tokens; only the last may be shorter.
        key: of the configuration, that names the file.

    Raises:
        ValueError: without a file, for one that cannot be read or has no text, and for a
            checkpoint without tokenizer.
    """
    if not file:
        raise ValueError(f"{key} must be a text file like those that the model is for")
    for name, value in (("sequences", sequences), ("length", length)):
        if value < 1:
            raise ValueError(f"{key.partition('.')[0]}.{name} ({value}) must be >= 1")
    # a token has 4 bytes on average, and few have more than 16
    most = 16 * sequences * length
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read(most)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key} ({file}) must be a text file in UTF-8: {error}") from error
    ids = _encode(checkpoint, [text])[0][: sequences * length]
    if len(ids) < 2:
        raise ValueError(f"{key} ({file}) has {len(ids)} tokens; give a longer text")
    return _padded([ids[first : first + length] for first in range(0, len(ids), length)])


def prompt_tokens(checkpoint: Path, texts: Sequence[str], *, length: int = 512) -> Tokens:
    """One sequence per text, cut after `length` tokens, by the checkpoint's own tokenizer.

    Raises:
        ValueError: for a text without tokens, and a checkpoint without tokenizer.
    """
    rows = [ids[:length] for ids in _encode(checkpoint, texts)]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(f"the prompt {text!r} has no tokens")
    return _padded(rows)


@torch.no_grad()
def ffn_inputs(
    checkpoint: Path, tokens: Tokens, *, layers: Sequence[int] | None = None, batch_size: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """What the FFN of every layer gets, dense or MoE, behind the norm before it: (layer, x_nH).

    Batch by batch, and layer by layer in it. The model is in memory in the dtype of its files,
    beside it the inputs of one batch.

    Args:
        layers: to give; None for all. batch_size: sequences at a time.

    Returns:
        An iterator over (layer, float32 [n, H]); padding is left out.
    """
    model = load(checkpoint, tokens)
    wanted = range(len(model.model.layers)) if layers is None else layers
    found: dict[int, Tensor] = {}
    for layer in wanted:
        model.model.layers[layer].mlp.register_forward_pre_hook(partial(_note, found, layer))
    for ids, mask in zip(
        tokens.ids_ST.split(batch_size), tokens.mask_ST.split(batch_size), strict=True
    ):
        model.model(ids, attention_mask=mask, use_cache=False)
        for layer in wanted:
            yield layer, found.pop(layer)[mask].float()


def squared_gradients(checkpoint: Path, tokens: Tokens, stacks: Sequence[str]) -> dict[str, Tensor]:
    """Squared norms of the loss gradient of every expert, averaged over the sequences.

    The loss is the mean over the next tokens of one sequence. Besides the model, the gradient of
    one stack is in memory.

    Args:
        stacks: names of parameters that stack the E experts of a layer.

    Returns:
        By stack: float64 [E].

    Raises:
        ValueError: for sequences of one token.
    """
    model = load(checkpoint, tokens).requires_grad_(False)
    total = {}
    for name in stacks:
        stack = model.get_parameter(name).requires_grad_(True)
        total[name] = torch.zeros(len(stack), dtype=torch.float64)
        stack.register_post_accumulate_grad_hook(partial(_add_squares, total[name]))
    rows = [ids[mask] for ids, mask in zip(*tokens, strict=True) if mask.sum() > 1]
    if not rows:
        raise ValueError("recipe.length must be >= 2: the loss needs a next token")
    for ids in rows:
        logits = model(ids[None], use_cache=False).logits[0, :-1]
        functional.cross_entropy(logits.float(), ids[1:]).backward()
    return {name: squares / len(rows) for name, squares in total.items()}


def load(checkpoint: Path, tokens: Tokens) -> Any:
    """The whole model, in the dtype of its files, for these tokens.

    Raises:
        ValueError: for ids that the model has no embedding of.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", trust_remote_code=False, use_safetensors=True
    )
    last, vocab_size = int(tokens.ids_ST.max()), model.config.vocab_size
    if last >= vocab_size:
        raise ValueError(
            f"{checkpoint}: its tokenizer gives the id {last}, its vocab_size is {vocab_size}; the "
            f"tokenizer is another model's"
        )
    return model.eval()


def _add_squares(total_E: Tensor, stack: Tensor) -> None:
    assert stack.grad is not None
    total_E += torch.linalg.vector_norm(stack.grad.flatten(1), dim=1, dtype=torch.float64) ** 2
    stack.grad = None


def _note(found: dict[int, Tensor], layer: int, module: Any, arguments: tuple[Tensor, ...]) -> None:
    found[layer] = arguments[0]


def _encode(checkpoint: Path, texts: Sequence[str]) -> list[list[int]]:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint}: no tokenizer that can be loaded: {why_not_read(error)}"
        ) from error
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return encoded


def _padded(rows: list[list[int]]) -> Tokens:
    length = max(map(len, rows))
    ids_ST = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask_ST = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return Tokens(ids_ST, mask_ST)
