import struct

from honest import find

from pgolf.sandbox import wire

LOGITS = struct.Struct("<BIIIII")  # kind, bytes, number, rows, width, element type


def header(number, rows, kind=7, size=16, width=257, dtype=0):
    return LOGITS.pack(kind, size, number, rows, width, dtype)


LIES = {
    "ready of five bytes": None,
    "number": lambda n, r: header(n + 1, r),
    "number far away": lambda n, r: header(2**32 - 1, r),
    "fewer rows": lambda n, r: header(n, r - 1),
    "no rows": lambda n, r: header(n, 0),
    "more rows": lambda n, r: header(n, 2**32 - 1),
    "narrow": lambda n, r: header(n, r, width=1),
    "wide": lambda n, r: header(n, r, width=2**31),
    "element type": lambda n, r: header(n, r, dtype=7),
    "kind": lambda n, r: header(n, r, kind=3),
    "kind that is none": lambda n, r: header(n, r, kind=77),
    "long header": lambda n, r: header(n, r, size=17) + b"x",
    "short header": lambda n, r: header(n, r, size=12)[:-4],
    "cut off": lambda n, r: header(n, r)[:-4],
    "twice": lambda n, r: header(n, r) * 2,
    "nothing": lambda n, r: b"",
    "words": lambda n, r: struct.pack("<BI", 2, 2**32 - 1) + b"\x1b[2J\nscore 0.1 bpb" * 1000,
}


def answer(channel, lie):
    """Be a worker that is honest up to the lie."""
    five = lie == "ready of five bytes"
    channel.send(wire.Kind.READY, bytes(wire.PLAN_BYTES + five))
    channel.receive(wire.Kind.PLAN, wire.PLAN_BYTES)
    step = wire.Step.decode(channel.receive(wire.Kind.STEP, 1 << 20))
    channel.socket.sendall(LIES[lie](step.number, len(step.ids)))


def load(root, device, lanes, count):
    answer(find("Channel"), "LIE")
    raise SystemExit
