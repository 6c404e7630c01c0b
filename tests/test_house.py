"""House rules that a machine can check: layout, file length, directions of imports, the README."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["placement", "parallel", "configs", "trainer", "launch"]
# what each package may import of the others: arrows go one way
MAY_IMPORT: dict[str, set[str]] = {
    "placement": set(),
    "parallel": {"placement"},
    "configs": set(),
    "trainer": {"placement", "parallel", "configs"},
    "launch": {"placement", "parallel", "configs", "trainer"},
}
MAY_COMPOSE = "placement/sweep/*.py"  # an entry, like trainer/train.py
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_look_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert len(path.read_text().splitlines()) <= 400
    foreign = imports(path) & (set(PACKAGES) | {"tests"}) - {package}
    entry = {"configs"} if path in ROOT.glob(MAY_COMPOSE) else set()
    assert foreign <= MAY_IMPORT[package] | entry


def test_tests_are_short_too() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_placement_needs_no_process_group() -> None:
    for path in (ROOT / "placement").glob("*.py"):
        assert "torch.distributed" not in path.read_text()


def test_packages_are_the_ones_of_this_checkout() -> None:
    import configs
    import launch
    import parallel
    import placement
    import trainer

    for package in (configs, launch, parallel, placement, trainer):
        assert Path(str(package.__file__)).is_relative_to(ROOT)


def test_every_claim_of_the_readme_names_a_test() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.partition("## What works")[2].partition("## Where things are")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 10
    for row in rows:
        paths = re.findall(r"`(tests/[^`]+)`", row)
        assert paths, row
        for path in paths:
            assert (ROOT / path).exists(), path


def test_every_command_of_the_readme_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    from configs.compose import load
    from configs.schema import check

    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if " -m trainer.train " in line]
    found = 0
    for line in commands:
        overrides = line.partition(" -m trainer.train ")[2].replace("'", "").split()
        if "--help" in line or "`" in line:
            continue
        ranks = re.search(r"--nproc-per-node (\d+)", line)
        world = int(ranks[1]) if ranks else 8
        monkeypatch.setenv("WORLD_SIZE", str(world))
        check(load(*overrides), world)
        found += 1
    assert found >= 2


def test_every_conversion_of_the_readme_composes() -> None:
    from configs.compose import load_upcycle
    from configs.upcycle_schema import check_upcycle

    command = " -m trainer.upcycle "
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if command in line]
    assert lines
    for line in lines:
        check_upcycle(load_upcycle(*line.partition(command)[2].split()))
