"""Text that every machine has: the running interpreter's own standard library.

Three kinds of text with domains of their own: code by top-level package (its documentation cut
out, so that nothing is read twice), prose (that documentation, pydoc's help topics, licence and
README files), and tables (Unicode, character encodings, HTML entities, lists of names). Split by
file; generated tables by block.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import html.entities
import http
import inspect
import keyword
import mimetypes
import opcode
import os
import re
import sys
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.data.files import FileDigests, decode_utf8, read_bytes
from trainer.data.sources import Document, Reading, Split

SKIPPED_FOLDERS = re.compile(
    r"(tests?|idle_test|site-packages|dist-packages|__pycache__|config-.*)$"
)
SKIPPED_FILES = re.compile(r"_sysconfigdata")
MAX_FILE_BYTES = 300_000
MIN_PROSE_CHARACTERS = 200
TOPICS = "pydoc_data/topics.py"
PROSE_NAMES = ("README", "LICENSE")
CODE_POINTS_PER_BLOCK = 512
ENTITIES_PER_BLOCK = 256
Keyed = tuple[str, Document]


class Stdlib:
    """The standard library of the running interpreter, in domains of code, prose and tables.

    `data.num_bytes` takes equal parts of code, prose and tables; what a small one leaves goes to
    the others. A document is in the same split whatever the limit.

    Args:
        folder: read this folder instead of the interpreter's own (the generated tables stay).
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder or sysconfig.get_paths()["stdlib"])
        self._read: dict[str, list[Keyed]] = {}

    def fingerprint(self, digests: FileDigests) -> Any:
        files = [[self._name(path), digests.of(path)] for path in self._files()]
        return [type(self).__name__, sys.version, files]

    def documents(self, split: Split, reading: Reading) -> Iterator[Document]:
        policy = reading.invalid_utf8
        if policy not in self._read:
            self._read[policy] = self._everything(policy)
        chosen = self._read[policy]
        if reading.num_bytes is not None:
            chosen = fair_share(chosen, reading.num_bytes)
        return (document for key, document in chosen if reading.split_of(key) == split)

    def _everything(self, invalid_utf8: str) -> list[Keyed]:
        """Every document with the key of its split, ordered by domain and file."""
        documents = [*_tables()]
        for path in self._files():
            name = self._name(path)
            text, invalid = decode_utf8(read_bytes(path), str(path), invalid_utf8)
            if name == TOPICS:
                documents += _topics(text)
            elif path.suffix != ".py":
                documents.append((name, Document(name, "prose/files", text, invalid=invalid)))
            else:
                documents += _module(name, text, invalid)
        return sorted(documents, key=lambda pair: (pair[1].domain, pair[1].id))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _files(self) -> list[Path]:
        """Files to read, in an order that is the same on every machine.

        Raises:
            ValueError: if there are none.
        """
        found = []
        for folder, inner, names in os.walk(self.folder):
            inner[:] = [name for name in inner if not SKIPPED_FOLDERS.match(name)]
            for name in names:
                path = Path(folder, name)
                wanted = path.suffix == ".py" or name.startswith(PROSE_NAMES)
                if not wanted or SKIPPED_FILES.match(name) or not path.is_file():
                    continue
                if path.stat().st_size <= MAX_FILE_BYTES or self._name(path) == TOPICS:
                    found.append(path)
        if not any(path.suffix == ".py" for path in found):
            raise ValueError(
                f"the standard library in {self.folder} has no .py files; use another interpreter, "
                f"or another source such as data=text"
            )
        return sorted(found, key=self._name)


def fair_share(documents: list[Keyed], num_bytes: int) -> list[Keyed]:
    """At most `num_bytes` of documents, in their order, with equal parts of code, prose and tables.

    Of each kind, documents are taken whole, in the order of a hash, as long as they fit.
    """
    sizes: Counter[str] = Counter()
    for _, document in documents:
        sizes[_kind(document)] += _size(document)
    left = water_fill(sizes, num_bytes)
    taken = set()
    for _, document in sorted(
        documents, key=lambda pair: hashlib.md5(pair[1].id.encode()).digest()
    ):
        if _size(document) <= left[_kind(document)]:
            left[_kind(document)] -= _size(document)
            taken.add(document.id)
    return [pair for pair in documents if pair[1].id in taken]


def water_fill(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Equal parts of a budget, none larger than its size; what is left over goes to the others."""
    parts: dict[str, int] = {}
    for number, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        parts[name] = min(sizes[name], (budget - sum(parts.values())) // (len(sizes) - number))
    return parts


def _kind(document: Document) -> str:
    return document.domain.split("/")[0]


def _size(document: Document) -> int:
    assert document.text is not None
    return len(document.text.encode())


def _module(name: str, text: str, invalid: int) -> Iterator[Keyed]:
    """The code of a file without its documentation, and the documentation."""
    if name.startswith("encodings/") and "decoding_table" in text:
        yield name, Document(name, "tables/encodings", text, invalid=invalid)
        return
    package = name.split("/")[0].removesuffix(".py")
    code, prose = split_docstrings(text, name.removesuffix(".py").replace("/", "."))
    if code.strip():
        yield name, Document(name, f"code/{package}", code, invalid=invalid)
    if len(prose) >= MIN_PROSE_CHARACTERS:
        yield name, Document(f"{name}#documentation", "prose/docstrings", prose)


def split_docstrings(text: str, module: str) -> tuple[str, str]:
    """Code without the lines of its docstrings, and the docstrings under the names they explain."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # templates and other Python versions' code stay as they are
        return text, ""
    lines = text.split("\n")
    prose: list[tuple[int, str]] = []
    cut: set[int] = set()

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{name}.{child.name}")
        first = next(iter(getattr(node, "body", [])), None)
        if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
            return
        last_line = first.end_lineno or first.lineno
        begins_line = not lines[first.lineno - 1][: first.col_offset].strip()
        ends_line = lines[last_line - 1].rstrip().endswith(('"', "'"))
        if isinstance(first.value.value, str) and begins_line and ends_line:
            prose.append((first.lineno, f"{name}\n\n{inspect.cleandoc(first.value.value)}\n"))
            cut.update(range(first.lineno - 1, last_line))

    visit(tree, module)
    code = "\n".join(line for number, line in enumerate(lines) if number not in cut)
    return code, "\n".join(text for _, text in sorted(prose))


def _topics(text: str) -> Iterator[Keyed]:
    """The pages of pydoc's help, from the source of `pydoc_data.topics`."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, page in ast.literal_eval(node.value).items():
                name = f"{TOPICS}#{topic}"
                yield name, Document(name, "prose/topics", page)


def _tables() -> Iterator[Keyed]:
    """Tables that the interpreter holds in memory, one row per line, columns between tabs."""
    rows = [row for row in map(_code_point_row, range(sys.maxunicode + 1)) if row]
    yield from _blocks("tables/unicode", rows, CODE_POINTS_PER_BLOCK)
    entities = [
        f"&{name}\t{' '.join(f'U+{ord(c):04X}' for c in value)}\t{value}\n"
        for name, value in sorted(html.entities.html5.items())
    ]
    yield from _blocks("tables/entities", entities, ENTITIES_PER_BLOCK)
    names = {
        "opcodes": [f"{code}\t{name}\n" for name, code in sorted(opcode.opmap.items())],
        "keywords": [f"{word}\n" for word in keyword.kwlist],
        "errors": [f"{number}\t{name}\n" for number, name in sorted(errno.errorcode.items())],
        "status": [f"{s.value}\t{s.phrase}\t{s.description}\n" for s in http.HTTPStatus],
        "types": [f"{end}\t{kind}\n" for end, kind in sorted(mimetypes.types_map.items())],
    }
    for name, lines in names.items():
        yield from _blocks(f"tables/{name}", lines, len(lines))


def _code_point_row(code_point: int) -> str:
    """One line of the Unicode table; empty for what has no name or one that only counts."""
    character = chr(code_point)
    name = unicodedata.name(character, "")
    if not name or name.startswith(("CJK ", "HANGUL SYLLABLE", "TANGUT", "NUSHU")):
        return ""
    category, direction = unicodedata.category(character), unicodedata.bidirectional(character)
    lower = character.lower()
    return f"U+{code_point:04X}\t{character}\t{category}\t{direction}\t{lower}\t{name}\n"


def _blocks(domain: str, lines: list[str], size: int) -> Iterator[Keyed]:
    for start in range(0, len(lines), size):
        name = f"{domain}#{start // size:05}"
        yield name, Document(name, domain, "".join(lines[start : start + size]))
