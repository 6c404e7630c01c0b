"""Checks of `_target_` nodes: the target exists, takes these keys, and values have its types."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from configs.errors import did_you_mean

HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def slots(node: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Full key and content of every `_target_` node at or below a node of plain dicts."""
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        yield key, node
    for name, child in node.items():
        yield from slots(child, f"{key}.{name}" if key else str(name))


def slot_problems(key: str, node: dict[str, Any]) -> list[str]:
    """What is wrong with a `_target_` node, one line per problem; empty if nothing is.

    A missing argument is one only without `_partial_`: the trainer gives the rest.
    """
    path = node["_target_"]
    try:
        target = _locate(path)
        signature = inspect.signature(target)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        return [f"{key}._target_ ({path}) cannot be used: {error}"]
    given = {name: value for name, value in node.items() if name not in HYDRA_KEYS}
    known = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    problems = []
    for name in given.keys() - known.keys() if not takes_any else ():
        problems.append(f"{key}.{name}: {path} has no such argument; {did_you_mean(name, known)}")
    if not node.get("_partial_"):
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in given:
                problems.append(f"{key}.{name} is missing: {path} needs it")
    annotations = _annotations(target)
    for name in given.keys() & annotations.keys():
        allowed = _simple_types(annotations[name])
        if allowed and not _is_one_of(given[name], allowed):
            wanted = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
            problems.append(f"{key}.{name} ({given[name]!r}) must be {wanted}")
    return sorted(problems)


def _locate(path: str) -> Any:
    """The object at a dotted path; a module on the way that cannot be imported says why itself."""
    names = path.split(".")
    found: Any = importlib.import_module(names[0])
    for depth, name in enumerate(names[1:], start=2):
        if not hasattr(found, name):
            if not hasattr(found, "__path__"):
                raise AttributeError(f"{'.'.join(names[: depth - 1])} has no {name}")
            importlib.import_module(".".join(names[:depth]))
        found = getattr(found, name)
    return found


def _annotations(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _simple_types(annotation: Any) -> tuple[type, ...]:
    """The members of a union of plain scalar types; empty if anything else is allowed too."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
    else:
        members = (annotation,)
    scalars = (bool, int, float, str, type(None))
    return members if all(member in scalars for member in members) else ()


def _is_one_of(value: Any, allowed: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, allowed) or (isinstance(value, int) and float in allowed)
