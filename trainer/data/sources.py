"""Where text comes from: sources yield the documents of a split, in an order that never changes.

A document goes to the validation split if the keyed hash of its content (of its file's name for
`Stdlib`) falls below the validation fraction. So its split does not depend on the order or number
of the others, and exact copies are never on both sides.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy.typing as npt

from trainer.data.files import (
    FileDigests,
    FoundFile,
    decode_utf8,
    find_files,
    read_bytes,
    read_lines,
)

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
SPLIT_KEY = b"evenkeel validation split"


@dataclass(frozen=True)
class Document:
    """A piece of text, or of tokens, that belongs together.

    `invalid` counts the places of the text that were not UTF-8 and were replaced.
    """

    id: str
    domain: str
    text: str | None = None
    tokens: npt.NDArray[Any] | None = None
    invalid: int = 0


@dataclass(frozen=True)
class Reading:
    """How sources are read: share kept for validation, invalid UTF-8, most bytes of one source."""

    validation_fraction: float = 0.05
    invalid_utf8: str = "replace"
    num_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction ({self.validation_fraction}) must be >= 0 and < 1"
            )
        if self.invalid_utf8 not in ("replace", "refuse"):
            raise ValueError(f"data.invalid_utf8 ({self.invalid_utf8}) must be replace or refuse")
        if self.num_bytes is not None and self.num_bytes < 1:
            raise ValueError(f"data.num_bytes ({self.num_bytes}) must be >= 1, or null for all")

    def split_of(self, key: bytes | str) -> Split:
        """The split of what this key names."""
        key = key.encode() if isinstance(key, str) else key
        value = hashlib.blake2b(key, digest_size=8, key=SPLIT_KEY).digest()
        share = int.from_bytes(value, "big") / 2**64
        return "validation" if share < self.validation_fraction else "train"

    def bytes_of(self, split: Split, *, separate: bool) -> float:
        """Most bytes of one source to read for a split; `separate`: the splits have own files."""
        if self.num_bytes is None:
            return float("inf")
        if separate:
            return self.num_bytes
        share = self.validation_fraction
        return self.num_bytes * (share if split == "validation" else 1 - share)


class Source(Protocol):
    """A slot of the configuration: anything that yields documents."""

    def documents(self, split: Split, reading: Reading) -> Iterator[Document]:
        """The documents of a split, the same ones in the same order every time."""
        ...

    def fingerprint(self, digests: FileDigests) -> Any:
        """Something JSON can hold that differs whenever the documents may differ."""
        ...


def take_bytes(sized: Iterator[tuple[int, Document]], limit: float) -> Iterator[Document]:
    """Documents, each with its size, until `limit` bytes are reached; the last one is whole."""
    taken = 0
    for size, document in sized:
        if taken >= limit:
            return
        taken += size
        yield document


class _Files(abc.ABC):
    """What sources of files share: the files, with those of a validation split of its own."""

    def __init__(self, paths: list[str] | str, validation_paths: list[str] | str | None) -> None:
        self.paths = _as_list(paths)
        self.validation_paths = None if validation_paths is None else _as_list(validation_paths)

    @functools.cached_property
    def files(self) -> dict[str, list[FoundFile]]:
        """Files by what they are for; `both` are split by document."""
        if self.validation_paths is None:
            return {"both": find_files(self.paths)}
        train, validation = find_files(self.paths), find_files(self.validation_paths)
        twice = {file.path.resolve() for file in train} & {f.path.resolve() for f in validation}
        if twice:
            raise ValueError(
                f"{min(twice)} is matched by both paths and validation_paths; "
                f"it would be trained on and validated on"
            )
        return {"train": train, "validation": validation}

    def fingerprint(self, digests: FileDigests) -> Any:
        files = {
            use: [[file.name, digests.of(file.path)] for file in group]
            for use, group in self.files.items()
        }
        where = ("files", "paths", "validation_paths")
        options = {name: value for name, value in vars(self).items() if name not in where}
        return [type(self).__name__, options, files]

    def documents(self, split: Split, reading: Reading) -> Iterator[Document]:
        if "both" in self.files:
            sized = (
                (len(content), document)
                for file in self.files["both"]
                for document, content in self._read(file, reading)
                if reading.split_of(content) == split
            )
            return take_bytes(sized, reading.bytes_of(split, separate=False))
        own = (pair for file in self.files[split] for pair in self._read(file, reading))
        sized = ((len(content), document) for document, content in own)
        return take_bytes(sized, reading.bytes_of(split, separate=True))

    @abc.abstractmethod
    def _read(self, file: FoundFile, reading: Reading) -> Iterator[tuple[Document, bytes]]:
        """The documents of a file and their text as UTF-8."""


class TextFiles(_Files):
    """Plain text: every file is a document, or several with a `separator` between them.

    Args:
        paths: paths and glob patterns (`**` matches folders at any depth).
        separator: text between two documents of a file, such as "\\n\\n". null: a file is one.
        validation_paths: files of the validation split. null: documents of `paths`, by their hash.
    """

    def __init__(
        self,
        paths: list[str] | str,
        separator: str | None = None,
        validation_paths: list[str] | str | None = None,
    ) -> None:
        super().__init__(paths, validation_paths)
        if separator == "":
            raise ValueError("separator ('') must not be empty; null keeps every file whole")
        self.separator = separator

    def _read(self, file: FoundFile, reading: Reading) -> Iterator[tuple[Document, bytes]]:
        raw = read_bytes(file.path)
        if self.separator is None:
            text, invalid = decode_utf8(raw, str(file.path), reading.invalid_utf8)
            yield Document(file.name, _domain(file), text, invalid=invalid), text.encode()
            return
        offset, cut = 0, self.separator.encode()
        for number, part in enumerate(raw.split(cut)):
            text, invalid = decode_utf8(part, str(file.path), reading.invalid_utf8, offset)
            offset += len(part) + len(cut)
            if part.strip():
                name = f"{file.name}:{number}"
                yield Document(name, _domain(file), text, invalid=invalid), text.encode()


class JsonLines(_Files):
    """One JSON object per line, its text in a named field; .jsonl, also packed as .gz or .zst.

    Args:
        paths: paths and glob patterns (`**` matches folders at any depth).
        field: name of the field that holds the text.
        domain_field: name of a field that holds the document's domain. null: the file's name.
        validation_paths: files of the validation split. null: documents of `paths`, by their hash.
    """

    def __init__(
        self,
        paths: list[str] | str,
        field: str = "text",
        domain_field: str | None = None,
        validation_paths: list[str] | str | None = None,
    ) -> None:
        super().__init__(paths, validation_paths)
        self.field, self.domain_field = field, domain_field

    def _read(self, file: FoundFile, reading: Reading) -> Iterator[tuple[Document, bytes]]:
        for number, (offset, line) in enumerate(read_lines(file.path), start=1):
            where = f"{file.path}, line {number}"
            if not line.strip():
                continue
            decoded, invalid = decode_utf8(line, str(file.path), reading.invalid_utf8, offset)
            try:
                record = json.loads(decoded)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            text = _field(record, self.field, where)
            domain = _field(record, self.domain_field, where) if self.domain_field else file.name
            # "\ud800" is valid JSON for half a character, which UTF-8 does not have
            raw = text.encode("utf-8", "surrogatepass")
            text, halves = decode_utf8(raw, f"{where}, UTF-8 of {self.field}", reading.invalid_utf8)
            document = Document(f"{file.name}:{number}", domain, text, invalid=invalid + halves)
            yield document, text.encode()


class HFDataset:
    """Whatever the `datasets` library loads: a hub id, or a local path (parquet, arrow, csv, ...).

    Args:
        path: hub id, folder, file, or folder written by `save_to_disk`.
        field: column that holds the text.
        split: its split that is read.
        name: its configuration, where it has several.
        revision: branch, tag or commit of a hub dataset.
        domain_field: column that holds the document's domain. null: `path`.
        validation_split: its split that validates. null: documents of `split`, by their hash.
    """

    def __init__(
        self,
        path: str,
        field: str = "text",
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        domain_field: str | None = None,
        validation_split: str | None = None,
    ) -> None:
        self.path, self.field, self.split = path, field, split
        self.name, self.revision, self.domain_field = name, revision, domain_field
        self.validation_split = validation_split

    def fingerprint(self, digests: FileDigests) -> Any:
        if Path(self.path).exists():
            folder = Path(self.path)
            files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
            content: Any = [
                [str(file.relative_to(folder)), digests.of(file)]
                for file in files
                if file.is_file()
            ]
        else:
            splits = {self.split, self.validation_split or self.split}
            content = sorted(self._load(split)._fingerprint for split in splits)
        return [type(self).__name__, vars(self), content]

    def documents(self, split: Split, reading: Reading) -> Iterator[Document]:
        if self.validation_split is None:
            sized = (
                (len(content), document)
                for document, content in self._read(self.split)
                if reading.split_of(content) == split
            )
            return take_bytes(sized, reading.bytes_of(split, separate=False))
        own = self._read(self.split if split == "train" else self.validation_split)
        sized = ((len(content), document) for document, content in own)
        return take_bytes(sized, reading.bytes_of(split, separate=True))

    def _read(self, split: str) -> Iterator[tuple[Document, bytes]]:
        for number, row in enumerate(self._load(split)):
            where = f"{self.path}, split {split}, row {number}"
            text = _field(row, self.field, where)
            domain = _field(row, self.domain_field, where) if self.domain_field else self.path
            yield Document(f"{self.path}/{split}:{number}", domain, text), text.encode()

    def _load(self, split: str) -> Any:
        """The dataset of one split, read from disk as it is used."""
        import datasets

        path = Path(self.path)
        builders = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
        builders |= {".json": "json", ".jsonl": "json", ".txt": "text"}
        try:
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(str(path))
                return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            if path.is_file():
                if path.suffix not in builders:
                    known = ", ".join(builders)
                    raise ValueError(f"the name of a file must end in one of {known}")
                kind = builders[path.suffix]
                options = {"sep": "\t"} if path.suffix == ".tsv" else {}
                return datasets.load_dataset(
                    kind, data_files={split: str(path)}, split=split, **options
                )
            return datasets.load_dataset(
                self.path, name=self.name, split=split, revision=self.revision
            )
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,  # data sets that are scripts, which are never run
            datasets.exceptions.DatasetsError,
        ) as error:
            raise ValueError(f"datasets cannot load {self.path}, split {split}: {error}") from error


class Indexed:
    """Documents that are tokens already, from a megatron-core `.bin` and `.idx` pair.

    Args:
        prefix: path of the pair without its ending.
        validation_prefix: pair of the validation split. null: documents of `prefix`, by their hash.
    """

    def __init__(self, prefix: str, validation_prefix: str | None = None) -> None:
        self.prefix, self.validation_prefix = prefix, validation_prefix

    def fingerprint(self, digests: FileDigests) -> Any:
        prefixes = [self.prefix, self.validation_prefix or self.prefix]
        files = [digests.of(Path(f"{p}{end}")) for p in prefixes for end in (".bin", ".idx")]
        return [type(self).__name__, self.validation_prefix is None, files]

    def documents(self, split: Split, reading: Reading) -> Iterator[Document]:
        """Documents of a split; `reading.num_bytes` counts bytes of the .bin file."""
        from trainer.data.indexed import read_indexed

        own = self.validation_prefix is not None
        prefix = self.validation_prefix if own and split == "validation" else self.prefix
        assert prefix is not None
        every = enumerate(read_indexed(prefix))
        sized = (
            (tokens.nbytes, Document(f"{prefix}:{number}", prefix, tokens=tokens))
            for number, tokens in every
            if own or reading.split_of(tokens.astype("<i8").tobytes()) == split
        )
        return take_bytes(sized, reading.bytes_of(split, separate=own))


def corpus_key(
    sources: dict[str, Source], readings: dict[str, Reading], digests: FileDigests, *more: Any
) -> str:
    """Digest of the content of sources and of how they are read (and of `more`)."""
    parts = {
        name: [source.fingerprint(digests), asdict(readings[name])]
        for name, source in sources.items()
    }
    text = json.dumps([parts, more], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _as_list(paths: list[str] | str) -> list[str]:
    return [paths] if isinstance(paths, str) else [str(path) for path in paths]


def _domain(file: FoundFile) -> str:
    """The folder of a text file: `books/old` of `books/old/x.txt`."""
    return file.name.rpartition("/")[0]


def _field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be an object with field {field}, not {record!r:.80}")
    if field not in record:
        raise ValueError(f"{where}: no field {field}; it has {', '.join(record) or 'none'}")
    if not isinstance(record[field], str):
        raise ValueError(f"{where}: field {field} ({record[field]!r:.80}) must be a string")
    return record[field]
