"""When a sandbox ends, all of it has ended, whatever it held, and however its scorer ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from inside import ask, traces, worker

from conftest import ALL
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.sandbox import place
from trainers import default_signals

pytestmark = pytest.mark.xdist_group("ends")  # what one of these kills is no trace of another's

SCORER = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: sys.exit(143))
from inside import worker, ask
print("ready", flush=True)
with worker("import time; time.sleep(600)") as sandbox:
    print("started", flush=True)
    ask(sandbox)
"""


def test_descriptors_in_flight_hold_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox that put its own output's descriptor into the channel, where nobody takes it, ends like any other."""
    monkeypatch.setattr(place.seccomp, "program", lambda *_: None)  # which denies the sending
    with worker("""
        import array, json, os, socket, sys, time
        channel = socket.socket(fileno=os.dup(json.loads(sys.argv[1])["socket"]))
        channel.sendall(bytes([7, 0, 0, 0, 0]))
        channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))])
        time.sleep(600)
    """) as sandbox:
        with pytest.raises(Refused, match="kind 7"):
            ask(sandbox)
        begin = time.monotonic()
    assert time.monotonic() - begin < 20
    assert traces(os.getpid()) == []


def test_descriptors_cannot_be_sent() -> None:
    """The filter denies it."""
    with (
        worker("""
        import array, json, os, socket, sys
        channel = socket.socket(fileno=os.dup(json.loads(sys.argv[1])["socket"]))
        channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))])
        """) as sandbox,
        pytest.raises(Refused, match="PermissionError"),
    ):
        ask(sandbox)


@pytest.mark.parametrize(
    "body",
    [
        "import os\nfor _ in range(300):\n    if os.fork(): break\nimport time; time.sleep(600)",  # a chain
        "import os\nfor n in range(200_000):\n    os.close(os.open(f'/tmp/{n}', os.O_CREAT))\nimport os; os._exit(3)",
        "import os, signal\nfor n in (1, 2, 3, 13, 15): signal.signal(n, signal.SIG_IGN)\n"
        "os.setsid() if not os.fork() else os._exit(0)\nimport time; time.sleep(600)",
        "import os\nos.close(1); os.close(2)\nos.kill(os.getpid(), 19)",  # stops itself, its output closed
    ],
)
def test_nothing_is_left(body: str) -> None:
    """No process, control group or file outlives `close`."""
    with worker(body) as sandbox, pytest.raises((Refused, TimeoutError)):
        sandbox.channel.deadline = time.monotonic() + 2
        ask(sandbox)
    assert traces(os.getpid()) == []


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL
MOMENTS = [(number, moment) for number in SIGNALS for moment in ("starting", "started")]


@pytest.mark.parametrize(("number", "moment"), MOMENTS if ALL else MOMENTS[::3])
def test_ended_scorer_leaves_nothing(number: signal.Signals, moment: str) -> None:
    """A signal during the start or the run; after SIGKILL no process is left, and the next scorer removes the rest."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    scorer = subprocess.Popen(
        [sys.executable, "-c", SCORER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=default_signals,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert scorer.stdout and scorer.stdout.readline() == "ready\n"
    if moment == "started":
        assert scorer.stdout.readline() == "started\n"
    else:
        time.sleep(1.5)
    scorer.send_signal(number)
    scorer.wait(timeout=40)
    if number == signal.SIGKILL:
        until = time.monotonic() + 10
        while [t for t in traces(scorer.pid) if not t.startswith("/")] and time.monotonic() < until:
            time.sleep(0.05)
        with worker(""):
            pass
    assert traces(scorer.pid) == []


def test_failed_start_undoes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor, copy or group is left of a worker that could not start."""
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(place.bubblewrap, "program", lambda _: "/no/such/bwrap")
    with pytest.raises(EnvironmentBroken):
        worker("")
    monkeypatch.setattr(place, "memory_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker("")
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert traces(os.getpid()) == []


def test_closing_twice_is_closing_once() -> None:
    """A second `close` does nothing."""
    sandbox = worker("return [1]")
    sandbox.close()
    sandbox.close()
    assert traces(os.getpid()) == []
