"""Tokenizers: exact round trips, the same ids in plain transformers, bytes of every token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.trainer.data_corpus import prose
from trainer.data.tokenizers import (
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    TrainedBPE,
    check_vocabulary,
)

TEXTS = [
    "plain words, and  two spaces ' s .",
    "\u00e9t\u00e9 \u65e5\u672c\u8a9e \U0001f600 \x00\x7f\r\n\t",
    "<|endoftext|> spelled out",
    "".join(map(chr, range(0x300))),
    " ",
]
CORPUS = [prose(number, 60) for number in range(50)]


def trained(folder: Path, vocab_size: int = 280) -> HFTokenizer:
    TrainedBPE(vocab_size).train(CORPUS, folder)
    return HFTokenizer(str(folder))


def bytes_of(tokenizer: Tokenizer, ids: np.ndarray) -> bytes:
    return b"".join(tokenizer.token_bytes[i] for i in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_and_back(text: str, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id]) == text
    assert bytes_of(tokenizer, ids) == text.encode()


def test_bytes_as_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    ByteTokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == ByteTokenizer.vocab_size == 257
    assert loaded.eos_token_id == ByteTokenizer.eos_id
    for text in TEXTS:
        ids = loaded(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == ByteTokenizer().encode(text).tolist()
        assert loaded.decode(ids) == text
    through = HFTokenizer(str(tmp_path))
    assert through.token_bytes == ByteTokenizer.token_bytes


def test_trained_bpe(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path)
    assert tokenizer.vocab_size == 280
    assert len(set(tokenizer.token_bytes)) == 280
    for text in [*TEXTS, *CORPUS]:
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids.tolist()) == text
        assert bytes_of(tokenizer, ids) == text.encode()
    assert sum(map(len, tokenizer.encode_batch(CORPUS))) < 0.9 * sum(
        len(text.encode()) for text in CORPUS
    )


def test_bpe_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert first.fingerprint() == second.fingerprint()
    assert trained(tmp_path / "c", 279).fingerprint() != first.fingerprint()


def test_saving_keeps_ids(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "b")
    again = HFTokenizer(str(tmp_path / "b"))
    for text in TEXTS:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_bytes_of_a_vocabulary_with_byte_fallback(tmp_path: Path) -> None:
    """The spelling of sentencepiece: "\\u2581" for a space, <0xNN> for what is unknown."""
    plain = RawTokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    plain.train_from_iterator(["the cat sat on the mat"] * 9, trainers.BpeTrainer(vocab_size=40))
    learned = json.loads(plain.to_str())["model"]
    pieces = ["<unk>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *learned["vocab"]]
    raw = RawTokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in learned["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_tokens([AddedToken("MAT", special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path))
    assert tokenizer.token_bytes[tokenizer.eos_id] == b""
    text = "the cat \u00e9 MAT"
    ids = tokenizer.encode(text)
    assert len(ids) < len(text)
    assert bytes_of(tokenizer, ids) == text.encode()


def test_no_end_of_text(tmp_path: Path) -> None:
    raw = RawTokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-text token"):
        HFTokenizer(str(tmp_path))


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.tokenizer\.path \(.*\) must be a tokenizer folder"
    ):
        HFTokenizer(str(tmp_path))


def test_bpe_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(256\) must be >= 257"):
        TrainedBPE(256)
    with pytest.raises(ValueError, match=r"vocab_size \(900\) must be <= \d+: the training text"):
        TrainedBPE(900).train(["ab"], tmp_path)


def test_vocabulary_mismatch() -> None:
    check_vocabulary(ByteTokenizer(), 257)
    check_vocabulary(ByteTokenizer(), 320)
    message = r"has 257 ids but the model's vocab_size is 256; set model\.overrides\.vocab_size=257"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(ByteTokenizer(), 256)
