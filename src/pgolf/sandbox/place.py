"""Where a worker runs: in a sandbox, or with all rights of this user in a temporary folder."""

import contextlib
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf import rules
from pgolf.errors import EnvironmentBroken
from pgolf.sandbox import bubblewrap, counters, environment, seccomp
from pgolf.sandbox.bubblewrap import ARTIFACT, HARNESS
from pgolf.sandbox.cgroup import Cgroup
from pgolf.sandbox.private_copy import DATA, SHARDS, Copy, private_copy

PORTS_SECONDS = 10.5
"""How long a sandbox with a loopback device waits, at least, after an earlier one has ended.

Source ports are counted in a table that all network namespaces share. The secret by which the kernel chooses counter
and port changes every 10 s (net/core/secure_seq.c, Linux 5.18 and stable releases since), and what was marked before
means nothing.
"""
_FILES = 1024  # open files per process: bounds what lies in the buffers of pipes and sockets
_LEAST = {  # limits inherited from a shell: how high each has to be; 0: it must be unlimited
    "RLIMIT_AS": "memory",
    "RLIMIT_DATA": "memory",
    "RLIMIT_FSIZE": str(rules.WORKER_DISK_BYTES),
    "RLIMIT_CPU": "0",
}


@dataclass(frozen=True)
class Limits:
    """What a worker may use."""

    memory_bytes: int
    processes: int
    """Threads count."""
    disk_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Training:
    """What the sandbox of a trainer has besides its code."""

    files: Mapping[str, bytes]
    """Of the dataset folder, from the start."""
    shards: Mapping[str, Path]
    """Files that appear when the clock starts, by their names in the dataset folder's `shards`."""
    network: bool
    """Whether its processes talk to each other: a loopback device that nobody else is on."""


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
    reveal: Callable[[], None]
    """Make the training shards appear."""
    copied: Copy | None = None


def sandboxed(
    stack: contextlib.ExitStack,
    starting: contextlib.ExitStack,
    role: str,
    members: Mapping[str, bytes],
    device: str,
    packages: Sequence[str],
    compiler: bool,
    training: Training | None,
) -> Place:
    """Make a private copy and a control group, which `stack` removes, and the command line of a sandbox from them.

    `starting` closes the memory files that hold the artifact's `members`. Raises EnvironmentBroken.
    """
    begun = time.monotonic()  # under the lock, so earlier sandboxes have ended
    check_limits()  # a limit of the shell would look like a mistake of the submission
    cuda = device.startswith("cuda")
    wanted = environment.listing(role, tuple(packages), compiler, cuda)
    network = training is not None and training.network
    files = bubblewrap.harness_files(whole=training is not None)
    if training:
        files |= {DATA / name: data for name, data in training.files.items()}
        files |= {Path("/etc/hosts"): b"127.0.0.1 localhost sandbox\n"} if network else {}
    copied = stack.enter_context(private_copy(wanted, files, training.shards if training else None))
    program = seccomp.program(compiler, cuda, network)
    allowed = limits(role)
    artifact = {name: memory_file(starting, data) for name, data in members.items()}
    static = {name: memory_file(starting, data) for name, data in bubblewrap.static_proc(allowed.memory_bytes).items()}
    filter_fd = memory_file(starting, program) if program else None
    nodes = bubblewrap.gpu_nodes(device) if cuda else []
    variables = bubblewrap.variables(device)
    line = bubblewrap.command(copied, artifact, filter_fd, static, variables, cuda, nodes, allowed.disk_bytes, network)
    group = Cgroup.create(role, allowed.memory_bytes, allowed.processes)
    for _ in range(2):  # the second in case a signal breaks the first off
        stack.callback(group.remove)
    if network:
        time.sleep(max(0.0, begun + PORTS_SECONDS - time.monotonic()))
    counters.use_up_batches()  # last, since each file made here takes a number
    rlimits = {"RLIMIT_CORE": 0, "RLIMIT_NPROC": allowed.processes, "RLIMIT_NOFILE": _FILES}
    setup = {
        "root": str(ARTIFACT),
        "data": str(DATA),
        "harness": [str(HARNESS)],
        "packages": [str(path) for path in wanted.packages],
        "limits": rlimits | dict.fromkeys(_LEAST, -1),
    }
    descriptors = [*artifact.values(), *static.values(), *([] if filter_fd is None else [filter_fd])]
    return Place([*group.command, *line], setup, descriptors, "/", group, copied.reveal, copied)


def plain(stack: contextlib.ExitStack, members: Mapping[str, bytes], training: Training | None) -> Place:
    """No sandbox: the members become files in a temporary folder, which `stack` removes."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgolf-")))
    root, data = folder / "artifact", folder / "data"
    root.mkdir()
    for base, files in ((root, members), (data, training.files if training else {})):
        for name, content in files.items():
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_bytes(content)

    def reveal() -> None:
        (data / SHARDS.name).mkdir(exist_ok=True)  # the trainer may have made it: a traceback of ours helps nobody
        for name, path in (training.shards if training else {}).items():
            shutil.copyfile(path, data / SHARDS.name / name)

    setup = {
        "root": str(root),
        "data": str(data),
        "harness": [str(Path(__file__).parent.parent.parent)],
        "packages": [path for path in sys.path if path and Path(path).is_dir()],
        "limits": {},
    }
    return Place([], setup, [], str(root), Cgroup(), reveal)


def limits(role: str) -> Limits:
    """What a worker in `role` may use here: of memory what the rule says, or what leaves the machine alive if less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    if role == "train":
        memory = int(physical * rules.TRAIN_MEMORY)
        return Limits(memory, rules.TRAIN_PROCESSES, rules.TRAIN_DISK_BYTES, rules.TRAIN_OUTPUT_BYTES)
    memory = min(rules.WORKER_MEMORY_BYTES, physical * 3 // 4)
    return Limits(memory, rules.WORKER_PROCESSES, rules.WORKER_DISK_BYTES, rules.WORKER_OUTPUT_BYTES)


def check_limits() -> str:
    """Say that the limits which this process was started with are high enough; EnvironmentBroken if one is not."""
    for name, least in _LEAST.items():
        _, hard = resource.getrlimit(getattr(resource, name))
        needed = limits("predict").memory_bytes if least == "memory" else int(least)
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
