"""The process that decodes for `pgolf prove`, and how it is started. It has the artifact and the code, not the text."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from pgolf import artifact, rules
from pgolf.errors import EnvironmentBroken, PgolfError, Refused
from pgolf.machine import end_with_parent, exit_on_signals
from pgolf.proof import compression
from pgolf.sandbox import lock
from pgolf.sandbox.wire import Ids
from pgolf.score.devices import Runtime, one_thread


def decode_elsewhere(path: Path, packet: compression.Packet, runtime: Runtime) -> Ids:
    """The coded tokens (n,), decoded by another process: document by document, or part by part.

    Raises Refused or EnvironmentBroken in the words of that process.
    """
    command = [sys.executable, "-m", __name__, str(path.resolve()), runtime.device, str(int(runtime.isolated))]
    done = subprocess.run(
        command,
        input=packet.encode(),
        capture_output=True,
        cwd="/",
        preexec_fn=partial(end_with_parent, os.getpid()),
        check=False,
    )
    if done.returncode == 0 and len(done.stdout) % 4 == 0:
        return np.frombuffer(done.stdout, dtype="<i4").astype(np.int32)
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
    if done.returncode == Refused.exit_code:
        raise Refused(f"not proven: {lines[-1]}")
    raise EnvironmentBroken(f"decoding failed: {lines[-1]}")


def main() -> int:
    """The other process. Arguments as above, the compressed file on standard input, tokens as int32 on its output."""
    exit_on_signals()
    path, device, isolated = sys.argv[1:]
    try:
        packet = compression.Packet.decode(sys.stdin.buffer.read(), "standard input")
        with lock.hold(), one_thread(device), compression.judged():
            read = artifact.read(Path(path), rules.ARTIFACT_BYTES)
            segments = compression.decode(read, packet, Runtime(device, isolated == "1"))
    except PgolfError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    sys.stdout.buffer.write(np.concatenate(segments).astype("<i4").tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
