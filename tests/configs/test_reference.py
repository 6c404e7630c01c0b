"""The help text and the reference page say what the schema and the groups say."""

from __future__ import annotations

from configs.describe import choices, fields, help_node, help_text
from configs.reference import PATH, markdown


def test_the_page_is_up_to_date() -> None:
    assert PATH.read_text(encoding="utf-8") == markdown(), "run python -m configs.reference"


def test_every_choice_says_what_it_is() -> None:
    for choice in choices():
        assert choice.text, f"configs/{choice.group}/{choice.name}.yaml: no comment at the top"


def test_every_group_but_the_experiments_has_one_default() -> None:
    groups = {choice.group for choice in choices()} - {"experiment"}
    defaults = [choice.group for choice in choices() if choice.is_default]
    assert sorted(defaults) == sorted(groups)


def test_help_teaches() -> None:
    text = help_text()
    for choice in choices():
        assert f"{choice.name:<13} {choice.text}" in text
    for field in fields():
        assert f"  {field.key}  (" in text
    assert text.count("torchrun") >= 4
    assert "$" not in help_node()["template"]


def test_units_and_bounds_are_shown() -> None:
    by_key = {field.key: field for field in fields()}
    assert by_key["train.steps"].bounds == ">= 1"
    assert by_key["train.steps"].default == "required"
    assert by_key["train.precision"].type == "fp32 | bf16"
    assert by_key["mesh.ep"].type == "int | null"
    assert by_key["optim.lr"].default == "set by the group optim"
    assert "Gbit/s" in by_key["cluster.intra_gbps"].text
