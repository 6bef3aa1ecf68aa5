"""Takes the socket from the worker and speaks the protocol itself, with a lie in its answer (the test says which)."""

import socket
import struct
from pathlib import Path

from pgolf.sandbox import wire

LIES = {
    "number": lambda n, s, r, w: (6, (n + 1, s, r, w, 0)),
    "slot": lambda n, s, r, w: (6, (n, 1 - s, r, w, 0)),
    "slot that is none": lambda n, s, r, w: (6, (n, 2**31, r, w, 0)),
    "fewer rows": lambda n, s, r, w: (6, (n, s, r - 1, w, 0)),
    "no rows": lambda n, s, r, w: (6, (n, s, 0, w, 0)),
    "more rows": lambda n, s, r, w: (6, (n, s, 2**32 - 1, w, 0)),
    "narrow rows": lambda n, s, r, w: (6, (n, s, r, 1, 0)),
    "type": lambda n, s, r, w: (6, (n, s, r, w, 7)),
    "kind": lambda n, s, r, w: (3, (n, s, r, w, 0)),
}


def load(root, device):
    links = {fd.name: str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}
    number = next(int(fd) for fd, link in links.items() if link.startswith("socket"))
    channel = wire.Channel(socket.socket(fileno=number))
    channel.send(wire.Kind.READY)
    batch = wire.Batch.decode(channel.receive(wire.Kind.BATCH, 1 << 30))
    kind, fields = LIES["LIE"](batch.number, batch.slot, batch.ids.shape[0] * batch.count, 257)
    channel.socket.sendall(struct.pack("<BI5I", kind, 20, *fields))
    while channel.socket.recv(1 << 20):
        pass
