"""Read files for a corpus: find them, read them whole or by line, decode them, know their content.

Every failure is a `ValueError` that names the file, because the user chose it.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

CHUNK_BYTES = 1 << 20
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class FoundFile:
    """A file of a corpus: `name` stays the same when the whole corpus moves to another folder."""

    path: Path
    name: str


def find_files(paths: Iterable[str]) -> list[FoundFile]:
    """Files that paths and glob patterns (`**` too) match, each once, ordered by name.

    Raises:
        ValueError: if a path or pattern matches no file.
    """
    found: dict[Path, FoundFile] = {}
    for pattern in paths:
        matches = [Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)]
        files = [match for match in matches if not match.is_dir()]
        if not files:
            folder = " (it is a folder: add /**/* to read the files in it)" if matches else ""
            raise ValueError(f"{pattern} matches no file{folder}; looked from {Path.cwd()}")
        root = _fixed_folder(pattern)
        for file in files:
            name = PurePath(root.name, os.path.relpath(file, root)).as_posix()
            found.setdefault(file.resolve(), FoundFile(file, name))
    return sorted(found.values(), key=lambda file: (file.name, str(file.path)))


def _fixed_folder(pattern: str) -> Path:
    """The deepest folder of a pattern that no wildcard is part of, as an absolute path."""
    parts = Path(os.path.expanduser(pattern)).parts[:-1]
    wild = (number for number, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[: next(wild, len(parts))]).absolute()


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        ValueError: if it cannot be read.
    """
    return b"".join(_plain_chunks(path))


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset (in the unpacked file) and content of every line of a plain, .gz or .zst file.

    Raises:
        ValueError: if the file cannot be read, or is a damaged or truncated archive.
    """
    readers = {".gz": _gzip_chunks, ".zst": _zstd_chunks}
    offset, rest = 0, b""
    for chunk in readers.get(path.suffix, _plain_chunks)(path):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield offset, line
            offset += len(line) + 1
    if rest:
        yield offset, rest


def _plain_chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: damaged or truncated gzip file ({error})") from error


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Unpacked content, frame by frame: the library's own reader takes a cut file for a whole."""
    import zstandard

    frame = None
    try:
        for packed in _plain_chunks(path):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise ValueError(f"cannot read {path}: damaged zstd file ({error})") from error
    if frame is not None:
        raise ValueError(f"cannot read {path}: truncated zstd file")


def decode_utf8(raw: bytes, where: str, policy: str, offset: int = 0) -> tuple[str, int]:
    """Text of UTF-8 bytes, and how many invalid places were replaced by U+FFFD.

    Args:
        where: name of the file for the message. policy: replace or refuse.
        offset: of `raw` in the file, in bytes.

    Raises:
        ValueError: under `refuse`, naming the file and the offset of the first invalid byte.
    """
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError as error:
        if policy == "refuse":
            raise ValueError(
                f"{where}: invalid UTF-8 at byte {offset + error.start} ({error.reason}); convert "
                f"the file, or set data.invalid_utf8=replace"
            ) from error
    text = raw.decode("utf-8", errors="replace")
    return text, text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode())


class FileDigests:
    """Content digests of files, remembered in a file for as long as size and times stay the same.

    A change of content always changes the time of the last inode change, which no program can set.
    """

    def __init__(self, memory: Path | None) -> None:
        self.memory = memory
        self.known: dict[str, list[Any]] = {}
        if memory is not None and memory.exists():
            self.known = json.loads(memory.read_text(encoding="utf-8"))

    def of(self, path: Path) -> str:
        """Digest of the content of a file.

        Raises:
            ValueError: if it cannot be read.
        """
        try:
            stat = path.stat()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        mark = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        key = str(path.resolve())
        if self.known.get(key, [None])[0] != mark:
            digest = hashlib.blake2b(digest_size=16)
            for chunk in _plain_chunks(path):
                digest.update(chunk)
            self.known[key] = [mark, digest.hexdigest()]
        return str(self.known[key][1])

    def save(self) -> None:
        """Remember the digests for later runs."""
        if self.memory is not None:
            partial = self.memory.with_name(f"{self.memory.name}.{os.getpid()}")
            partial.write_text(json.dumps(self.known), encoding="utf-8")
            os.replace(partial, self.memory)
