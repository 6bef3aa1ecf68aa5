"""The seconds that the harness charges a trainer, and the limits that it sets, against an observer from outside.

The observer never sees the socket: it watches the processes of this machine. A trainer renames itself right before it
asks for the data and right after its last byte, which /proc/PID/stat shows. PGOLF_TEST_ALL=1 takes 100 runs, and -rP
prints how far the two differ.
"""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from conftest import ALL
from pgolf.errors import Refused
from pgolf.sandbox import environment, training
from pgolf.sandbox.training import Job, Limits

MOST = 1.0  # seconds between harness and observer, on a loaded machine
TRAINER = """
import ctypes, os, socket, struct, sys, time
before, after, size = map(float, sys.argv[3:])
wire, libc = socket.socket(fileno=int(os.environ["PGOLF_HARNESS"])), ctypes.CDLL(None)
artifact = bytes(int(size))
def send(name, kind, payload=b""):
    libc.prctl(15, name)  # PR_SET_NAME
    wire.sendall(struct.pack("<BI", kind, len(payload)) + payload)
time.sleep(before)
send(b"opening", 10)
wire.recv(5)
time.sleep(after)
send(b"handing-over", 12, artifact)
libc.prctl(15, b"handed-over")
time.sleep(1000)
"""


@dataclass
class Observer:
    """Watches the train.py below this process. A context manager; `at` holds what it saw, on a monotonic clock."""

    at: dict[str, float] = field(default_factory=dict)
    """When train.py was "started", "opening", "handing-over", "handed-over" and "gone"."""

    def __enter__(self) -> "Observer":
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def seconds(self, begin: str, end: str) -> float:
        return self.at[end] - self.at[begin]

    def _watch(self) -> None:
        while (trainer := _trainer()) is None:
            if self._done.wait(0.005):
                return
        self.at["started"] = time.monotonic()
        while (name := _name(trainer)) != "gone":
            self.at.setdefault(name, time.monotonic())
            time.sleep(0.002)
        self.at["gone"] = time.monotonic()
        self.at.setdefault("handed-over", self.at["gone"])  # dead before anybody looked


def _trainer() -> int | None:
    for process in psutil.Process().children(recursive=True):
        try:
            if "train.py" in process.cmdline()[1:2]:
                return process.pid
        except psutil.Error:
            continue
    return None


def _name(pid: int) -> str:
    """What the process calls itself; "gone" once it is dead, buried or not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    name, _, rest = status.partition("(")[2].rpartition(")")
    return "gone" if rest.split()[0] in "ZX" else name


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A sandbox that is made in a second."""
    monkeypatch.setitem(environment.ROLE_PACKAGES, "train", ("numpy",))
    environment.listing.cache_clear()
    yield
    environment.listing.cache_clear()


def job(before: float, after: float, size: int) -> Job:
    return Job({"train.py": TRAINER.encode()}, {"dataset.json": b"{}"}, {}, tuple(map(str, (before, after, size))))


def test_charged_seconds_are_an_observers() -> None:
    """Both phases, for trainers that take their time before, after, or sending."""
    off = []
    for number in range(100 if ALL else 3):
        source = random.Random(number)
        before, after = source.uniform(0, 0.5), source.uniform(0, 0.5)
        with Observer() as seen:
            found = training.train(job(before, after, source.randrange(1 << 24)), Limits(120.0, 120.0, 1 << 24))
        prepare, train = seen.seconds("started", "opening"), seen.seconds("opening", "handed-over")
        off.append(max(abs(found.seconds["prepare"] - prepare), abs(found.seconds["train"] - train)))
        assert found.seconds["prepare"] >= before and found.seconds["train"] >= after
        assert off[-1] < MOST
    print(f"charged seconds: {sum(each < 0.1 for each in off)} of {len(off)} within 0.1 s, at most {max(off):.3f} s")


@pytest.mark.parametrize("phase", ["prepare", "train"])
def test_limits_are_an_observers(phase: str) -> None:
    """A trainer that never ends lives as long as its limit, and no longer."""
    limit, off = 2.0, []
    begin = {"prepare": "started", "train": "opening"}[phase]
    for _ in range(50 if ALL else 1):
        hang = job(1000, 0, 0) if phase == "prepare" else job(0, 1000, 0)
        limits = Limits(limit, 60.0, 1) if phase == "prepare" else Limits(60.0, limit, 1)
        with Observer() as seen, pytest.raises(Refused, match="within 2 s"):
            training.train(hang, limits)
        off.append(abs(seen.seconds(begin, "gone") - limit))
        assert off[-1] < MOST
    print(f"limit of {phase}: {sum(each < 0.1 for each in off)} of {len(off)} within 0.1 s, at most {max(off):.3f} s")
