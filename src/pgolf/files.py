"""Atomic writing of files and folders, opening of regular files only, listing of folders, and names made printable."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from pgolf.errors import UsageError

HIDDEN, LINKED = "hidden", "a link"

_TEMPORARY = ".pgolf-"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under `path`: a reader finds the old file or the new one, also after a crash of the machine.

    Only a regular file is replaced, or nothing. Raises OSError, with nothing left behind, when it cannot.
    """
    temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}.part"
    try:
        check_replaceable(path)
        with temporary.open("xb") as file:  # exclusive: never a file that another process put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def check_replaceable(path: Path) -> None:
    """Raises OSError when something other than a regular file stands under `path`: a link, a folder, a device."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"is {_kind(mode)}, not a file that can be replaced", str(path))


def is_temporary(path: Path) -> bool:
    """Whether it is a temporary file of `write_atomically`, perhaps of a process that was killed."""
    return path.name.startswith(_TEMPORARY) and path.suffix == ".part"


def check_free(path: Path) -> None:
    """Raises UsageError when something stands where a new folder is to be, or a file in the path to it."""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path}: exists; choose a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{path}: the path to it is not a folder; choose another place") from None


@contextlib.contextmanager
def create_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears under `path` when the block ends. Nothing is left when the block fails."""
    temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Never blocks. Raises OSError for anything else, such as a FIFO or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"is {_kind(mode)}, not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def create(path: Path) -> BinaryIO:
    """A new file under `path`, open for writing. What lay there is removed and never written to."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def read_regular(path: Path, limit: int) -> bytes:
    """The contents of a regular file. Raises OSError as `open_regular` does, and when it has over `limit` bytes."""
    data = bytearray()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            data += piece
            if len(data) > limit:
                raise OSError(errno.EFBIG, f"has more than {limit:,} bytes", str(path))
    return bytes(data)


@dataclass(frozen=True)
class Listing:
    """What a folder holds."""

    files: tuple[Path, ...]
    """The regular files, in the order of their paths."""
    passed_over: tuple[tuple[Path, str], ...]
    """The other entries, each with its kind: `HIDDEN`, `LINKED`, "a FIFO", "unreadable (Permission denied)"."""


def list_files(folder: Path) -> Listing:
    """The files in `folder` and the folders in it. No link is followed; `folder` itself may be one.

    Names that begin with a dot, and `__pycache__`, are hidden.
    """
    files: list[Path] = []
    passed_over: list[tuple[Path, str]] = []
    for path, mode in _walk(folder, passed_over):
        if stat.S_ISREG(mode):
            files.append(path)
        else:
            passed_over.append((path, LINKED if stat.S_ISLNK(mode) else _kind(mode)))
    return Listing(tuple(sorted(files)), tuple(sorted(passed_over)))


def _walk(folder: Path, passed_over: list[tuple[Path, str]]) -> Iterator[tuple[Path, int]]:
    """Path and mode of everything that is no folder."""
    folders = [folder]
    while folders:
        current = folders.pop()
        try:
            entries = [(Path(entry), entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir(current)]
        except OSError as error:
            passed_over.append((current, f"unreadable ({error.strerror})"))
            continue
        for path, mode in entries:
            if path.name.startswith(".") or path.name == "__pycache__":
                passed_over.append((path, HIDDEN))
            elif stat.S_ISDIR(mode):
                folders.append(path)
            else:
                yield path, mode


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: LINKED,
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "of an unknown kind")


def printable(text: object) -> str:
    """`text` as one line that any terminal can show; other characters become escapes such as `\\x1b` or `\\udc80`.

    For names from outside: of files, datasets and authors.
    """
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def beside(artifact: Path, ending: str) -> Path:
    """What stands beside an artifact: `a.zst` and ".jsonl" give `a.jsonl`; `lr0.01` gives `lr0.01.jsonl`."""
    return artifact.with_name(artifact.name.removesuffix(".zst") + ending)
