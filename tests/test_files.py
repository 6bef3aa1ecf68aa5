"""Files that appear whole or not at all, and what a person reads when they cannot."""

from pathlib import Path

import pytest

from conftest import UNIFORM, MakeArtifact
from pgolf.artifact import read
from pgolf.cli import main
from pgolf.files import write_whole


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """The new content, and nothing beside it."""
    path = tmp_path / "file"
    path.write_bytes(b"before, and longer")
    write_whole(path, b"after")
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """A folder in the way: it stays, nothing is left beside it, and the error names it."""
    path = tmp_path / "file"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError) as caught:
        write_whole(path, b"data")
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (path / "inside").is_dir()


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
