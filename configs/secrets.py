"""What looks like a secret, and never gets into a log, a saved configuration or a message.

A secret is known by the name of its value (`api_key`, `hf_token`, `password`), or by its own form
(the tokens of well-known services, and what a URL has before its host or in its query).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MASK = "***"
# TOKEN, but not of tokenizers; AUTH, but not of authors
SECRET = re.compile(
    r"KEY|TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH(?!OR(?!I))", re.IGNORECASE
)
# numbers under these names are secrets, too; num_key_value_heads and eos_token_id are none
SECRET_NUMBER = re.compile(r"API_?KEY|SECRET|PASSW|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
FORMS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),
    re.compile(r"(?<=Bearer )[^\s'\"]+"),
    re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{16,}"),
    re.compile(r"(?<=[?&])([\w-]*(?:key|token|secret|passw|sig)[\w-]*=)[^&\s'\"]+", re.IGNORECASE),
)
# key=value, and key:value in braces; a value may be quoted, a list or an interpolation
ASSIGNED = re.compile(
    r"([\w.@/-]*\w)(=|\s*:\s*)"
    r"(\$\{[^}]*\}|\[[^\]]*\]?|'[^']*'|\"[^\"]*\"|[^\s,'\"{}()\[\]]+)"
)
QUOTES = "'\""
PLAIN = {"", "true", "false", "null", "none"}


def masked(value: Any, name: str = "") -> Any:
    """A configuration, or a part of one, with *** in place of secrets.

    Args:
        value: plain dicts, lists, text and numbers.
        name: under which it stands; a dict under it has names of its own.
    """
    if isinstance(value, dict):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, name) for item in value]
    if isinstance(value, str):
        return MASK if _is_secret(name, value) else _without_forms(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return MASK if is_number and SECRET_NUMBER.search(name) else value


def masked_text(text: str) -> str:
    """Overrides (`key=value`) and other text with *** in place of secrets."""

    def hide(found: re.Match[str]) -> str:
        key, sign, value = found.groups()
        in_braces = text[: found.start()].rstrip()[-1:] in ("{", ",")
        if sign == "=" or in_braces:
            name = re.split(r"[./@]", key)[-1]
            if _is_secret(name, value.strip(QUOTES)):
                return f"{key}{sign}{MASK}"
        return f"{key}{sign}{masked_text(value) if value.startswith('[') else value}"

    text = _without_forms(text)
    return ASSIGNED.sub(hide, text)


def refuse_secrets(overrides: Sequence[str]) -> None:
    """Refuse overrides that spell a secret: whoever sees the command or its script would see it.

    Raises:
        ValueError: naming the key and the remedy, not the secret.
    """
    for override in overrides:
        shown = masked_text(override)
        if shown != override:
            key = override.partition("=")[0]
            raise ValueError(
                f"{shown}: what looks like a secret would be seen in the command and files; put it "
                f"into an environment variable and write '{key}=${{oc.env:NAME}}'"
            )


def _is_secret(name: str, text: str) -> bool:
    if text.lower() in PLAIN or text.startswith("${"):  # what ${oc.env:NAME} gives is not there
        return False
    pattern = SECRET_NUMBER if _is_number(text) else SECRET
    return pattern.search(name) is not None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _without_forms(text: str) -> str:
    for form in FORMS:
        text = form.sub(lambda found: "".join((*found.groups(), MASK)), text)
    return text
