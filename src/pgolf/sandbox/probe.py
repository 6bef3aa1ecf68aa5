"""The isolation that is in force on this machine, tested with a real worker, and what is missing."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pgolf import rules
from pgolf.errors import EnvironmentBroken
from pgolf.sandbox import box, bubblewrap, environment, lock, place, private_copy, seccomp
from pgolf.sandbox.cgroup import Cgroup
from pgolf.sandbox.wire import Kind

_SECONDS = 120.0
_OPTIONAL = ("swap", "/dev/shm", "compiler")


@dataclass(frozen=True)
class Isolation:
    """What is in force around a submission's code on this machine."""

    description: str
    """For the record: "bubblewrap, cgroup v1, seccomp, private copy"."""
    memory_enforced: bool
    """Whether the kernel keeps the limits on memory and processes."""
    seccomp: bool
    lock_standard: bool
    """Whether the lock is the one that every scorer takes."""
    lock_reaches_machine: bool
    """Whether all scorers of the machine see that lock."""
    seconds: float
    """How long the test took; 0 without one."""

    def reasons(self, fresh_machine: bool) -> list[str]:
        """Why a score under it does not count. `fresh_machine`: the operator states that nothing else runs here."""
        found = {
            "the kernel does not keep the limits on memory and processes": self.memory_enforced,
            "there is no seccomp filter for this processor": self.seccomp,
            "the lock is not the machine's": self.lock_standard or fresh_machine,
            "this is a container, and others on the machine do not see its lock": self.lock_reaches_machine
            or fresh_machine,
        }
        return [reason for reason, holds in found.items() if not holds]


@dataclass(frozen=True)
class Check:
    """One thing that an eligible score needs of the machine."""

    name: str
    holds: bool
    reason: str
    """What was found."""
    remedy: str
    """What to do about it; empty when it holds."""

    @property
    def needed(self) -> bool:
        """Whether an eligible score needs it. Without the others a score is slower, or only some submissions fail."""
        return self.name not in _OPTIONAL


@cache
def isolation() -> Isolation:
    """The isolation that is in force, without trying it. Raises EnvironmentBroken when there is no bubblewrap."""
    bubblewrap.program(os.environ.get("PATH"))
    group = _group()
    parts = ["bubblewrap", group.version, "seccomp" if seccomp.program() else "no seccomp", "private copy"]
    return Isolation(
        description=", ".join(parts),
        memory_enforced=group.enforced,
        seccomp=seccomp.program() is not None,
        lock_standard=lock.is_standard(),
        lock_reaches_machine=lock.reaches_machine(),
        seconds=0.0,
    )


@cache
def check_isolation(device: str = "cpu", compiler: bool = False) -> Isolation:
    """Start the real worker, which imports what it needs and uses the device, and the compiler if asked.

    Raises EnvironmentBroken, with cause and remedy, when that fails.
    """
    start = time.monotonic()
    found = isolation()
    with box.Worker(
        "probe",
        {"probe": b"probe"},
        isolated=True,
        device=device,
        config={"compile": compiler},
        compiler=compiler,
    ) as worker:
        worker.channel.deadline = start + _SECONDS
        try:
            worker.receive(Kind.READY, 0)
        except Exception as error:
            words = str(error) or type(error).__name__
            raise EnvironmentBroken(f"the sandbox does not work here ({words}); see `pgolf doctor`") from None
    return replace(found, seconds=round(time.monotonic() - start, 3))


def report(device: str = "cpu", names: Sequence[str] = ()) -> list[Check]:
    """The checks that an eligible score needs on this machine; only those in `names` if there are any."""
    checks = {
        "sandbox": lambda: f"works, {check_isolation(device).description}",
        "memory limit": _memory_limit,
        "swap": _swap,
        "seccomp": _filter,
        "private copy": _copy,
        "/dev/shm": _shared_memory,
        "lock": _lock,
        "machine": _machine,
        "shell limits": place.check_limits,
        "compiler": lambda: _compiles(device),
    }
    return [_tried(name, attempt) for name, attempt in checks.items() if not names or name in names]


def _tried(name: str, attempt: Callable[[], str]) -> Check:
    """A check that holds unless the attempt raises EnvironmentBroken, whose sentence ends with the remedy."""
    try:
        return Check(name, True, attempt(), "")
    except EnvironmentBroken as error:
        reason, _, remedy = str(error).rpartition("; ")
        return Check(name, False, reason, remedy) if reason else Check(name, False, str(error), "see the reason")


def _memory_limit() -> str:
    group = _group()
    if not group.enforced:
        raise EnvironmentBroken(
            "this user may make no control group, so nothing keeps the limits on memory and processes; score as root, "
            "or in a login session of systemd with cgroup v2 (`systemd-run --user --scope true` tries it)"
        )
    return f"the kernel keeps it ({group.version}, {place.limits('predict').memory_bytes / 1024**3:.1f} GiB)"


def _swap() -> str:
    swaps: list[str] = []
    with contextlib.suppress(OSError):
        swaps = Path("/proc/swaps").read_text().splitlines()[1:]
    if swaps and not _group().without_swap:
        raise EnvironmentBroken("a sandbox can use swap beyond its memory limit; swapoff -a while scoring")
    return "a sandbox cannot use any"


def _group() -> Cgroup:
    """A group like a worker's; it has been removed again."""
    group = Cgroup.create("probe", place.limits("predict").memory_bytes, rules.WORKER_PROCESSES)
    group.remove()
    return group


def _filter() -> str:
    if seccomp.program() is None:
        raise EnvironmentBroken(f"no filter for the processor {os.uname().machine}; score on x86-64 or aarch64")
    return f"the filter knows the processor {os.uname().machine}"


def _compiles(device: str) -> str:
    check_isolation(device, compiler=True)
    return "g++ works in a sandbox that declares it"


def _copy() -> str:
    wanted = environment.listing("predict")
    with private_copy.private_copy(wanted) as made:
        return f"{wanted.bytes / 1e6:,.0f} MB in {made.root.parent}, {made.seconds:.1f} s"


def _shared_memory() -> str:
    folder = private_copy.base(environment.listing("predict").bytes)
    if folder != Path("/dev/shm"):
        raise EnvironmentBroken(
            f"cannot hold the private copy, which goes to {folder} and takes longer; mount a tmpfs of 4 GB there "
            "(Docker: --shm-size=4g), without noexec"
        )
    return "has room for the private copy"


def _lock() -> str:
    if not lock.is_standard():
        raise EnvironmentBroken(f"PGOLF_LOCK names another lock than every scorer's, {lock.path()}; unset PGOLF_LOCK")
    with contextlib.suppress(lock.Held), lock.hold(0, lambda _: None):
        pass
    return f"{lock.path()} is every scorer's"


def _machine() -> str:
    if not lock.reaches_machine():
        raise EnvironmentBroken(
            "this is a container, and the lock does not reach other ones on the machine; score on the machine itself, "
            "or in a fresh virtual machine with --fresh-machine"
        )
    return "this is no container"


def main(names: Sequence[str] = ()) -> int:
    """Print a line for each check that fails, of all or of those named. Exit code 3 if one of those named does."""
    failing = [check for check in report(names=names) if not check.holds]
    for check in failing:
        print(f"{check.name}: {check.reason}" + (f"; {check.remedy}" if check.remedy else ""))
    return EnvironmentBroken.exit_code if names and failing else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
