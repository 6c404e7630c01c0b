"""Sources: what they read, how they split, what they refuse."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.trainer.data_corpus import documents, prose, texts, write_texts
from trainer.data.files import FileDigests
from trainer.data.sources import HFDataset, JsonLines, Reading, TextFiles

LINES = [prose(number) for number in range(200)]


def write_jsonl(path: Path, lines: list[str] = LINES) -> Path:
    raw = "".join(json.dumps({"text": line, "kind": "k"}) + "\n" for line in lines).encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    if path.suffix == ".zst":  # several frames, as some writers make them
        half = raw.index(b"\n", len(raw) // 2) + 3
        compress = zstandard.ZstdCompressor().compress
        raw = compress(raw[:half]) + compress(raw[half:])
    path.write_bytes(raw)
    return path


def test_every_file_is_a_document_of_one_split(tmp_path: Path) -> None:
    write_texts(tmp_path / "corpus" / "deep", 100)
    source = TextFiles(f"{tmp_path}/corpus/**/*.txt")
    reading = Reading(validation_fraction=0.2)
    train, validation = (documents(source, s, reading) for s in ("train", "validation"))
    assert len(train) + len(validation) == 100
    assert 5 < len(validation) < 40
    assert {d.id for d in train}.isdisjoint(d.id for d in validation)
    assert {d.domain for d in train} == {"corpus/deep"}
    want = sorted(file.read_text() for file in (tmp_path / "corpus/deep").iterdir())
    assert sorted(d.text or "" for d in train + validation) == want


def test_the_split_depends_on_nothing_but_the_document(tmp_path: Path) -> None:
    """Other names, other folder, other order, fewer documents: the same side."""
    write_texts(tmp_path / "a", 100)
    reading = Reading(validation_fraction=0.3)
    before = {
        t: s
        for s in ("train", "validation")
        for t in texts(TextFiles(f"{tmp_path}/a/*"), s, reading)
    }
    (tmp_path / "b").mkdir()
    for number in range(0, 100, 2):
        source = tmp_path / "a" / f"{number:03}.txt"
        (tmp_path / "b" / f"{999 - number}.md").write_bytes(source.read_bytes())
    moved = TextFiles([f"{tmp_path}/b/*.md"])
    for split in ("train", "validation"):
        assert all(before[text] == split for text in texts(moved, split, reading))


def test_a_larger_fraction_keeps_what_a_smaller_one_had(tmp_path: Path) -> None:
    source = TextFiles(f"{write_texts(tmp_path, 100)}/*")
    small, large = (set(texts(source, "validation", Reading(f))) for f in (0.1, 0.4))
    assert small < large
    assert texts(source, "validation", Reading(0)) == []


def test_separators_cut_files(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("---".join(LINES) + "--- \n")
    source = TextFiles(str(tmp_path / "all.txt"), separator="---")
    both = texts(source, "train") + texts(source, "validation")
    assert sorted(both) == sorted(LINES)


def test_files_of_the_validation_split(tmp_path: Path) -> None:
    write_texts(tmp_path / "a", 5)
    write_texts(tmp_path / "b", 7)
    source = TextFiles(f"{tmp_path}/a/*", validation_paths=[f"{tmp_path}/b/*"])
    assert (len(texts(source, "train")), len(texts(source, "validation"))) == (5, 7)
    with pytest.raises(ValueError, match=r"000\.txt is matched by both paths and validation_paths"):
        texts(TextFiles(f"{tmp_path}/a/*", validation_paths=f"{tmp_path}/*/*"), "train")


def test_a_file_matched_twice_is_read_once(tmp_path: Path) -> None:
    write_texts(tmp_path, 4)
    source = TextFiles([f"{tmp_path}/*.txt", f"{tmp_path}/00*"])
    assert len(texts(source, "train", Reading(0))) == 4


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    write_jsonl(tmp_path / f"a.{ending}")
    source = JsonLines(f"{tmp_path}/*", domain_field="kind")
    reading = Reading(validation_fraction=0.2)
    both = [*documents(source, "train", reading), *documents(source, "validation", reading)]
    assert sorted(d.text or "" for d in both) == sorted(LINES)
    assert {d.domain for d in both} == {"k"}
    assert len({d.id for d in both}) == len(LINES)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_damaged_archives_are_refused(tmp_path: Path, ending: str, damage: str) -> None:
    path = write_jsonl(tmp_path / f"a.{ending}")
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        raw = raw[:-30]
    else:
        raw[len(raw) // 3 :] = os.urandom(len(raw) - len(raw) // 3)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"cannot read .*a\.{ending}: (damaged|truncated)"):
        texts(JsonLines(str(path)), "train")


def test_exact_copies_are_on_one_side(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*LINES, *reversed(LINES)])
    source, reading = JsonLines(f"{tmp_path}/a.jsonl"), Reading(0.3)
    train, validation = (texts(source, s, reading) for s in ("train", "validation"))
    assert len(train) + len(validation) == 400
    assert not set(train) & set(validation)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', r"line 2: field text \(3\) must be a string"),
        ('{"body": "x", "id": 3}', r"line 2: no field text; it has body, id"),
        ('["x"]', r"line 2: must be an object with field text, not \['x'\]"),
        ('{"text": "x"', r"line 2: not JSON \(Expecting ',' delimiter"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        texts(JsonLines(f"{tmp_path}/a.jsonl"), "train")


def test_invalid_utf8_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("gut \ufffd ".encode() + b"\xff\xfe b\xc3(")
    source = TextFiles(f"{tmp_path}/a.txt")
    (document,) = documents(source, "train", Reading(0))
    assert document.text == "gut \ufffd \ufffd\ufffd b\ufffd("
    assert document.invalid == 3
    message = r"a\.txt: invalid UTF-8 at byte 8 .*data\.invalid_utf8=replace"
    with pytest.raises(ValueError, match=message):
        texts(source, "train", Reading(0, "refuse"))


def test_invalid_utf8_names_the_offset_in_the_file(tmp_path: Path) -> None:
    good = json.dumps({"text": "x" * 2_000_000}).encode()
    packed = gzip.compress(good + b'\n{"text": "a\xff"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    (tmp_path / "parts.txt").write_bytes(b"one--two--\xff")
    with pytest.raises(ValueError, match=rf"a\.jsonl\.gz: invalid UTF-8 at byte {len(good) + 12} "):
        texts(JsonLines(f"{tmp_path}/a.jsonl.gz"), "train", Reading(0, "refuse"))
    with pytest.raises(ValueError, match=r"parts\.txt: invalid UTF-8 at byte 10 "):
        texts(TextFiles(f"{tmp_path}/parts.txt", "--"), "train", Reading(0, "refuse"))


def test_half_a_character_in_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    source = JsonLines(f"{tmp_path}/a.jsonl")
    (document,) = documents(source, "train", Reading(0))
    assert document.invalid > 0
    assert (document.text or "").strip("\ufffd") != ""
    (document.text or "").encode()
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1, UTF-8 of text: invalid UTF-8"):
        texts(source, "train", Reading(0, "refuse"))


def test_limits_of_bytes(tmp_path: Path) -> None:
    """Each split gets its share; the document that reaches the limit is whole."""
    write_jsonl(tmp_path / "a.jsonl")
    source = JsonLines(f"{tmp_path}/a.jsonl")
    whole = {s: texts(source, s, Reading(0.5)) for s in ("train", "validation")}
    for split in ("train", "validation"):
        some = texts(source, split, Reading(0.5, num_bytes=4000))
        assert some == whole[split][: len(some)]
        sizes = [len(text.encode()) for text in some]
        assert sum(sizes[:-1]) < 2000 <= sum(sizes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: TextFiles(f"{p}/*.nothing"), r"\*\.nothing matches no file; looked from "),
        (lambda p: TextFiles(str(p)), r"matches no file \(it is a folder: add /\*\*/\*"),
        (lambda p: TextFiles(f"{p}/dangling"), r"cannot read .*dangling: No such file"),
        (lambda p: JsonLines(f"{p}/dangling"), r"cannot read .*dangling: No such file"),
    ],
)
def test_unreadable(tmp_path: Path, make: Callable[[Path], TextFiles], message: str) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=message):
        texts(make(tmp_path), "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, r"data\.validation_fraction \(1\.0\) must be >= 0 and < 1"),
        ({"invalid_utf8": "drop"}, r"data\.invalid_utf8 \(drop\) must be replace or refuse"),
        ({"num_bytes": 0}, r"data\.num_bytes \(0\) must be >= 1"),
    ],
)
def test_bad_readings(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reading(**options)  # type: ignore[arg-type]


def test_file_digests_follow_the_content(tmp_path: Path) -> None:
    """Same size and same times set back: still another digest."""
    path, memory = tmp_path / "a", tmp_path / "memory.json"
    path.write_text("one")
    times = path.stat()
    digests = FileDigests(memory)
    first = digests.of(path)
    digests.save()
    assert FileDigests(memory).of(path) == first == FileDigests(None).of(path)
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert FileDigests(memory).of(path) == FileDigests(None).of(path) != first


def test_datasets_from_parquet_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"body": LINES, "kind": ["x"] * len(LINES)})
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "disk")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train-0.parquet")
    reading = Reading(0.2)
    for path in ("a.parquet", "disk", "folder"):
        source = HFDataset(str(tmp_path / path), field="body", domain_field="kind")
        train, validation = (documents(source, s, reading) for s in ("train", "validation"))
        assert sorted(d.text or "" for d in train + validation) == sorted(LINES)
        assert 10 < len(validation) < 80
        assert train[0].domain == "x"
    before = source.fingerprint(FileDigests(None))
    datasets.Dataset.from_dict({"body": LINES[:9], "kind": LINES[:9]}).to_parquet(
        tmp_path / "folder/train-0.parquet"
    )
    assert source.fingerprint(FileDigests(None)) != before
    assert len(texts(source, "train", Reading(0))) == 9
    with pytest.raises(ValueError, match=r"row 0: no field text; it has body, kind"):
        texts(HFDataset(str(tmp_path / "a.parquet")), "train")


@pytest.mark.parametrize("name", ["nothing.xyz", "gone"])
def test_datasets_that_cannot_be_loaded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "nothing.xyz").write_text("")
    source = HFDataset(str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"datasets cannot load .*{name}, split train: "):
        texts(source, "train")
