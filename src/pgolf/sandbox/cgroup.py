"""Control groups: the kernel's own limits on memory and process count, where this user may set them."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")

_PREFIX = "pgolf-"


@dataclass(frozen=True)
class Cgroup:
    """A group made for one worker; empty `folders` when the machine lets us make none."""

    folders: tuple[Path, ...]

    @staticmethod
    def create(name: str, memory_bytes: int, processes: int) -> "Cgroup":
        """A group with both limits under either version of the interface, or one without folders."""
        v2 = (ROOT / "cgroup.controllers").exists()
        limits = {
            "memory": {"memory.max" if v2 else "memory.limit_in_bytes": memory_bytes},
            "pids": {"pids.max": processes},
        }
        parents = {_own_v2(): limits["memory"] | limits["pids"]} if v2 else {ROOT / c: limits[c] for c in limits}
        group = Cgroup(tuple(parent / f"{_PREFIX}{os.getpid()}-{name}" for parent in parents))
        try:
            for folder, (parent, values) in zip(group.folders, parents.items(), strict=True):
                _remove_stale(parent)
                if v2:
                    (parent / "cgroup.subtree_control").write_text("+memory +pids")
                folder.mkdir()
                for file, value in values.items():
                    (folder / file).write_text(str(value))
        except OSError:
            group.remove()
            return Cgroup(())
        return group

    def oom_killed(self) -> bool:
        """Whether the kernel killed a process of the group for its memory."""
        for folder in self.folders:
            for file in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    counts = dict(line.split() for line in (folder / file).read_text().splitlines())
                    return counts.get("oom_kill", "0") != "0"
        return False

    def remove(self) -> None:
        """Remove the group, which the kernel allows once its killed processes are gone."""
        for folder in self.folders:
            for _ in range(200):
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)
                else:
                    break


def _own_v2() -> Path:
    line = Path("/proc/self/cgroup").read_text().strip().rsplit("::", 1)[-1]
    return ROOT / line.lstrip("/")


def _remove_stale(parent: Path) -> None:
    """Groups whose scorer was killed: empty by then, since its workers die with it."""
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        if not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
