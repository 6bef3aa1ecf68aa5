"""A folder that becomes an artifact, or has code for one."""

import errno
from pathlib import Path

from pgolf import artifact, rules
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import HIDDEN, LINKED, list_files, read_regular


def folder_members(folder: Path) -> dict[str, bytes]:
    """Contents of a submission's folder, ready for `pack`; caches and hidden files stay out.

    Raises UsageError when `folder` is none or holds a link or the like, EnvironmentBroken when a file cannot be read,
    Refused when all files together are larger than an artifact may unpack to.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    listing = list_files(folder)
    for path, what in listing.passed_over:
        if what.startswith("unreadable"):
            raise EnvironmentBroken(f"{path}: {what}")
        if what != HIDDEN:
            raise UsageError(f"{path}: is {what}; put the file or folder itself in its place")
    members: dict[str, bytes] = {}
    left = rules.UNPACKED_BYTES
    for path in listing.files:
        most = rules.UNPACKED_BYTES
        data = _read(path, left, f"{folder}: holds more than {most:,} bytes, the most an artifact unpacks to")
        left -= len(data)
        members[path.relative_to(folder).as_posix()] = data
    return members


def source_files(folder: Path) -> dict[str, bytes]:
    """The source files of a folder, and its manifest if it has one.

    A link counts as what it leads to, if that lies in the folder or beside it. Raises UsageError for another link or
    something that is no file, Refused for one that alone exceeds the limit on source, EnvironmentBroken when one cannot
    be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    listing = list_files(folder)
    links: list[Path] = []
    for path, what in listing.passed_over:
        if what.startswith("unreadable"):
            raise EnvironmentBroken(f"{path}: {what}")
        if what == LINKED and artifact.is_code(path.name) and path.resolve().is_relative_to(folder.resolve().parent):
            links.append(path)
        elif what != HIDDEN and artifact.is_code(path.name):
            raise UsageError(f"{path}: is {what}{' to elsewhere' * (what == LINKED)}; put the file itself in its place")
    found: dict[str, bytes] = {}
    for path in (*listing.files, *links):
        name = path.relative_to(folder).as_posix()
        if artifact.is_source(name):
            most = rules.SOURCE_BYTES
            found[name] = _read(path, most, f"{path}: has more than {most:,} bytes, the most that all source may have")
    return found


def _read(path: Path, most: int, too_large: str) -> bytes:
    """A file's contents. Raises Refused(`too_large`) for more than `most` bytes, else EnvironmentBroken."""
    try:
        return read_regular(path, most)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise Refused(too_large) from None
        raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror})") from None
