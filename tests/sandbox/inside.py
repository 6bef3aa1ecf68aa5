"""Code of the tests' own, run in a sandbox."""

import contextlib
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

from pgolf.sandbox import wire
from pgolf.sandbox.box import Worker
from pgolf.sandbox.cgroup import ROOT
from pgolf.sandbox.wire import Kind


def worker(body: str, **options: Any) -> Worker:
    """A sandbox whose `answer` runs the body of a Python function that returns a list."""
    source = "def run():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    source += "\ndef decode(ids):\n    return chr(10).join(map(str, run()))\n\ndef encode(text):\n    return []\n"
    options = {"isolated": True, **options}
    deadline = options.pop("deadline", time.monotonic() + 60)
    config = {"tokenizer": "code.py", "transform": None}
    started = Worker("decode", {"code.py": source.encode()}, config=config, **options)
    started.channel.deadline = deadline
    return started


def ask(sandbox: Worker) -> list[str]:
    """What the body returned, as strings."""
    sandbox.receive(Kind.READY, 0)
    sandbox.send(Kind.TOKENS, wire.encode_tokens([np.zeros(0, dtype=np.int32)]))
    return wire.decode_texts(sandbox.receive(Kind.TEXTS, 1 << 20))[0].decode().split("\n")


def run_inside(body: str, **options: Any) -> list[str]:
    """Run the body in a sandbox and return what it returned, as strings."""
    with worker(body, **options) as sandbox:
        return ask(sandbox)


def traces(pid: int) -> list[str]:
    """What a scorer with this process id has left: control groups, processes in them, private copies."""
    found = [str(path) for path in ROOT.glob(f"**/pgolf-{pid}-*")]
    for base in ("/dev/shm", tempfile.gettempdir()):
        found += [str(path) for path in Path(base).glob(f"pgolf-copy-*-{pid}-*")]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"/pgolf-{pid}-" in (process / "cgroup").read_text():
                found.append((process / "cmdline").read_text())
    return found
