"""The process that decodes for `pgolf prove`: artifact and compressed file in, tokens as int32 out."""

import sys
from pathlib import Path

import numpy as np

from pgolf import artifact, rules
from pgolf.errors import PgolfError
from pgolf.machine import exit_on_signals
from pgolf.proof import compression
from pgolf.sandbox import lock
from pgolf.score.devices import one_thread


def main() -> int:
    """Arguments: artifact, device, 1 for the sandbox. The compressed file comes on standard input."""
    exit_on_signals()
    path, device, isolated = sys.argv[1:]
    try:
        packet = compression.Packet.decode(sys.stdin.buffer.read(), "standard input")
        with lock.hold(), one_thread(device), compression.judged():
            read = artifact.read(Path(path), rules.ARTIFACT_BYTES)
            segments = compression.decode(read, packet, device, isolated == "1")
    except PgolfError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    sys.stdout.buffer.write(np.concatenate(segments).astype("<i4").tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
