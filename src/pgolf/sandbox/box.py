"""The box that untrusted code runs in: bubblewrap, control groups, seccomp, and a watchdog outside.

Inside there are no network, no host files but a read-only Python environment, no other processes, and
a bounded amount of memory, processes, disk and output. The artifact's members reach the box through memory
files, so nothing is unpacked on the host and nothing stays behind, however the scorer ends.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pgolf import rules
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.sandbox import seccomp
from pgolf.sandbox.cgroup import Cgroup
from pgolf.sandbox.wire import Channel, Kind, Ring, WireError

MINIMUM_BWRAP = (0, 8)  # the first with --disable-userns

_ARTIFACT = Path("/artifact")
_HARNESS = Path("/harness")
_BOOT = (
    "import json, sys; c = json.loads(sys.argv[1]); sys.path[:0] = c['harness']; sys.path += c['packages']; "
    "from pgolf.sandbox.guest import main; main()"
)
_NAMESPACES = (
    *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
    *("--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--hostname", "box"),
)
_SYSTEM = tuple(Path(p) for p in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"))
_NOT_NEEDED = (Path("/usr/share"), Path("/usr/local/share"), Path("/usr/src"))  # text to learn from, free of charge
_HARNESS_FILES = ("__init__.py", "sandbox/__init__.py", "sandbox/wire.py", "sandbox/guest.py")
_POLL_SECONDS = 0.1
_TAIL_BYTES = 16_384
_WORDS = 300


def check_isolation() -> str:
    """Describe the isolation that will be in force. Raises EnvironmentBroken when there is none to be had."""
    fix = "install bubblewrap (apt install bubblewrap), or pass --no-sandbox for a score that does not count"
    if shutil.which("bwrap") is None:
        raise EnvironmentBroken(f"bubblewrap is not installed, so untrusted code cannot be boxed in; {fix}")
    printed = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False).stdout
    version = tuple(map(int, re.findall(r"\d+", printed)[:2]))
    if version < MINIMUM_BWRAP:
        raise EnvironmentBroken(f"{printed.strip() or 'bwrap'} is too old, 0.8 is needed; {fix}")
    with contextlib.ExitStack() as stack:
        fds: list[int] = []
        probe = [*_bubblewrap(stack, {}, fds), sys.executable, "-I", "-c", ""]
        done = subprocess.run(probe, capture_output=True, text=True, pass_fds=fds, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise EnvironmentBroken(f"bubblewrap cannot make a sandbox here ({reason[0]}); {fix}")
    group = Cgroup.create("probe", rules.WORKER_MEMORY_BYTES, rules.WORKER_PROCESSES)
    group.remove()
    limits = "cgroup" if group.folders else "rlimit"
    return f"bubblewrap, {limits}" + (", seccomp" if seccomp.program() else "")


class Worker:
    """One boxed process in one role, and the channel to it. A context manager: leaving kills it."""

    def __init__(
        self,
        role: str,
        members: Mapping[str, bytes],
        *,
        isolated: bool,
        device: str = "cpu",
        ring: Ring | None = None,
        config: Mapping[str, Any] = {},
        packages: Sequence[str] = (),
        compiler: bool = False,
    ) -> None:
        """Start `role` with `members` as its files.

        `deadline` is a value of time.monotonic(). `device` is "cpu" or "cuda:N". Without `isolated` the code
        runs with all rights of this user.
        """
        self.role = role
        self._verdict = ""
        self._tail: deque[bytes] = deque()
        self._stack = contextlib.ExitStack()
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, time.monotonic() + 120)
        self._stack.callback(ours.close)
        self._group = Cgroup(())
        fds = [theirs.fileno(), *([ring.fd] if ring else [])]
        root, harness = _ARTIFACT, _HARNESS
        if not isolated:
            root = _write_members(self._stack, members)
            harness = Path(__file__).parent.parent.parent
        config = {
            **config,
            "role": role,
            "imports": ["numpy", "torch"] if role == "predict" else ["numpy"],
            "root": str(root),
            "harness": [str(harness)],
            "packages": [str(path) for path in _package_folders()],
            "socket": theirs.fileno(),
            "device": "cuda" if device.startswith("cuda") else device,
            "ring": ring.fd if ring else -1,
            "slot_bytes": ring.slot_bytes if ring else 0,
            "limits": {"RLIMIT_CORE": 0, "RLIMIT_NPROC": rules.WORKER_PROCESSES} if isolated else {},
        }
        command = [sys.executable, "-I", "-c", _BOOT, json.dumps(config)]
        if isolated:
            self._group = Cgroup.create(f"{role}-{theirs.fileno()}", memory_limit(), rules.WORKER_PROCESSES)
            command = [*_bubblewrap(self._stack, members, fds, device), *command]
            command = [*_enter(self._group), *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
            env=_environment(device),
            cwd="/" if isolated else root,
            start_new_session=True,
        )
        theirs.close()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._watch)]
        for thread in self._threads:
            thread.start()
        self.receive(Kind.STARTED, 0)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill everything in the box and wait until it is gone."""
        self._kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        if self._process.stdout:
            self._process.stdout.close()
        self._stack.close()
        self._group.remove()

    def output(self) -> str:
        """The end of what the box printed."""
        return b"".join(self._tail).decode("utf-8", "replace")

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a frame into the box. Raises Refused when it is gone, TimeoutError past the deadline."""
        try:
            self.channel.send(kind, payload)
        except WireError as error:
            raise Refused(self._explain(error)) from None

    def receive(self, expected: Kind, most: int) -> bytes:
        """Payload of the next frame from the box (see `Channel.receive`); Refused in place of WireError."""
        try:
            return self.channel.receive(expected, most)
        except WireError as error:
            raise Refused(self._explain(error)) from None

    def _explain(self, error: WireError) -> str:
        """One line for a worker that failed: a limit it hit, how it ended, or its own words made harmless."""
        gone = str(error) == "the other side is gone"
        if gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=2)
        if self._group.oom_killed():
            self._verdict = _over_memory()
        if self._verdict:
            return f"{self.role}: {self._verdict}"
        status = self._process.poll()
        if gone and status is not None:
            number = status - 128 if status > 128 else -status
            names = {known.value: known.name for known in signal.Signals}
            ended = f"killed by {names[number]}" if number in names else f"exit status {status}"
            return f"{self.role}: the process ended before it answered ({ended})"
        words = "".join(c if c.isprintable() else " " for c in str(error))
        return f"{self.role}: {words[:_WORDS]}"

    def _kill(self) -> None:
        """Kill every process of the box; its own init, which hostile code lives beside, is not relied upon."""
        if self._process.poll() is None:
            for kill, pid in [(os.killpg, self._process.pid), *((os.kill, p) for p in _descendants(self._process.pid))]:
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)

    def _stop(self, verdict: str) -> None:
        self._verdict = verdict
        self._kill()

    def _read(self) -> None:
        """Drain what the box prints, keep the end, and stop a flood."""
        assert self._process.stdout is not None
        total = 0
        while part := os.read(self._process.stdout.fileno(), 65_536):
            total += len(part)
            self._tail.append(part)
            while sum(map(len, self._tail)) - len(self._tail[0]) > _TAIL_BYTES:
                self._tail.popleft()
            if total > rules.WORKER_OUTPUT_BYTES:
                self._stop(f"printed more than {rules.WORKER_OUTPUT_BYTES:,} bytes")
                return

    def _watch(self) -> None:
        """Enforce memory and process limits from outside, for machines without writable control groups."""
        page = os.sysconf("SC_PAGESIZE")
        while self._process.poll() is None:
            pids = list(_descendants(self._process.pid))
            resident = threads = 0
            for pid in pids:
                with contextlib.suppress(OSError, ValueError, IndexError):
                    resident += page * int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    threads += len(list(Path(f"/proc/{pid}/task").iterdir()))
            if resident > memory_limit():
                self._stop(_over_memory())
            elif threads > rules.WORKER_PROCESSES:
                self._stop(f"started more than {rules.WORKER_PROCESSES} processes")
            time.sleep(_POLL_SECONDS)


def check_hidden(path: Path) -> None:
    """Raises EnvironmentBroken when boxed code could read `path`."""
    for folder in _system_folders():
        if path.resolve().is_relative_to(folder.resolve()):
            raise EnvironmentBroken(f"{path}: lies in {folder}, which the submission can read; move the data elsewhere")


def memory_limit() -> int:
    """Bytes that a worker may use here: the rule, or what leaves the machine alive if that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    return min(rules.WORKER_MEMORY_BYTES, physical * 3 // 4)


def _over_memory() -> str:
    return f"used more than {memory_limit() / 1024**3:.1f} GiB of memory"


def _descendants(pid: int) -> Iterator[int]:
    """`pid` and all processes below it. Orphans stay below: the box's init adopts them."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _descendants(int(child))


def _enter(group: Cgroup) -> list[str]:
    """Command prefix that puts itself, and so all that follows, into the group."""
    if not group.folders:
        return []
    joins = " && ".join(f"echo $$ > {folder}/cgroup.procs" for folder in group.folders)
    return ["sh", "-c", f'{joins} && exec "$@"', "sh"]


def _environment(device: str) -> dict[str, str]:
    """What the box sees: nothing of this process's own environment."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) and visible[0] else str(index)
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _bubblewrap(
    stack: contextlib.ExitStack, members: Mapping[str, bytes], fds: list[int], device: str = "cpu"
) -> list[str]:
    """The bwrap command line up to the command it runs; descriptors it needs are added to `fds`."""
    # /tmp first: the Python environment may lie below it.
    command = ["bwrap", *_NAMESPACES, "--size", str(rules.WORKER_DISK_BYTES), "--tmpfs", "/tmp"]
    for path in _system_folders():
        linked = path.is_symlink() and path in _SYSTEM
        command += ["--symlink", str(path.readlink())] if linked else ["--ro-bind", str(path)]
        command += [str(path)]
    python = _python_folders()
    for path in _NOT_NEEDED:
        if path.is_dir() and not path.is_symlink() and not any(p.is_relative_to(path) for p in python):
            command += ["--tmpfs", str(path), "--remount-ro", str(path)]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/dev/shm", "--remount-ro", "/dev/shm"]
    if device.startswith("cuda"):
        command += ["--ro-bind", "/sys", "/sys"]
        for node in sorted(Path("/dev").glob("nvidia*")):
            command += ["--dev-bind", str(node), str(node)]
    for name in _HARNESS_FILES:
        command += ["--ro-bind", str(Path(__file__).parent.parent / name), str(_HARNESS / "pgolf" / name)]
    command += ["--dir", str(_ARTIFACT)]
    for name, data in members.items():
        fds.append(_memory_file(stack, data))
        command += ["--perms", "0444", "--file", str(fds[-1]), str(_ARTIFACT / name)]
    if program := seccomp.program():
        fds.append(_memory_file(stack, program))
        command += ["--seccomp", str(fds[-1])]
    # /proc too: it could set the host's sysctls where the scorer runs as root, and rewrite the box's own init.
    read_only = [part for path in ("/proc", "/dev", "/") for part in ("--remount-ro", path)]
    return [*command, *read_only, "--chdir", str(_ARTIFACT), "--"]


def _system_folders() -> list[Path]:
    """What Python and torch need of the host, read-only."""
    folders: list[Path] = []
    for path in (*_SYSTEM, *_python_folders()):
        if path.exists() and not any(path.is_relative_to(known) for known in folders):
            folders.append(path)
    return folders


def _python_folders() -> list[Path]:
    return [Path(sys.prefix), Path(sys.base_prefix), *_package_folders()]


def _package_folders() -> list[Path]:
    """Where installed packages are; never the working directory or a source tree."""
    candidates = [*site.getsitepackages(), site.getusersitepackages()]
    return [Path(p) for p in candidates if p in sys.path and Path(p).is_dir()]


def _memory_file(stack: contextlib.ExitStack, data: bytes) -> int:
    """A descriptor that reads `data` from its start; closed with `stack`."""
    fd = os.memfd_create("pgolf-member", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _write_members(stack: contextlib.ExitStack, members: Mapping[str, bytes]) -> Path:
    """The members as plain files, for a run without sandbox."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgolf-")))
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root
