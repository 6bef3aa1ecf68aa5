"""The sandbox that untrusted code runs in: bubblewrap, control groups, seccomp, and a watchdog outside.

Inside there are no network, no files but a private copy of the Python environment, no other processes, and a bounded
amount of memory, processes, disk and output. The artifact's members reach the sandbox through memory files.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from pgolf import rules
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.machine import available_memory, suspended_seconds
from pgolf.sandbox import bubblewrap, environment
from pgolf.sandbox.place import Place, Training, limits, plain, sandboxed
from pgolf.sandbox.private_copy import Copy
from pgolf.sandbox.wire import Channel, Kind, Ring, WireError

_BOOT = (
    "import json, sys; c = json.loads(sys.argv[1]); sys.path[:0] = c['harness']; sys.path += c['packages']; "
    "from pgolf.sandbox.guest import main; main()"
)
_DESCRIPTORS = 200  # the sandbox's descriptors have numbers from here on, whatever else this process has open
_POLL_SECONDS = 0.1
WATCH_SECONDS = 0.5
_END_SECONDS = 30.0
_TAIL_BYTES = 16_384
_WORDS = 300
_GONE = "the other side is gone"  # as `wire` says it


show_output: ContextVar[Callable[[str, str], object]] = ContextVar("show_output", default=lambda role, output: None)
"""Gets role and `Worker.output` of each sandbox at its end: hostile, and it may hold text that has been scored."""


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """A list that gets what each sandbox printed, besides what is done with it already."""
    before, printed = show_output.get(), list[str]()

    def keep(role: str, output: str) -> None:
        printed.append(output)
        before(role, output)

    previous = show_output.set(keep)
    try:
        yield printed
    finally:
        show_output.reset(previous)


class Worker:
    """One sandboxed process in one role, and the channel to it. A context manager: leaving kills it."""

    def __init__(
        self,
        role: str,
        members: Mapping[str, bytes],
        *,
        isolated: bool,
        device: str = "cpu",
        ring: Ring | None = None,
        config: Mapping[str, Any] | None = None,
        packages: Sequence[str] = (),
        compiler: bool = False,
        training: Training | None = None,
    ) -> None:
        """Start `role` with `members` as its files; returns when the guest's imports are done.

        No code of the submission has been imported by then. Its channel has no deadline yet.

        `device` is "cpu", "cuda" (all GPUs) or "cuda:N". `config` is handed to the guest. `packages` are the packages
        that the submission declares, `compiler` says whether it may compile, `training` what a trainer has besides.
        Without `isolated` the code runs with all rights of this user.
        Raises EnvironmentBroken when the sandbox cannot be made or started here.
        """
        self.role = role
        self.limits = limits(role)
        self.copied: Copy | None
        """The private copy: bytes, and the seconds that making it took. None without `isolated`."""
        self._verdict = ""
        self._fault = ""
        self._tail: deque[bytes] = deque()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._suspended = suspended_seconds()
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.callback(ours.close)
            with theirs, contextlib.ExitStack() as starting:  # descriptors that only the new process keeps
                # First, so that no number that the guest sees depends on how many files are made.
                shared = [_numbered(starting, fd) for fd in (theirs.fileno(), *([ring.fd] if ring else []))]
                if isolated:
                    place = sandboxed(stack, starting, role, members, device, packages, compiler, training)
                else:
                    place = plain(stack, members, training)
                self.copied, self.group, self.reveal = place.copied, place.group, place.reveal
                setup = {**(config or {}), **_setup(role, device, shared, ring), "isolated": isolated, **place.setup}
                command = [*place.command, sys.executable, "-I", "-c", _BOOT, json.dumps(setup, allow_nan=False)]
                self._process = self._start(command, [*shared, *place.descriptors], device, place)
            stack.callback(self._join)
            stack.callback(ours.close)  # with it end the descriptors that wait in it, and the reader with them
            stack.callback(self._kill)
            self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._watch)]
            for thread in self._threads:
                thread.start()
            self.channel = Channel(ours, time.monotonic() + rules.START_SECONDS)
            self._await_start(isolated)
            self.group.started(self._process.pid)
            self.channel.deadline = None
            self._stack = stack.pop_all()  # from here on `close` undoes all of it

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill everything in the sandbox, wait until it is gone (for a limited time), and remove its traces."""
        self._stack.close()
        show_output.get()(self.role, self.output())

    def output(self) -> str:
        """The end of what the sandbox printed."""
        return b"".join(self._tail).decode("utf-8", "replace")

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a frame into the sandbox.

        Raises Refused when it is gone, TimeoutError past the deadline, EnvironmentBroken when the machine slept.
        """
        try:
            self.channel.send(kind, payload)
        except WireError as error:
            raise self._blame(error) from None
        except TimeoutError:
            self._check_awake()
            raise

    def receive(self, expected: Kind, most: int) -> bytes:
        """Payload of the next frame from the sandbox (see `Channel.receive`); errors as in `send`."""
        return self.receive_one_of({expected: most})[1]

    def receive_one_of(self, most: Mapping[Kind, int]) -> tuple[Kind, bytes]:
        """Kind and payload of the next frame (see `Channel.receive_one_of`); errors as in `send`."""
        try:
            return self.channel.receive_one_of(most)
        except WireError as error:
            raise self._blame(error) from None
        except TimeoutError:
            self._check_awake()
            raise

    def processes(self) -> list[psutil.Process]:
        """The process that was started and all below it. Orphans stay below: the sandbox's init adopts them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def _start(
        self, command: list[str], descriptors: list[int], device: str, place: Place
    ) -> "subprocess.Popen[bytes]":
        # Not /dev/null: that is the host's own, on which a sandbox could leave a mark.
        nothing, end = os.pipe()
        os.close(end)
        try:
            return subprocess.Popen(
                command,
                stdin=nothing,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                env={**self.group.variables(), **bubblewrap.variables(device)},
                cwd=place.folder,
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentBroken(f"{command[0]} cannot be started: {error.strerror}") from None
        finally:
            os.close(nothing)

    def _await_start(self, isolated: bool) -> None:
        """Wait until the guest's own imports are done. Up to there every failure is the machine's."""
        try:
            self.channel.receive(Kind.STARTED, 0)
        except TimeoutError:
            self._check_awake()
            raise EnvironmentBroken(
                f"{self.role}: the sandbox did not start within {rules.START_SECONDS:.0f} s; is the machine overloaded?"
            ) from None
        except WireError as error:
            self._closing.wait(0.2)  # until its last output is read
            words = self._explain(error)
            if isolated and str(error) == _GONE:
                raise EnvironmentBroken(bubblewrap.why_not(self.output() or words)) from None
            raise EnvironmentBroken(
                f"{words}: the Python environment does not work inside the sandbox; install it again (scripts/setup), "
                "and see `pgolf doctor`"
            ) from None

    def _blame(self, error: WireError) -> Exception:
        """The exception for a worker that failed: the fault is the machine's or the submission's."""
        words = self._explain(error)
        return EnvironmentBroken(self._fault) if self._fault else Refused(words)

    def _check_awake(self) -> None:
        slept = suspended_seconds() - self._suspended
        if slept > 1:
            raise EnvironmentBroken(f"the machine was suspended for {slept:.0f} s during the run; run it again")

    def _explain(self, error: WireError) -> str:
        """One line for a worker that failed: a limit it hit, how it ended, or its own message, escaped."""
        gone = str(error) == _GONE
        if gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=2)
        if self.group.oom_killed():
            self._verdict = self._over_memory()
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
        """Kill every process of the sandbox from outside; its init runs beside hostile code and is not trusted."""
        self._closing.set()
        self._kill_all()

    def _kill_all(self) -> None:
        if self._process.poll() is None:
            found = self.processes()  # before the first dies, and its children are no longer below it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def _join(self) -> None:
        """Wait for what has been killed, each for a limited time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_END_SECONDS)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout=_END_SECONDS)
        if self._process.stdout:
            self._process.stdout.close()

    def _stop(self, verdict: str) -> None:
        self._verdict = verdict
        self._kill_all()

    def _over_memory(self) -> str:
        return f"used more than {self.limits.memory_bytes / 1024**3:.1f} GiB of memory"

    def _read(self) -> None:
        """Drain what the sandbox prints, keep the end, and stop a flood. Ends with the worker, not with the pipe."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        os.set_blocking(pipe, False)
        ready = select.poll()
        ready.register(pipe, select.POLLIN)
        total = 0
        while total <= self.limits.output_bytes:
            if not ready.poll(1000 * _POLL_SECONDS):
                if self._closing.is_set():
                    return
                continue
            with contextlib.suppress(BlockingIOError):
                part = os.read(pipe, 65_536)
                if not part:
                    return
                total += len(part)
                self._tail.append(part)
                while sum(map(len, self._tail)) - len(self._tail[0]) > _TAIL_BYTES:
                    self._tail.popleft()
        self._stop(f"printed more than {self.limits.output_bytes:,} bytes")

    def _watch(self) -> None:
        """Watchdog: enforce the limits from outside where the kernel does not. Best effort."""
        while not self.group.enforced and not self._closing.wait(WATCH_SECONDS) and self._process.poll() is None:
            memory = threads = 0
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    threads += process.num_threads()
                    memory += getattr(process.memory_full_info(), "pss", 0)  # of shared memory, its part
            if memory > self.limits.memory_bytes:
                self._stop(self._over_memory())
            elif threads > self.limits.processes:
                self._stop(f"started more than {self.limits.processes} processes")
            elif self.copied and available_memory() < rules.SPARE_MEMORY_BYTES:
                self._fault = (
                    "the machine ran out of memory while no limit could be set on the sandbox's; see `pgolf doctor`"
                )
                self._stop(self._fault)


def _setup(role: str, device: str, shared: list[int], ring: Ring | None) -> dict[str, Any]:
    """What the guest has to know wherever it runs. `shared`: descriptors of the socket and of the ring, if any."""
    return {
        "role": role,
        "imports": [name for name in environment.ROLE_PACKAGES.get(role, ()) if find_spec(name)],
        "device": "cuda" if device.startswith("cuda") else device,
        "socket": shared[0],
        "ring": shared[1] if ring else -1,
        "slot_bytes": ring.slot_bytes if ring else 0,
    }


def _numbered(stack: contextlib.ExitStack, fd: int) -> int:
    """The same file under a descriptor whose number does not depend on what this process did before."""
    number = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _DESCRIPTORS)
    stack.callback(os.close, number)
    return number


def check_hidden(path: Path, packages: Sequence[str] = ()) -> None:
    """Raises EnvironmentBroken when sandboxed code that declares `packages` could read `path` or files in it."""
    place = path.resolve()
    for folder in (Path("/usr"), Path(sys.prefix), Path(sys.base_prefix), *map(Path, site.getsitepackages())):
        if place.is_relative_to(folder.resolve()):
            raise EnvironmentBroken(f"{path}: lies in {folder}, which the submission can read; move the data elsewhere")
    for file in environment.listing("predict", tuple(packages)).files:
        if file.is_relative_to(place):  # an editable package may lie anywhere
            raise EnvironmentBroken(f"{path}: holds {file}, which the submission can read; move the data elsewhere")
