"""The private copy: fresh files for each sandbox, so that they carry nothing over from an earlier one.

Two processes that can only read a file can still communicate through page residency, locks and waiters. So no
sandbox can open an inode that an earlier one could open. Binds, overlays and hard links share inodes or pages, so
they do not separate sandboxes.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pgolf.errors import EnvironmentBroken
from pgolf.machine import available_memory
from pgolf.sandbox.environment import Listing

DATA = Path("/data")
SHARDS = DATA / "shards"
_WITHHELD = ".withheld"
_MADE_INSIDE = tuple(Path(p) for p in ("/tmp", "/dev", "/dev/shm", "/var", "/var/tmp", "/run"))
_SPARE_BYTES = 1 << 30  # memory to leave free when the copy lies in memory
_THREADS = 4
_PREFIX = "pgolf-copy-"


@dataclass(frozen=True)
class Copy:
    """`root / "usr/lib"` is what the sandbox sees as `/usr/lib`."""

    root: Path
    bytes: int
    seconds: float
    """How long it took to make."""

    def mounts(self) -> Iterator[tuple[Path, Path]]:
        """Folders of the copy and their places. A folder that the sandbox makes itself is replaced by its entries."""
        waiting = [self.root]
        while waiting:
            for entry in sorted(waiting.pop().iterdir()):
                place = Path("/", entry.relative_to(self.root))
                if place in _MADE_INSIDE:
                    waiting.append(entry)
                elif place.name != _WITHHELD:
                    yield entry, place

    def reveal(self) -> None:
        """Let the sandbox see the files that were withheld, all at once, as `SHARDS`."""
        (self.root / _WITHHELD).rename(self.root / SHARDS.relative_to("/"))


@contextlib.contextmanager
def private_copy(
    wanted: Listing, extra: Mapping[Path, bytes] | None = None, withheld: Mapping[str, Path] | None = None
) -> Iterator[Copy]:
    """A fresh copy of the files, and the files `extra` with these contents; removed on leaving.

    `withheld` maps names to files that are copied too and that the sandbox does not see before `Copy.reveal`.
    Raises EnvironmentBroken when there is no room for it.
    """
    start = time.monotonic()
    size = wanted.bytes + sum(_size(path) for path in (withheld or {}).values())
    place = base(size)
    _remove_stale(place)
    root = place / f"{_PREFIX}{_owner(os.getpid())}-{secrets.token_hex(8)}"
    try:
        try:
            root.mkdir(mode=0o700)
            _fill(root, wanted)
            for path, data in (extra or {}).items():
                (root / path.relative_to("/")).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                (root / path.relative_to("/")).write_bytes(data)
            if withheld is not None:
                (root / DATA.relative_to("/")).mkdir(mode=0o700, exist_ok=True)
                (root / _WITHHELD).mkdir(mode=0o700)
                _copy_files({str(root / _WITHHELD / name): path for name, path in withheld.items()})
        except OSError as error:
            raise EnvironmentBroken(
                f"{place}: cannot hold the sandbox's copies, {size / 1e6:,.0f} MB "
                f"({error.strerror}); make room there, or set TMPDIR to a folder that has it"
            ) from None
        yield Copy(root, size, time.monotonic() - start)
    finally:
        removed = root.with_name(f"{root.name}x")
        try:
            # A thread that a signal kept the pool from joining may still copy: under another name it finds no folder.
            with contextlib.suppress(OSError):
                root.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
        finally:  # once more, in case a signal broke it off
            for folder in (root, removed):
                shutil.rmtree(folder, ignore_errors=True)


def base(size: int) -> Path:
    """Where a copy of `size` bytes goes: memory where it has room and programs may run there, else a disk."""
    memory = Path("/dev/shm")
    with contextlib.suppress(OSError):
        room = os.statvfs(memory)
        free = min(room.f_bavail * room.f_frsize, available_memory())
        if size + _SPARE_BYTES < free and not room.f_flag & os.ST_NOEXEC and os.access(memory, os.W_OK | os.X_OK):
            return memory
    return Path(tempfile.gettempdir())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror})") from None


def _fill(root: Path, wanted: Listing) -> None:
    """Copy all files and links below `root`."""
    for folder in sorted({path.parent for path in wanted.files} | {link.parent for link, _ in wanted.links}):
        (root / folder.relative_to("/")).mkdir(mode=0o700, parents=True, exist_ok=True)
    for link, target in wanted.links:
        (root / link.relative_to("/")).symlink_to(target)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(
            _copy_files, ({f"{root}{path}": path for path in wanted.files[i::_THREADS]} for i in range(_THREADS))
        ):
            pass


def _copy_files(files: Mapping[str, Path]) -> None:
    """Copy each file to its target."""
    for target, path in files.items():
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _copy(source, target)
        finally:
            os.close(source)


def _copy(source: int, target: str) -> None:
    """Bytes, permission to run, and the time of the last change, by which Python knows its compiled files."""
    status = os.fstat(source)
    copied = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        done = 0
        while done < status.st_size and (part := os.sendfile(copied, source, done, status.st_size - done)):
            done += part
        os.fchmod(copied, 0o500 if status.st_mode & 0o111 else 0o400)
        os.utime(copied, ns=(status.st_mtime_ns, status.st_mtime_ns))
    finally:
        os.close(copied)


def _owner(pid: int) -> str:
    """A name for a process that is never reused: its id and the time of its start."""
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{Path('/proc/self/ns/pid').stat().st_ino}-{pid}-{start}"


def _remove_stale(base: Path) -> None:
    """Remove copies of this user whose scorer was killed."""
    for folder in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            space, pid, start, _ = folder.name.removeprefix(_PREFIX).split("-")
            mine = folder.lstat().st_uid == os.getuid() and space == str(Path("/proc/self/ns/pid").stat().st_ino)
            if mine and not _alive(int(pid), start):
                shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int, start: str) -> bool:
    try:
        return _owner(pid).rsplit("-", 1)[1] == start
    except OSError:
        return False
