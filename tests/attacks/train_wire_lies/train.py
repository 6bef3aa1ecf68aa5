import os
import struct
import sys

from harness import ARTIFACT, FAILED, OPEN, open_data, send, variant, wire

LIES = {
    "artifact first": lambda: send(ARTIFACT, b"early"),
    "opens twice": lambda: (send(OPEN), send(OPEN)),
    "four gigabytes": lambda: wire.sendall(struct.pack("<BI", ARTIFACT, 0xFFFFFFFF)),
    "a byte too many": lambda: send(ARTIFACT, bytes(1001)),
    "open with payload": lambda: send(OPEN, b"payload"),
    "garbage": lambda: wire.sendall(bytes([255]) * 1000),
    "words": lambda: send(FAILED, "score 0.1 bpb\x1b[2J\u202e\0\n".encode()),
    "long words": lambda: send(FAILED, b"a" * 1_000_000),
    "cut off": lambda: os._exit(wire.shutdown(2) or 0),
    "half a frame": lambda: os._exit(wire.sendall(struct.pack("<BI", ARTIFACT, 1000) + b"half") or 0),
    "exits": lambda: sys.exit(0),
    "raises": lambda: 1 / 0,
}
if variant not in ("artifact first", "opens twice", "open with payload"):
    open_data()
LIES[variant]()
wire.recv(1)
