"""The lock: one sandbox with a submission's code or data at a time on a machine.

Two sandboxes that run at the same time can communicate through load, memory and other counters of the machine. The
lock is an flock on a file of fixed name that no sandbox can see. The kernel releases it however its holder ends.
"""

import contextlib
import fcntl
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pgolf import rules
from pgolf.errors import EnvironmentBroken
from pgolf.sandbox.bubblewrap import in_container

_VARIABLE = "PGOLF_LOCK"  # tests have a lock of their own
_POLL_SECONDS = 0.1
_NOTE_BYTES = 256


class Held(EnvironmentBroken):
    """Another process holds the lock."""


def path() -> Path:
    """The file: of the machine for root, of the user for others."""
    return Path(os.environ[_VARIABLE]) if os.environ.get(_VARIABLE) else _standard()


def is_standard() -> bool:
    """Whether the lock is the one that every scorer on this machine (of this user, unless root) takes."""
    return path() == _standard()


def reaches_machine() -> bool:
    """Whether all scorers of the machine see the lock's file; a container's do not."""
    return not in_container()


@contextlib.contextmanager
def hold(seconds: float | None = None, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock. Waits `rules.LOCK_SECONDS` by default; `say` (default: stderr) gets a sentence on the holder.

    Raises EnvironmentBroken when the time is over or the file is not a regular file of this user or root.
    """
    file = path()
    until = time.monotonic() + (rules.LOCK_SECONDS if seconds is None else seconds)
    said = False
    while (descriptor := _take(file)) is None:
        holder = _holder(file)
        if time.monotonic() >= until:
            raise Held(f"{file}: the lock is still held by {holder}; wait until it ends, or end it")
        if not said:
            (say or _say)(f"pgolf: waiting for {holder} on {file}")
            said = True
        time.sleep(_POLL_SECONDS)
    try:
        note = f"pgolf (pid {os.getpid()}): {' '.join(map(os.path.basename, sys.argv[:2]))}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, note.encode("utf-8", "replace")[:_NOTE_BYTES], 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _standard() -> Path:
    if os.geteuid() == 0 and Path("/run").is_dir():
        return Path("/run/pgolf.lock")
    folder = os.environ.get("XDG_RUNTIME_DIR")
    return Path(folder, "pgolf.lock") if folder and Path(folder).is_dir() else Path.home() / ".cache" / "pgolf" / "lock"


def _take(file: Path) -> int | None:
    """A descriptor that holds the lock, or None while another process holds it."""
    descriptor = _open(file)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened, now = os.fstat(descriptor), file.lstat()
        if (opened.st_dev, opened.st_ino) == (now.st_dev, now.st_ino):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)  # held, or no longer the file of that name
    return None


def _open(file: Path) -> int:
    """Open the lock file; create it if it does not exist."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o600)
    except OSError as error:
        raise EnvironmentBroken(f"{file}: cannot be opened as a lock ({error.strerror}); remove it") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
        os.close(descriptor)
        raise EnvironmentBroken(f"{file}: is not a regular file of this user, so it cannot be the lock; remove it")
    return descriptor


def _holder(file: Path) -> str:
    """What the holder wrote about itself, printable characters only."""
    with contextlib.suppress(EnvironmentBroken):
        descriptor = _open(file)
        try:
            words = os.pread(descriptor, _NOTE_BYTES, 0).decode("utf-8", "replace")
        finally:
            os.close(descriptor)
        return "".join(c for c in words if c.isprintable()) or "another pgolf"
    return "another pgolf"


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
