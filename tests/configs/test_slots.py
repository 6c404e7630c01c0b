"""`_target_` nodes: every file fits its target, and a wrong argument is named."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from configs.describe import FOLDER
from configs.slots import slot_problems, slots

FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("**/*.yaml"))


def file_slots(name: str) -> list[tuple[str, dict[str, Any]]]:
    content = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return list(slots(content, name.removesuffix(".yaml").replace("/", ".")))


@pytest.mark.parametrize("name", [name for name in FILES if file_slots(name)])
def test_every_file_fits_its_targets(name: str) -> None:
    """Keys of the file bind to the signature; `???` and `${...}` stand for values to come."""
    for key, node in file_slots(name):
        given = {k: v for k, v in node.items() if not _unresolved(v)}
        unresolved = [f"{key}.{k} is missing" for k in node.keys() - given.keys()]
        problems = slot_problems(key, {**given})
        assert not [p for p in problems if not p.startswith(tuple(unresolved))]
        names = slot_problems(key, dict.fromkeys(node, 0) | {"_target_": node["_target_"]})
        assert not [p for p in names if "no such argument" in p]


def _unresolved(value: Any) -> bool:
    return isinstance(value, str) and ("${" in value or value == "???")


def test_every_slot_group_has_targets() -> None:
    for group in ("engine", "planner", "placement", "logger", "data"):
        for name in FILES:
            if name.startswith(f"{group}/"):
                assert file_slots(name), f"configs/{name} has no _target_"


class Example:
    """A target with arguments of every kind."""

    def __init__(self, path: str, rate: float = 1.0, steps: int | None = None) -> None: ...

    @classmethod
    def load(cls, items: list[int], flag: bool = False) -> None: ...


def problems(target: str = "Example", **given: Any) -> list[str]:
    return slot_problems("slot", {"_target_": f"tests.configs.test_slots.{target}", **given})


def test_fitting_arguments() -> None:
    assert problems(path="x") == []
    assert problems(path="x", rate=2, steps=None) == []
    assert problems(_partial_=True) == []
    assert problems("Example.load", items="anything, its type is not plain", flag=True) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "slot.path is missing: tests.configs.test_slots.Example needs it"),
        ({"path": 3}, "slot.path (3) must be str"),
        ({"path": "x", "rat": 1}, "no such argument; did you mean rate?"),
        ({"path": "x", "zzz": 1}, "no such argument; known: path, rate, steps"),
        ({"path": "x", "rate": "fast"}, "slot.rate ('fast') must be float"),
        ({"path": "x", "steps": True}, "slot.steps (True) must be int or null"),
        ({"path": "x", "steps": 1.5}, "slot.steps (1.5) must be int or null"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], expected: str) -> None:
    (problem,) = problems(**given)
    assert expected in problem


def test_targets_that_cannot_be_imported() -> None:
    assert "No module named 'nowhere'" in slot_problems("slot", {"_target_": "nowhere.X"})[0]
    assert problems("Nothing") == [
        "slot._target_ (tests.configs.test_slots.Nothing) cannot be used: "
        "tests.configs.test_slots has no Nothing"
    ]


def test_slots_are_found_at_any_depth() -> None:
    inner = {"_target_": "a.B"}
    outer = {"_target_": "c.D", "x": inner}
    assert list(slots({"data": {"sources": {"one": outer}}, "seed": 0})) == [
        ("data.sources.one", outer),
        ("data.sources.one.x", inner),
    ]
