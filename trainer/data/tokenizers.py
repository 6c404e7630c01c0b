"""Tokenizers: text to ids and back, with the bytes that every id stands for.

The bytes per id make bits per byte exact: nats of the predicted tokens / ln 2 / their bytes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer.remote_code import why_not_read

END_OF_DOCUMENT = "<|endoftext|>"
NUM_BYTES = 256


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, those of control tokens included."""
        ...

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        ...

    @property
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each id stands for; empty for control tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Ids of each text. Text that spells a control token is encoded as text."""
        ...

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text, without control tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face tokenizer directory that gives the same ids."""
        ...

    def fingerprint(self) -> str:
        """Digest of everything that decides ids."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    vocab_size = NUM_BYTES + 1
    eos_id = NUM_BYTES
    token_bytes = [bytes([value]) for value in range(NUM_BYTES)] + [b""]

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < NUM_BYTES).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return "bytes"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face tokenizer directory that gives the same ids.

        There, text that spells `<|endoftext|>` becomes id 256 unless `split_special_tokens=True`.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(vocab=_byte_of_character(), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        _save_fast(tokenizer, folder)


class HFTokenizer:
    """Any tokenizer of the `transformers` library.

    Args:
        path: local folder or hub id.

    Raises:
        ValueError: if it cannot be loaded or has no end-of-text token.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"data.tokenizer.path ({path}) must be a tokenizer folder or hub id: "
                f"{why_not_read(error)}"
            ) from error
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {path} has no end-of-text token, which documents must end with; "
                f"set eos_token in its tokenizer_config.json"
            )
        self.vocab_size = len(self.tokenizer)
        self.eos_id = int(self.tokenizer.eos_token_id)
        self.token_bytes = _bytes_of_ids(self.tokenizer)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def fingerprint(self) -> str:
        """Digest of the files of the saved tokenizer."""
        digest = hashlib.blake2b(digest_size=16)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*")):
                digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        self.tokenizer.save_pretrained(str(folder))


class TrainedBPE:
    """A byte-level BPE tokenizer that is trained on the training split and kept in the cache.

    Args:
        vocab_size: number of ids: 256 bytes, the end of a document, and merges.
    """

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < NUM_BYTES + 1:
            raise ValueError(
                f"data.tokenizer.vocab_size ({vocab_size}) must be >= {NUM_BYTES + 1}: every byte, "
                f"and the end of a document"
            )
        self.vocab_size = vocab_size

    def train(self, texts: Iterable[str], folder: Path) -> None:
        """Train on texts and write a Hugging Face tokenizer directory.

        Raises:
            ValueError: if the texts have too few different pairs for that many ids.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size - 1,
            initial_alphabet=sorted(_byte_of_character()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        found = tokenizer.get_vocab_size() + 1
        if found < self.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size ({self.vocab_size}) must be <= {found}: the training "
                f"text has no more pairs to merge"
            )
        _save_fast(tokenizer, folder)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuse a model whose vocabulary is too small for the ids of a tokenizer.

    A larger one is fine: many models pad theirs.

    Raises:
        ValueError: naming both sizes.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocab_size is "
            f"{model_vocab_size}; set model.overrides.vocab_size={tokenizer.vocab_size} or more "
            f"(fresh weights), or data/tokenizer=hf to use the model's own tokenizer"
        )


def _save_fast(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a tokenizer of the `tokenizers` library with `<|endoftext|>` as its last id."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_DOCUMENT,
        pad_token=END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Bytes that print in Latin-1 stand for themselves, the others for U+0100 and up, in order.
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(NUM_BYTES) if value not in prints]
    characters = {chr(value): value for value in prints}
    return characters | {chr(NUM_BYTES + n): value for n, value in enumerate(others)}


def _bytes_of_ids(tokenizer: Any) -> list[bytes]:
    """Bytes of every id of a Hugging Face tokenizer, from the spelling of its vocabulary.

    Knows byte-level vocabularies, `<0xNN>` bytes, and "\\u2581" for a space.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and '"ByteLevel"' in backend.to_str()
    byte_of, special = _byte_of_character(), set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    result = []
    for number, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if number in special or piece is None or (number in added and added[number].special):
            result.append(b"")
        elif number in added:
            result.append(piece.encode())
        elif byte_level and all(character in byte_of for character in piece):
            result.append(bytes(byte_of[character] for character in piece))
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            result.append(bytes([int(piece[3:5], 16)]))
        else:
            result.append(piece.replace("\u2581", " ").encode("utf-8", "surrogatepass"))
    return result
