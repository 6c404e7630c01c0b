"""The standard library as a corpus."""

from __future__ import annotations

import ast
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.trainer.data_corpus import documents
from trainer.data.files import FileDigests
from trainer.data.sources import Reading
from trainer.data.stdlib import Stdlib, split_docstrings, water_fill


@pytest.fixture(scope="module")
def stdlib() -> Stdlib:
    return Stdlib()


def test_domains_and_limit(stdlib: Stdlib) -> None:
    start = time.process_time()
    reading = Reading(num_bytes=6_000_000)
    train, validation = (documents(stdlib, s, reading) for s in ("train", "validation"))
    assert time.process_time() - start < 20
    sizes: Counter[str] = Counter()
    for document in train + validation:
        sizes[document.domain.split("/")[0]] += len((document.text or "").encode())
    assert 5_500_000 < sizes.total() <= 6_000_000
    assert set(sizes) == {"code", "prose", "tables"}
    assert min(sizes.values()) > 1_500_000
    kinds = [{d.domain.split("/")[0] for d in split} for split in (train, validation)]
    assert kinds == [set(sizes)] * 2
    assert len({d.domain for d in train}) > 60
    ids = [d.id for d in train + validation]
    assert len(set(ids)) == len(ids)
    assert not [i for i in ids if "/test/" in i or "site-packages" in i]


def test_split_by_file(stdlib: Stdlib) -> None:
    """Code and documentation of a file are on one side, and the limit moves no file."""
    sides: dict[str, str] = {}
    for split in ("train", "validation"):
        for document in documents(stdlib, split):
            if not document.domain.startswith(("tables", "prose/topics")):
                file = document.id.removesuffix("#documentation")
                assert sides.setdefault(file, split) == split
        for document in documents(stdlib, split, Reading(num_bytes=1_000_000)):
            assert sides.get(document.id.removesuffix("#documentation"), split) == split
    assert 0.02 < list(sides.values()).count("validation") / len(sides) < 0.09


def test_two_readings_are_equal(stdlib: Stdlib) -> None:
    package, reading = str(stdlib.folder / "json"), Reading(num_bytes=500_000)
    first, second = (documents(Stdlib(package), "train", reading) for _ in range(2))
    assert first == second
    assert {d.domain.split("/")[0] for d in first} == {"code", "prose", "tables"}


def test_docstrings_are_cut_out() -> None:
    code = '''"""Module
text."""
X = """not
a docstring"""
# \x0c \u2028 no line break of Python
class A:
    "One line."
    def f(self):
        \'\'\'Of f.

            more\'\'\'
        return """\nstays\n"""
def g(): "stays, shares its line"
'''
    left, prose = split_docstrings(code, "m")
    want = 'X = """not\na docstring"""\n# \x0c \u2028 no line break of Python\nclass A:\n'
    want += '    def f(self):\n        return """\nstays\n"""\n'
    assert left == want + 'def g(): "stays, shares its line"\n'
    assert prose == "m\n\nModule\ntext.\n\nm.A\n\nOne line.\n\nm.A.f\n\nOf f.\n\nmore\n"
    ast.parse(left)
    assert split_docstrings("def (:\n", "m") == ("def (:\n", "")


def test_water_fill() -> None:
    assert water_fill({"a": 10, "b": 100, "c": 100}, 90) == {"a": 10, "b": 40, "c": 40}
    assert water_fill({"a": 10, "b": 20}, 90) == {"a": 10, "b": 20}


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("x = 1\n")
    before = Stdlib(str(tmp_path)).fingerprint(FileDigests(None))
    (tmp_path / "m.py").write_text("x = 2\n")
    assert Stdlib(str(tmp_path)).fingerprint(FileDigests(None)) != before


def test_no_source_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the standard library in .* has no \.py files"):
        documents(Stdlib(str(tmp_path)), "train")
