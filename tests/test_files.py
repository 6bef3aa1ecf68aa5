"""Files written atomically, opened and listed by one rule, and what a person reads when that cannot be."""

import io
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import UNIFORM, MakeArtifact
from pgolf.artifact import read
from pgolf.cli.main import main
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import HIDDEN, LINKED, list_files, open_regular, printable, read_regular, write_atomically
from pgolf.submission.folder import folder_members


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """The new content, and nothing beside it; the mode is what the umask makes it, not private."""
    path = tmp_path / "file"
    path.write_bytes(b"before, and longer")
    os.umask(before := os.umask(0o022))
    write_atomically(path, b"after")
    assert path.read_bytes() == b"after"
    assert path.stat().st_mode & 0o777 == 0o666 & ~before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 255, "a\nb", os.fsdecode(b"\xff\xfe"), "file.part", " "])
def test_any_name_that_a_file_can_have(tmp_path: Path, name: str) -> None:
    """The longest too: the temporary file has a short name."""
    write_atomically(tmp_path / name, b"data")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"data")]


def make(kind: str, path: Path, victim: Path) -> None:
    match kind:
        case "link":
            path.symlink_to(victim)
        case "dangling":
            path.symlink_to(victim.with_name("nowhere"))
        case "fifo":
            os.mkfifo(path)
        case "folder":
            (path / "inside").mkdir(parents=True)
        case "device":
            path.symlink_to("/dev/null")


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder", "device"])
def test_only_a_regular_file_is_replaced(tmp_path: Path, kind: str) -> None:
    """What is in the way stays as it was, nothing is left beside it, and the error names it."""
    victim, path = tmp_path / "victim", tmp_path / "d" / "file"
    victim.write_bytes(b"precious")
    path.parent.mkdir()
    make(kind, path, victim)
    before = path.lstat()
    with pytest.raises(OSError) as caught:
        write_atomically(path, b"data")
    assert caught.value.filename == str(path) and "not a file that can be replaced" in str(caught.value.strerror)
    assert path.lstat() == before and victim.read_bytes() == b"precious"
    assert list(path.parent.iterdir()) == [path] and sorted(tmp_path.iterdir()) == [path.parent, victim]


def test_a_device_stays_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--out /dev/null` as root; the move is taken away, so that a failure does no harm."""
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("would have replaced /dev/null"))
    with pytest.raises(OSError, match="is a device"):
        write_atomically(Path("/dev/null"), b"data")


@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_a_path_without_a_name(path: str) -> None:
    with pytest.raises(OSError, match="is a folder"):
        write_atomically(Path(path), b"data")


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_what_lies_under_a_part_name_has_no_effect(tmp_path: Path, kind: str) -> None:
    """A folder from somebody else can hold any name that it can guess."""
    victim, path = tmp_path / "victim", tmp_path / "d" / "a.json"
    victim.write_bytes(b"precious")
    path.parent.mkdir()
    make(kind, path.with_name("a.json.part"), victim)
    write_atomically(path, b"data")
    assert path.read_bytes() == b"data" and not path.is_symlink() and victim.read_bytes() == b"precious"
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_nothing_is_left_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: str
) -> None:
    """Ctrl-C, a SIGTERM that became SystemExit, a full disk: before and after the bytes are there."""
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise error

    monkeypatch.setattr(call, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"after")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"before"


def _write_often(path: Path, data: bytes) -> None:
    for _ in range(150):
        write_atomically(path, data)


def test_two_writers_never_tear_a_file(tmp_path: Path) -> None:
    """Whoever reads finds what one of them wrote, and none of them fails."""
    path, versions = tmp_path / "race", {b"a" * 200_000, b"b" * 90_000}
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(path, data)) for data in versions]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_bytes() if path.exists() else b"")
    assert seen - {b""} <= versions
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["race"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_only_a_regular_file_is_opened(tmp_path: Path, kind: str) -> None:
    """Without waiting for a writer of the FIFO, and with the sentence's end in `strerror`."""
    make(kind, tmp_path / "x", tmp_path)
    with pytest.raises(OSError) as caught:
        open_regular(tmp_path / "x")
    assert "not a regular file" in str(caught.value.strerror) and caught.value.filename == str(tmp_path / "x")


def test_a_regular_file_is_opened_and_bounded(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("x")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"12345"
    assert read_regular(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(tmp_path / "x", 4)


def test_a_folder_is_listed_by_one_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden names and caches, links and what is no file are named, not followed and not opened."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "b", root / ".git", root / ".ipynb_checkpoints", root / "b" / "__pycache__", elsewhere):
        folder.mkdir(parents=True)
    for file in ("a", "b/c", ".git/d", ".ipynb_checkpoints/e", "b/__pycache__/f", ".g", "../elsewhere/h"):
        (root / file).write_bytes(b"")
    (root / "folder").symlink_to(elsewhere)
    (root / "file").symlink_to(elsewhere / "h")
    (root / "dangling").symlink_to(elsewhere / "nowhere")
    (root / "circle").symlink_to(root)
    os.mkfifo(root / "fifo")
    expected = {".git": HIDDEN, ".ipynb_checkpoints": HIDDEN, ".g": HIDDEN, "b/__pycache__": HIDDEN}
    expected |= dict.fromkeys(("folder", "file", "dangling", "circle"), LINKED) | {"fifo": "a FIFO"}
    (tmp_path / "link").symlink_to(root)
    for start in (root, tmp_path / "link"):  # the folder that was asked for may be a link
        listing = list_files(start)
        assert [path.relative_to(start).as_posix() for path in listing.files] == ["a", "b/c"]
        assert {path.relative_to(start).as_posix(): what for path, what in listing.passed_over} == expected


def unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder unreadable, for root too."""
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    unreadable(tmp_path / "closed", monkeypatch)
    assert list_files(tmp_path).passed_over == ((tmp_path / "closed", "unreadable (Permission denied)"),)
    with pytest.raises(EnvironmentBroken, match=r"closed: unreadable \(Permission denied\)"):
        folder_members(tmp_path)


@pytest.mark.parametrize("kind", ["link", "dangling", "device", "fifo"])
def test_what_would_not_travel_is_not_packed(tmp_path: Path, kind: str) -> None:
    """Nothing is left out without a word: a linked folder was."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "entry" / "lib").mkdir(parents=True)
    make(kind, tmp_path / "entry" / "lib" / "weights", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="lib/weights: is a"):
        folder_members(tmp_path / "entry")


def test_a_folder_too_large_to_unpack_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgolf.rules.UNPACKED_BYTES", 10)
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"12345")
    assert len(folder_members(tmp_path)) == 2
    (tmp_path / "c").write_bytes(b"1")
    with pytest.raises(Refused, match="more than 10 bytes"):
        folder_members(tmp_path)


@given(text=st.text(st.characters()), encoding=st.sampled_from(["ascii", "utf-8", "latin-1", "cp1252", "gbk"]))
def test_any_name_can_be_printed(text: str, encoding: str) -> None:
    """One line without control characters, in what the terminal understands."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        shown = printable(text)
        print(shown, flush=True)
    assert "\n" not in shown and shown.isprintable()
    if text.isascii() and text.isprintable():
        assert shown == text


def test_unwritable_output_is_one_sentence(
    make_artifact: MakeArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3, the path, no traceback."""
    folder = tmp_path / "entry"
    folder.mkdir()
    for name, data in read(make_artifact(UNIFORM), 1_000_000).members.items():
        (folder / name).write_bytes(data)
    assert main(["pack", str(folder), "-o", str(tmp_path / "nowhere" / "a.zst")]) == 3
    error = capsys.readouterr().err
    assert error == f"pgolf: {tmp_path / 'nowhere' / 'a.zst'}: No such file or directory\n"


def test_packing_twice_into_the_folder_itself(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """The artifact of an earlier call is no part of the entry."""
    folder, sizes = tmp_path / "entry", []
    folder.mkdir()
    for name, data in read(make_artifact(UNIFORM), 1_000_000).members.items():
        (folder / name).write_bytes(data)
    for _ in range(2):
        assert main(["pack", str(folder), "-o", str(folder / "a.zst")]) == 0
        sizes.append((folder / "a.zst").stat().st_size)
    assert sizes[0] == sizes[1]
