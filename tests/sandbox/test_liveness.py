"""Whatever hostile code does, and whenever the scorer is ended: all ends soon, and nothing is left.

A run takes a fixed sample; PGOLF_TEST_ALL=1 takes all.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import sentencepiece as spm
from inside import traces

from conftest import ALL, DOCUMENTS, UNIFORM, MakeArtifact, artifact_bytes, write_dataset
from pgolf import rules
from pgolf.cli.main import main
from trainers import default_signals

pytestmark = pytest.mark.xdist_group("ends")  # what one of these kills is no trace of another's

LIMIT = 4.0  # seconds of evaluation
GRACE = 10.0  # seconds for ending what does not want to end
PHASES = ("import", "load", "step", "last", "exit")

CHANNEL = "s = socket.socket(fileno=os.dup(json.loads(sys.argv[1])['socket']))\n"
HOSTILE = {
    "hangs": "pass",
    "spins": "while True: pass",
    "holds the interpreter": "import re; re.match('(a+)+$', 'a' * 64 + 'b')",
    "forks": "for _ in range(200):\n    if not os.fork(): break",
    "forks a chain": "for _ in range(300):\n    if os.fork(): break",
    "is a daemon": "if os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)",
    "leaves a daemon": "if not os.fork():\n    os.setsid()\n    if os.fork(): os._exit(0)",
    "closes its descriptors": "os.closerange(0, 4096)",
    "ignores signals": "for n in set(signal.valid_signals()) - {9, 19}: signal.signal(n, signal.SIG_IGN)",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "stops all": "os.kill(-1, signal.SIGSTOP)\nos.kill(os.getpid(), signal.SIGSTOP)",
    "kills all": "os.kill(-1, signal.SIGKILL)\nos.kill(os.getpid(), signal.SIGKILL)",
    "fills /tmp": "with open('/tmp/full', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
    "makes many files": "for n in range(100_000): os.close(os.open(f'/tmp/{n}', os.O_CREAT))",
    "maps much memory": "k = []\nwhile True:\n    k.append(mmap.mmap(-1, 1 << 24)); k[-1].write(bytes(1 << 24))",
    "holds the ring": "m = mmap.mmap(json.loads(sys.argv[1])['ring'], 4096)\nif not os.fork(): os.setsid()",
    "sends half a frame": CHANNEL + "s.sendall(bytes([7, 16, 0]))",
    "sends frames slowly": CHANNEL
    + "for b in bytes([7, 16, 0, 0, 0]) + bytes(99):\n    s.sendall(bytes([b])); time.sleep(.5)",
    "floods the channel": CHANNEL + "while True: s.sendall(bytes([1, 0, 0, 0, 0]))",
    "floods its output": "while True: print('x' * 4096)",
    "starts threads": "for _ in range(200): threading.Thread(target=time.sleep, args=(600,)).start()",
    "becomes another program": "os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)'])",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "recurses": "sys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
}
CASES = [(name, PHASES[(i + 2 * j) % 5]) for i, name in enumerate(HOSTILE) for j in range(3)]
POINTS = 100
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

PREDICT = (
    UNIFORM
    + """
import atexit, json, mmap, os, signal, socket, sys, threading, time

def attack():
    try:
        exec(ATTACK, globals())
    except Exception:
        pass
    time.sleep(600)

class Hostile(Uniform):
    def __init__(self, count):
        self.left, self.steps = count, 0

    def step(self, ids, lane):
        self.left -= len(ids)
        self.steps += 1
        if PHASE == "step" and self.steps == 3 or PHASE == "last" and self.left <= 0:
            attack()
        return super().step(ids, lane)

def load(root, device, lanes, count):
    if PHASE == "load":
        attack()
    if PHASE == "exit":
        atexit.register(attack)
    return Hostile(count)

if PHASE == "import":
    attack()
"""
)


def score(artifact: Path, data: Path, folder: Path) -> psutil.Popen:
    """A scorer with its temporary files in `folder`."""
    command = [sys.executable, "-m", "pgolf", "score", str(artifact), "--data", str(data)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return psutil.Popen(command, env=environment, preexec_fn=default_signals, **pipes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """A text of some dozen steps, so that the limit ends none but hostile code."""
    return write_dataset(tmp_path_factory.mktemp("data") / "short", DOCUMENTS[:4], tokenizer_model)


@pytest.fixture(scope="module")
def honest_seconds(dataset: Path, tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a scorer takes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("honest")
    vocab = spm.SentencePieceProcessor(model_file=str(tokenizer_model)).vocab_size()
    (folder / "a.zst").write_bytes(artifact_bytes(folder, UNIFORM, vocab, tokenizer_model, {}, {}))
    start = time.monotonic()
    assert score(folder / "a.zst", dataset, folder).wait(600) == 0
    return time.monotonic() - start


@pytest.mark.parametrize(("name", "phase"), CASES if ALL else CASES[::30])
def test_hostile_code_is_ended(
    honest_seconds: float,
    name: str,
    phase: str,
    make_artifact: MakeArtifact,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It is refused within the limit and some seconds; after the last logits it may do what it likes."""
    limit = 120.0 if phase == "exit" else LIMIT
    monkeypatch.setitem(rules.TRACKS, "hurry", rules.Track("hurry", 16_000_000, 30.0, None, limit, "CPU"))
    monkeypatch.setattr(rules, "WORKER_MEMORY_BYTES", 1 << 30)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    artifact = make_artifact(f"ATTACK, PHASE = {HOSTILE[name]!r}, {phase!r}\n" + PREDICT, track="hurry")
    before = set(Path("/proc/self/fd").iterdir())
    start = time.monotonic()
    code = main(["score", str(artifact), "--data", str(dataset), "--json"])
    assert time.monotonic() - start < honest_seconds + LIMIT + GRACE
    printed = capfd.readouterr()
    assert code == (0 if phase == "exit" else 1), printed.err
    assert json.loads(printed.out)["status"] == ("ok" if phase == "exit" else "refused")
    assert traces(os.getpid()) == []
    assert psutil.Process().children(recursive=True) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert len(set(Path("/proc/self/fd").iterdir()) - before) <= 1  # that of the listing


def lives(process: psutil.Process) -> bool:
    """Not one that has ended and that the machine's init has yet to collect."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("point", range(POINTS) if ALL else range(32, POINTS, 52))
def test_scorer_can_be_ended_at_any_moment(
    point: int, make_artifact: MakeArtifact, dataset: Path, tmp_path: Path, honest_seconds: float
) -> None:
    """It ends with the signal's exit code, or is done; no process, copy, control group or temporary file is left."""
    artifact = make_artifact(UNIFORM)
    folder = tmp_path / "tmp"
    folder.mkdir()
    scorer = score(artifact, dataset, folder)
    time.sleep(honest_seconds * (point + random.Random(point).random()) / POINTS)
    number = SIGNALS[point % len(SIGNALS)]
    below = scorer.children(recursive=True) if scorer.is_running() else []
    scorer.send_signal(number)
    _, err = scorer.communicate(timeout=60)
    assert scorer.returncode in (0, -number, 128 + number), err
    assert traces(scorer.pid) == []
    assert not [process for process in below if lives(process)]
    assert list(folder.iterdir()) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".pgolf-")]
