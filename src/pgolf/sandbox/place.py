"""Where a worker runs: in a sandbox, or with all rights of this user in a temporary folder."""

import contextlib
import os
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf import rules
from pgolf.errors import EnvironmentBroken
from pgolf.sandbox import bubblewrap, counters, environment, seccomp
from pgolf.sandbox.bubblewrap import ARTIFACT, HARNESS
from pgolf.sandbox.cgroup import Cgroup
from pgolf.sandbox.private_copy import Copy, private_copy

_FILES = 1024  # open files per process: bounds what lies in the buffers of pipes and sockets
_LEAST = {  # limits inherited from a shell: how high each has to be; 0: it must be unlimited
    "RLIMIT_AS": "memory",
    "RLIMIT_DATA": "memory",
    "RLIMIT_FSIZE": str(rules.WORKER_DISK_BYTES),
    "RLIMIT_CPU": "0",
}


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    command: list[str]
    """What stands before the interpreter on the command line."""
    setup: dict[str, Any]
    """What the guest has to know about it."""
    descriptors: list[int]
    """What the command reads."""
    folder: str
    """Working directory of the command."""
    group: Cgroup
    copied: Copy | None = None


def sandboxed(
    stack: contextlib.ExitStack,
    starting: contextlib.ExitStack,
    role: str,
    members: Mapping[str, bytes],
    device: str,
    packages: Sequence[str],
    compiler: bool,
) -> Place:
    """Make a private copy and a control group, which `stack` removes, and the command line of a sandbox from them.

    `starting` closes the memory files that hold the artifact's `members`. Raises EnvironmentBroken.
    """
    check_limits()  # a limit of the shell would look like a mistake of the submission
    cuda = device.startswith("cuda")
    wanted = environment.listing(role, tuple(packages), compiler, cuda)
    copied = stack.enter_context(private_copy(wanted, bubblewrap.harness_files()))
    program = seccomp.program(compiler, cuda)
    artifact = {name: memory_file(starting, data) for name, data in members.items()}
    static = {name: memory_file(starting, data) for name, data in bubblewrap.static_proc(memory_limit()).items()}
    filter_fd = memory_file(starting, program) if program else None
    nodes = bubblewrap.gpu_nodes(device) if cuda else []
    line = bubblewrap.command(copied, artifact, filter_fd, static, bubblewrap.variables(device), cuda, nodes)
    group = Cgroup.create(role, memory_limit(), rules.WORKER_PROCESSES)
    for _ in range(2):  # the second in case a signal breaks the first off
        stack.callback(group.remove)
    counters.use_up_batches()  # last, since each file made here takes a number
    limits = {"RLIMIT_CORE": 0, "RLIMIT_NPROC": rules.WORKER_PROCESSES, "RLIMIT_NOFILE": _FILES}
    setup = {
        "root": str(ARTIFACT),
        "harness": [str(HARNESS)],
        "packages": [str(path) for path in wanted.packages],
        "limits": limits | dict.fromkeys(_LEAST, -1),
    }
    descriptors = [*artifact.values(), *static.values(), *([] if filter_fd is None else [filter_fd])]
    return Place([*group.command, *line], setup, descriptors, "/", group, copied)


def plain(stack: contextlib.ExitStack, members: Mapping[str, bytes]) -> Place:
    """No sandbox: the members become files in a temporary folder, which `stack` removes."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgolf-")))
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    setup = {
        "root": str(root),
        "harness": [str(Path(__file__).parent.parent.parent)],
        "packages": [path for path in sys.path if path and Path(path).is_dir()],
        "limits": {},
    }
    return Place([], setup, [], str(root), Cgroup())


def memory_limit() -> int:
    """Bytes that a worker may use here: the rule, or what leaves the machine alive if that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    return min(rules.WORKER_MEMORY_BYTES, physical * 3 // 4)


def check_limits() -> str:
    """Say that the limits which this process was started with are high enough; EnvironmentBroken if one is not."""
    for name, least in _LEAST.items():
        _, hard = resource.getrlimit(getattr(resource, name))
        needed = memory_limit() if least == "memory" else int(least)
        if hard != resource.RLIM_INFINITY and (not needed or hard < needed):
            raise EnvironmentBroken(
                f"{name} of this shell is {hard:,}, less than a submission may use; "
                f"start a shell without it (`ulimit -a` lists them)"
            )
    return "no limit of the shell is in the way"


def memory_file(stack: contextlib.ExitStack, data: bytes) -> int:
    """A descriptor that reads `data` from its start; closed with `stack`."""
    fd = os.memfd_create("pgolf-member", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
