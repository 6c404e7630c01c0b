"""Code that comes with a model or a tokenizer (`auto_map`) is never run."""

from __future__ import annotations


def why_not_read(error: Exception) -> str:
    """What transformers says, or the remedy where it would have run the folder's own code."""
    if "trust_remote_code" not in str(error):
        return str(error)
    return (
        "it needs Python code of its own (auto_map), which is never run. Families and tokenizers "
        "that transformers has need none: a newer transformers may have this one; else convert "
        "the folder to one that it has"
    )
