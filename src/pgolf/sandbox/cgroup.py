"""Control groups: the kernel's own limits on memory and process count, where this user may set them.

Tried in turn: groups of version 1, a group of version 2 at the top or below this process's, a scope of the user's
systemd. Where none can be made, the group is empty and the kernel enforces nothing.
"""

import contextlib
import errno
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")

_PREFIX = "pgolf-"
_NUMBERS = itertools.count()
_END_SECONDS = 30.0  # a dying process may first have to free millions of files


@dataclass
class Cgroup:
    """A group made for one worker. `folders` and `command` are empty where this user may make none."""

    folders: tuple[Path, ...] = ()
    command: list[str] = field(default_factory=list)
    """What to put before the command that is to run in the group."""
    without_swap: bool = False
    """Whether the limit on memory covers swap."""

    @staticmethod
    def create(name: str, memory_bytes: int, processes: int) -> "Cgroup":
        """A group with both limits and no swap, or an empty one."""
        label = f"{_PREFIX}{os.getpid()}-{name}-{next(_NUMBERS)}"
        if (ROOT / "cgroup.controllers").exists():
            limits: dict[str, object] = {"memory.max": memory_bytes, "pids.max": processes}
            extra: dict[str, object] = {"memory.swap.max": 0, "memory.oom.group": 1}
            for parent in (ROOT, _own()):
                if group := _make({parent / label: limits}, extra):
                    return group
            return _scope(label, memory_bytes, processes)
        folders: dict[Path, Mapping[str, object]] = {
            ROOT / "memory" / label: {"memory.limit_in_bytes": memory_bytes},
            ROOT / "pids" / label: {"pids.max": processes},
        }
        return _make(folders, {"memory.memsw.limit_in_bytes": memory_bytes, "memory.swappiness": 0}) or Cgroup()

    @property
    def enforced(self) -> bool:
        """Whether the kernel keeps the limits."""
        return bool(self.command)

    @property
    def version(self) -> str:
        """What kind of group it is, for a record."""
        if not self.enforced:
            return "no control group"
        return "cgroup v2" if (ROOT / "cgroup.controllers").exists() else "cgroup v1"

    def variables(self) -> dict[str, str]:
        """Environment variables that `command` needs."""
        names = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS") if self.command[:1] == _SCOPE[:1] else ()
        return {name: os.environ[name] for name in names if name in os.environ}

    def started(self, pid: int) -> None:
        """Note where a scope's processes are, once its first one runs."""
        if self.command[:1] == _SCOPE[:1]:
            with contextlib.suppress(OSError):
                folder = ROOT / Path(f"/proc/{pid}/cgroup").read_text().rpartition("::/")[2].strip()
                if folder.name.startswith(_PREFIX):  # never another program's group: `remove` kills what is in it
                    self.folders = (folder,)

    def oom_killed(self) -> bool:
        """Whether the kernel killed a process of the group for its memory."""
        for folder in self.folders:
            for file in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    counts = dict(line.split() for line in (folder / file).read_text().splitlines())
                    return counts.get("oom_kill", "0") != "0"
        return False

    def remove(self, seconds: float = _END_SECONDS) -> None:
        """Kill what is left in the group, wait until it is gone, for `seconds` at most, and remove the group."""
        until = time.monotonic() + seconds
        while not all(_removed(folder) for folder in self.folders) and time.monotonic() < until:
            for pid in self._pids():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def _pids(self) -> Iterator[int]:
        for folder in self.folders:
            with contextlib.suppress(OSError):
                yield from map(int, (folder / "cgroup.procs").read_text().split())


def _make(folders: Mapping[Path, Mapping[str, object]], extra: Mapping[str, object]) -> Cgroup | None:
    """Make groups with their limits; None when this user may not. `extra` limits are set where the kernel has them."""
    group = Cgroup()
    try:
        for folder, limits in folders.items():
            _remove_stale(folder.parent)
            if "memory.max" in limits:
                _enable(folder.parent)
            folder.mkdir()
            group.folders += (folder,)
            for name, value in limits.items():
                (folder / name).write_text(str(value))
            for name, value in extra.items():
                with contextlib.suppress(OSError):
                    if (folder / name).exists():
                        (folder / name).write_text(str(value))
                        group.without_swap |= name in ("memory.swap.max", "memory.memsw.limit_in_bytes")
    except OSError:
        group.remove(0)
        return None
    joins = " && ".join(f'echo $$ > "{folder}/cgroup.procs"' for folder in folders)
    group.command = ["/bin/sh", "-c", f'{joins} && exec "$@"', "sh"]
    return group


def _enable(parent: Path) -> None:
    """Let groups below `parent` (version 2) have limits. A group that does so may hold no process itself."""
    control = parent / "cgroup.subtree_control"
    if {"memory", "pids"} <= set(control.read_text().split()):
        return
    try:
        control.write_text("+memory +pids")
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        leaf = parent / f"{_PREFIX}main"
        leaf.mkdir(exist_ok=True)
        for pid in (parent / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (leaf / "cgroup.procs").write_text(pid)
        control.write_text("+memory +pids")


def _scope(label: str, memory_bytes: int, processes: int) -> Cgroup:
    """A scope of the user's systemd (version 2 only), or an empty group."""
    if not systemd_works():
        return Cgroup()
    limits = {"MemoryMax": memory_bytes, "MemorySwapMax": 0, "TasksMax": processes}
    settings = [f"-p{name}={value}" for name, value in limits.items()]
    return Cgroup((), [*_SCOPE, f"--unit={label}-{time.monotonic_ns()}", *settings, "--"], without_swap=True)


_SCOPE = ["systemd-run", "--user", "--scope", "--quiet", "--collect"]


@cache
def systemd_works() -> bool:
    """Whether the user's systemd is there and may limit memory and processes."""
    if not shutil.which("systemd-run"):
        return False
    show = 'cat "/sys/fs/cgroup$(cut -d: -f3- /proc/self/cgroup)"/memory.max'
    probe = [*_SCOPE, "-pMemoryMax=1073741824", "-pTasksMax=64", "--", "/bin/sh", "-c", show]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(probe, capture_output=True, text=True, timeout=10, check=False)
        return re.fullmatch(r"1073741824\s*", done.stdout) is not None
    return False


def _own() -> Path:
    line = Path("/proc/self/cgroup").read_text().strip().rsplit("::", 1)[-1]
    own = ROOT / line.lstrip("/")
    return own.parent if own.name.startswith(_PREFIX) else own  # the scorer has moved


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _remove_stale(parent: Path) -> None:
    """Groups whose scorer was killed: empty by then, since its workers die with it."""
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        if not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
