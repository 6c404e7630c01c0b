"""One clear message for what Hydra and OmegaConf refuse: the full key, the value, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from configs.describe import ROOTS, choices, fields
from configs.schema import Config
from configs.secrets import masked, masked_text

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException)


def explain(error: BaseException, schema: type = Config) -> str:
    """The message for an error of composition; other errors keep their own words.

    Args:
        schema: that the configuration was composed into.
    """
    for link in _chain(error):
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            return _unknown_choice(str(link.missing_cfg_file))
        if isinstance(link, OverrideParseException):
            return (
                f"{masked_text(str(link.override))}: cannot be read; write KEY=VALUE or "
                f"GROUP=CHOICE, and put a value with special characters in quotes: KEY='\"VALUE\"'"
            )
        if isinstance(link, (ConfigAttributeError, ConfigKeyError)) and link.full_key:
            return _unknown_key(link)
        if isinstance(link, ValidationError) and link.full_key:
            return _wrong_value(link, schema)
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            return f"{link.full_key}: {str(link).splitlines()[0]}"
    return str(error)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A remedy for an unknown name: the closest known one, else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known) or 'none'}"


def _chain(error: BaseException) -> Iterable[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _unknown_choice(file: str) -> str:
    group, _, name = file.rpartition("/")
    known = [c.name for root in ROOTS for c in choices(root) if c.group == group]
    hint = did_you_mean(name, known)
    return f"{group}={name}: no such choice; {hint} {group} has {', '.join(known)}"


def _unknown_key(error: OmegaConfBaseException) -> str:
    key = str(error.full_key)
    section, _, name = key.rpartition(".")
    parent = error.parent_node
    known = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
    if not section:
        known = sorted({*known, *(choice.group for choice in choices())})
    hint = did_you_mean(name, known, f"{section}." if section else "")
    message = f"{key}: no such key; {hint}"
    if section and error.object_type_str == "dict":
        return f"{message}; a new key needs a + before it: +{key}=..."
    return message


def _wrong_value(error: ValidationError, schema: type) -> str:
    key = str(error.full_key)
    value = {None: "null", "": "''"}.get(error.value, masked(error.value, key.rpartition(".")[2]))
    types = {field.key: field.type for field in fields(schema)}
    wanted = types.get(key.partition("[")[0])
    if wanted is not None:
        return f"{key} ({value}) must be {' or '.join(_words(wanted.split(' | ')))}"
    inside = [name for name in types if name.startswith(f"{key}.")]
    if inside:
        return f"{key} ({value}) is a section; set its values, such as {inside[0]}=..."
    return f"{key} ({value}): {str(error).splitlines()[0]}"


def _words(types: list[str]) -> list[str]:
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
    return [words.get(name, name) for name in types]
