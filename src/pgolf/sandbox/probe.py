"""What a machine can do: the isolation that is in force here, tried for real, and what is missing."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pgolf import rules
from pgolf.errors import EnvironmentBroken
from pgolf.sandbox import box, bubblewrap, environment, lock, private_copy, seccomp
from pgolf.sandbox.cgroup import Cgroup
from pgolf.sandbox.wire import Kind

_SECONDS = 120.0


@dataclass(frozen=True)
class Isolation:
    """What is in force around a submission's code on this machine."""

    description: str
    """For the record: "bubblewrap, cgroup v1, seccomp, private copy"."""
    memory_enforced: bool
    """Whether the kernel keeps the limits on memory and processes."""
    seccomp: bool
    private_copy: bool
    lock_standard: bool
    """Whether the lock is the one that every scorer takes."""
    lock_reaches_machine: bool
    """Whether all scorers of the machine see that lock."""
    seconds: float
    """What trying it took; 0 where it was not tried."""

    def reasons(self, fresh_machine: bool) -> list[str]:
        """Why a score under it does not count. `fresh_machine`: the operator's word that nothing else runs here."""
        found = {
            "the kernel does not keep the limits on memory and processes": self.memory_enforced,
            "there is no seccomp filter for this processor": self.seccomp,
            "the sandbox shares files with earlier ones": self.private_copy or fresh_machine,
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
    needed: bool = True
    """Whether no score counts without it; else it costs time, or a submission that asks for it fails."""


@cache
def isolation(seconds: float = 0.0) -> Isolation:
    """The isolation that is in force, without trying it. Raises EnvironmentBroken when there is no bubblewrap."""
    bubblewrap.program(os.environ.get("PATH"))
    group = Cgroup.create("probe", box.memory_limit(), rules.WORKER_PROCESSES)
    group.remove()
    parts = ["bubblewrap", group.version, "seccomp" if seccomp.program() else "no seccomp", "private copy"]
    return Isolation(
        description=", ".join(parts),
        memory_enforced=group.enforced,
        seccomp=seccomp.program() is not None,
        private_copy=True,
        lock_standard=lock.is_standard(),
        lock_reaches_machine=lock.reaches_machine(),
        seconds=seconds,
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
    return Isolation(**{**found.__dict__, "seconds": round(time.monotonic() - start, 3)})


def report(device: str = "cpu") -> list[Check]:
    """Everything that an eligible score needs of this machine."""
    checks = [
        _tried("sandbox", lambda: f"works, {check_isolation(device).description}"),
        _memory_limit(),
        _check(
            "seccomp",
            seccomp.program() is not None,
            f"the filter knows the processor {os.uname().machine}",
            f"no filter for the processor {os.uname().machine}",
            "score on x86-64 or aarch64",
        ),
        _tried("private copy", _copy_place),
        _shared_memory(),
        _check(
            "lock",
            lock.is_standard(),
            f"{lock.path()} is every scorer's",
            f"PGOLF_LOCK names another lock, {lock.path()}",
            "unset PGOLF_LOCK",
        ),
        _check(
            "machine",
            lock.reaches_machine(),
            "this is no container",
            "this is a container, and the lock does not reach the others on the machine",
            "score on the machine itself, or in a fresh virtual machine with --fresh-machine",
        ),
        _swap(),
        _tried("shell limits", box.check_limits),
        _tried("compiler", lambda: _compiles(device), needed=False),
    ]
    return checks


def _check(name: str, holds: bool, good: str, bad: str, remedy: str, needed: bool = True) -> Check:
    return Check(name, holds, good if holds else bad, "" if holds else remedy, needed)


def _tried(name: str, attempt: Callable[[], str], needed: bool = True) -> Check:
    """A check that holds unless the attempt raises EnvironmentBroken, whose sentence ends with the remedy."""
    try:
        return Check(name, True, attempt(), "", needed)
    except EnvironmentBroken as error:
        reason, _, remedy = str(error).rpartition("; ")
        return Check(name, False, reason or str(error), remedy if reason else "see the reason", needed)


def _memory_limit() -> Check:
    group = Cgroup.create("probe", box.memory_limit(), rules.WORKER_PROCESSES)
    group.remove()
    return _check(
        "memory limit",
        group.enforced,
        f"the kernel keeps it ({group.version}, {box.memory_limit() / 1024**3:.1f} GiB)",
        "this user may make no control group, so nothing keeps the limits on memory and processes",
        "score as root, or in a login session of systemd with cgroup v2 (`systemd-run --user --scope true` tries it)",
    )


def _compiles(device: str) -> str:
    check_isolation(device, compiler=True)
    return "g++ works in a sandbox that declares it"


def _copy_place() -> str:
    wanted = environment.listing("predict")
    with private_copy.private_copy(wanted) as made:
        return f"{wanted.bytes / 1e6:,.0f} MB in {made.root.parent}, {made.seconds:.1f} s"


def _shared_memory() -> Check:
    place = private_copy.base(environment.listing("predict").bytes)
    return _check(
        "/dev/shm",
        place == Path("/dev/shm"),
        "has room for the private copy",
        f"cannot hold the private copy, which goes to {place} and takes longer",
        "mount a tmpfs of 4 GB on /dev/shm (Docker: --shm-size=4g), without noexec",
        needed=False,
    )


def _swap() -> Check:
    swaps = []
    with contextlib.suppress(OSError):
        swaps = Path("/proc/swaps").read_text().splitlines()[1:]
    group = Cgroup.create("probe", box.memory_limit(), rules.WORKER_PROCESSES)
    kept = group.without_swap()
    group.remove()
    return _check(
        "swap",
        not swaps or kept,
        "a sandbox cannot use any",
        "a sandbox can use swap beyond its memory limit",
        "swapoff -a while scoring",
        needed=False,
    )


def main() -> int:
    """One line for each check that fails; always 0, since it is advice."""
    for check in report():
        if not check.holds:
            print(f"{check.name}: {check.reason}; {check.remedy}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
