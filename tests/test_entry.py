"""A submission's folder: what is written is read, its published schema, and every way in which one can be wrong."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conftest import ROOT
from pgolf import entry, rules
from pgolf.entry import Entry, Packed, Seed
from pgolf.errors import Refused, UsageError

SCHEMA = json.loads((ROOT / "docs" / "submission.schema.json").read_text())
CONTENT = b"an artifact"
WHOLE = Entry(
    format=entry.FORMAT,
    name="Größe",
    author="me",
    track="laptop",
    date="2026-05-01",
    blurb="",
    artifact=Packed("artifact.zst", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)),
    bpb=2.5,
    seeds=(Seed(1, 2.4, "records/1.score.json", "logs/1.jsonl"), Seed(2, 2.6, "records/2.score.json", None)),
)
FRESH = replace(WHOLE, artifact=Packed(None, None, None), bpb=None, seeds=())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound submission."""
    root = tmp_path / "2026-05-01_it"
    for name, content in (
        ("artifact.zst", CONTENT),
        ("records/1.score.json", b"{}"),
        ("records/2.score.json", b"{}"),
        ("logs/1.jsonl", b""),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    entry.write(root, WHOLE)
    return root


def test_what_is_written_is_read(folder: Path) -> None:
    """Of an entry with an artifact, without one, and with one that lies elsewhere; each keeps to the schema."""
    elsewhere = replace(WHOLE, artifact=replace(WHOLE.artifact, file=None, url="https://example.org/a.zst"))
    for each in (WHOLE, FRESH, elsewhere):
        entry.write(folder, each)
        jsonschema.validate(json.loads((folder / entry.FILE).read_text()), SCHEMA)
        assert entry.is_entry(folder) and entry.read(folder) == each


def test_artifact_file_is_there_or_asked_for(folder: Path) -> None:
    assert entry.artifact_file(folder).read_bytes() == CONTENT
    entry.write(folder, FRESH)
    with pytest.raises(Refused, match=r"artifact\.file"):
        entry.artifact_file(folder)


def test_schema_names_the_fields() -> None:
    """The published schema has the fields of the dataclasses, in their order, and requires those without default."""
    properties = SCHEMA["properties"]
    parts: dict[Any, Any] = {
        Entry: (SCHEMA, {"seeds"}),
        Packed: (properties["artifact"], {"url"}),
        Seed: (properties["seeds"]["items"], set()),
    }
    for kind, (schema, optional) in parts.items():
        names = [field.name for field in fields(kind)]
        assert list(schema["properties"]) == names
        assert schema["required"] == [name for name in names if name not in optional]
        assert schema["additionalProperties"] is False
    assert properties["track"]["enum"] == [*rules.TRACKS]
    assert properties["seeds"]["maxItems"] == rules.ENTRY_SEEDS


WRONG: list[tuple[str, Any]] = [
    ("format", "pgolf-entry-2"),
    ("format", None),
    ("name", ""),
    ("name", "x" * 101),
    ("name", 7),
    ("name", "a\x1b[2Jb"),
    ("name", "two\nlines"),
    ("name", "\ud800"),
    ("author", ["me"]),
    ("track", "moon"),
    ("track", ["laptop"]),
    ("date", "20260501"),
    ("date", "2026-02-30"),
    ("date", 20260501),
    ("blurb", "x" * 501),
    ("blurb", None),
    ("bpb", 0),
    ("bpb", -1.0),
    ("bpb", float("nan")),
    ("bpb", float("inf")),
    ("bpb", 10**400),
    ("bpb", "2.5"),
    ("bpb", True),
    ("artifact", None),
    ("artifact", "artifact.zst"),
    ("artifact.file", "/etc/passwd"),
    ("artifact.file", "../artifact.zst"),
    ("artifact.file", "records/../artifact.zst"),
    ("artifact.file", "records"),
    ("artifact.file", "nothing.zst"),
    ("artifact.file", "a\0b"),
    ("artifact.sha256", "AB" * 32),
    ("artifact.sha256", "ab"),
    ("artifact.sha256", None),
    ("artifact.bytes", 0),
    ("artifact.bytes", 1.5),
    ("artifact.bytes", rules.ARTIFACT_BYTES + 1),
    ("artifact.url", "file:///etc/passwd"),
    ("artifact.url", "https://example.org/\x07"),
    ("seeds", {}),
    ("seeds", None),
    ("seeds", [{}] * (rules.ENTRY_SEEDS + 1)),
    ("seeds", [7]),
    ("seeds.seed", -1),
    ("seeds.seed", True),
    ("seeds.seed", 2**63),
    ("seeds.seed", 2),
    ("seeds.bpb", None),
    ("seeds.bpb", float("inf")),
    ("seeds.record", None),
    ("seeds.record", "records/9.score.json"),
    ("seeds.record", "records//1.score.json"),
    ("seeds.log", 7),
    ("seeds.log", "logs\\1.jsonl"),
    ("extra", 1),
    ("artifact.extra", 1),
    ("seeds.extra", 1),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_each_wrong_field_is_named(folder: Path, field: str, value: Any) -> None:
    """In one printable sentence."""
    values = json.loads((folder / entry.FILE).read_text())
    part, _, name = field.partition(".")
    (values if not name else values[part][0] if part == "seeds" else values[part])[name or part] = value
    (folder / entry.FILE).write_text(json.dumps(values))
    with pytest.raises(Refused) as refusal:
        entry.read(folder)
    text = str(refusal.value)
    assert entry.FILE in text and part in text and name in text
    assert text.isprintable() and len(text) < 400


@pytest.mark.parametrize("field", ["format", "name", "date", "artifact", "bpb"])
def test_each_missing_field_is_named(folder: Path, field: str) -> None:
    values = json.loads((folder / entry.FILE).read_text())
    del values[field]
    (folder / entry.FILE).write_text(json.dumps(values))
    with pytest.raises(Refused, match=f"{field} is missing"):
        entry.read(folder)


@pytest.mark.parametrize("text", ["", "{", "7", "[]", "null", "[" * 9999, "\ufeff{}", "9" * 5000])
def test_what_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / entry.FILE).write_text(text)
    assert not entry.is_entry(folder)
    with pytest.raises(Refused, match=entry.FILE):
        entry.read(folder)


def test_lies_about_the_artifact_are_refused_with_both_figures(folder: Path) -> None:
    for packed, figures in (
        (replace(WHOLE.artifact, bytes=12), ("12", "11")),
        (replace(WHOLE.artifact, sha256="ab" * 32), ("ab" * 32, str(WHOLE.artifact.sha256))),
    ):
        entry.write(folder, replace(WHOLE, artifact=packed))
        with pytest.raises(Refused) as refusal:
            entry.read(folder)
        assert all(figure in str(refusal.value) for figure in figures)


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _folder_link(path: Path) -> None:
    path.symlink_to("/")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        os.truncate(file.fileno(), 10**12)


def _many(path: Path) -> None:
    path.mkdir()
    for number in range(rules.ENTRY_FILES):
        (path / str(number)).touch()


def _deep(path: Path) -> None:
    """Deeper than one call to the system can name."""
    path.mkdir()
    here = os.open(path, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=here)
        here, above = os.open("d" * 200, os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_link, "no regular file"),
        (_folder_link, "no regular file"),
        (os.mkfifo, "no regular file"),
        (_sparse, "more than 200,000,000 bytes"),
        (_many, "more than 500 files"),
        (_deep, "more than 1,000 characters"),
    ],
)
@pytest.mark.parametrize("name", ["extra", ".hidden"])
def test_strange_folders_are_refused(folder: Path, make: Callable[[Path], None], words: str, name: str) -> None:
    make(folder / name)
    with pytest.raises(Refused, match=words):
        entry.read(folder)


def test_scratch_is_no_part_of_a_submission(folder: Path) -> None:
    """Nothing is looked for in it, and nothing in it can be named."""
    (folder / "runs").symlink_to("/")
    assert entry.read(folder) == WHOLE
    (folder / "runs").unlink()
    _many(folder / "runs")
    assert entry.read(folder) == WHOLE
    entry.write(folder, replace(WHOLE, artifact=replace(WHOLE.artifact, file="runs/1")))
    with pytest.raises(Refused, match=r"artifact\.file"):
        entry.read(folder)


def test_huge_files_are_refused_before_they_are_read(folder: Path) -> None:
    for name in (entry.FILE, "artifact.zst"):
        kept = (folder / name).read_bytes()
        with (folder / name).open("wb") as file:
            os.truncate(file.fileno(), 150_000_000)
        with pytest.raises(Refused, match="150,000,000 bytes"):
            entry.read(folder)
        (folder / name).write_bytes(kept)


def test_without_a_folder_or_an_entry(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        entry.read(tmp_path / "nothing")
    with pytest.raises(Refused, match=entry.FILE):
        entry.read(tmp_path)
    assert not entry.is_entry(tmp_path)


def test_write_leaves_the_file_when_the_entry_is_wrong(folder: Path) -> None:
    before = (folder / entry.FILE).read_bytes()
    with pytest.raises(Refused, match="name"):
        entry.write(folder, replace(WHOLE, name="a\nb"))
    assert (folder / entry.FILE).read_bytes() == before
