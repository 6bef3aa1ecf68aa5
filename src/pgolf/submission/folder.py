"""A folder that becomes an artifact."""

import errno
from pathlib import Path

from pgolf import rules
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import HIDDEN, list_files, read_regular


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
        try:
            data = read_regular(path, left)
        except OSError as error:
            if error.errno == errno.EFBIG:
                most = f"{rules.UNPACKED_BYTES:,} bytes"
                raise Refused(f"{folder}: holds more than {most}, the most an artifact unpacks to") from None
            raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror})") from None
        left -= len(data)
        members[path.relative_to(folder).as_posix()] = data
    return members
