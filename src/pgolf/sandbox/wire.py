"""The wire between scorer and worker: framed messages on a socket, logits through shared memory.

A frame is one byte of kind, four bytes of payload length (little-endian), the payload. Every payload has a
fixed layout, and every receiver says which kind it expects and how long it may be; anything else is a
WireError. Logits never travel in frames: the worker writes a block of rows into a slot of a sealed memory
file and announces it. The scorer copies the slot before it looks at it, so that a row cannot change between
check and use.

This module is all that scorer and worker share. It imports nothing but the standard library and numpy, and
trusts nothing that it reads.
"""

import fcntl
import mmap
import os
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

TEXT_FRAME_BYTES = 1 << 20  # texts travel in groups of about this size
MESSAGE_BYTES = 4096
SLOTS = 2  # one block is computed while the other is scored

Ids = npt.NDArray[np.int32]

_FRAME = struct.Struct("<BI")
_BATCH = struct.Struct("<IIIII")
_ROWS = struct.Struct("<IIIII")
_COUNT = struct.Struct("<I")
ROWS_BYTES = _ROWS.size


class WireError(Exception):
    """The other side broke the protocol, or is gone."""


class Kind(IntEnum):
    """What a frame carries."""

    READY = 1  # worker: loaded, nothing else
    FAILED = 2  # worker: one line of UTF-8 that says why
    TEXTS = 3  # a group of byte strings
    TOKENS = 4  # a group of id arrays
    BATCH = 5  # scorer: windows to run
    ROWS = 6  # worker: a block of logits lies in a slot
    TAKEN = 7  # scorer: a block was copied, its slot is free again
    ROUND = 8  # scorer: documents for a streaming predictor
    STARTED = 9  # worker: its own imports are done, the submission's come next


class Dtype(IntEnum):
    """Element type of logits; the value is its code on the wire."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2


DTYPE_BYTES = {Dtype.FLOAT32: 4, Dtype.FLOAT16: 2, Dtype.BFLOAT16: 2}


@dataclass(frozen=True)
class Batch:
    """Windows of one length: the worker answers with rows `first[b]` to `first[b] + count` of each, in order."""

    number: int
    slot: int
    count: int
    first: Ids  # (B,)
    ids: Ids  # (B, T)

    def encode(self) -> bytes:
        """The payload of a BATCH frame."""
        b, t = self.ids.shape
        header = _BATCH.pack(self.number, self.slot, b, t, self.count)
        return header + self.first.astype("<i4").tobytes() + self.ids.astype("<i4").tobytes()

    @staticmethod
    def decode(payload: bytes) -> "Batch":
        """Read a BATCH payload."""
        number, slot, b, t, count = _unpack(_BATCH, payload)
        values = payload[_BATCH.size :]
        if len(values) != 4 * (b + b * t):
            raise WireError(f"a batch of {b} x {t} ids came with {len(values)} bytes")
        numbers = np.frombuffer(values, dtype="<i4")
        return Batch(number, slot, count, numbers[:b], numbers[b:].reshape(b, t))


class Wanted(IntEnum):
    """What a streaming predictor is to do with the documents of a round."""

    ROWS = 0  # answer with a row for each of their tokens
    LAST = 1  # answer with the last row of each
    UPDATE = 2  # learn from them: every row was scored


@dataclass(frozen=True)
class Round:
    """Documents, each with its leading BOS; the first may continue the last one of the round before, without."""

    wanted: Wanted
    documents: list[Ids]

    def encode(self) -> bytes:
        """The payload of a ROUND frame."""
        return bytes([self.wanted]) + encode_tokens(self.documents)

    @staticmethod
    def decode(payload: bytes) -> "Round":
        """Read a ROUND payload."""
        if payload[:1] not in [bytes([wanted]) for wanted in Wanted]:
            raise WireError("a round that wants something unknown")
        return Round(Wanted(payload[0]), decode_tokens(payload[1:]))


@dataclass(frozen=True)
class Rows:
    """A block of logits (rows, width) in a slot."""

    number: int
    slot: int
    rows: int
    width: int
    dtype: Dtype

    def encode(self) -> bytes:
        """The payload of a ROWS frame."""
        return _ROWS.pack(self.number, self.slot, self.rows, self.width, self.dtype)

    @staticmethod
    def decode(payload: bytes) -> "Rows":
        """Read a ROWS payload."""
        number, slot, rows, width, dtype = _unpack(_ROWS, payload)
        if len(payload) != ROWS_BYTES:
            raise WireError(f"a block of rows announced with {len(payload)} bytes")
        if dtype not in list(Dtype):
            raise WireError(f"unknown element type {dtype}")
        return Rows(number, slot, rows, width, Dtype(dtype))


class Channel:
    """One end of the socket. Without a deadline it waits for ever (the worker's end)."""

    def __init__(self, sock: socket.socket, deadline: float | None = None) -> None:
        """`deadline`: value of time.monotonic() after which every call raises TimeoutError."""
        self.socket = sock
        self.deadline = deadline

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send one frame. Raises WireError when the other side is gone, TimeoutError past the deadline."""
        self._arm()
        try:
            self.socket.sendall(_FRAME.pack(kind, len(payload)) + payload)
        except TimeoutError:
            raise
        except OSError:
            raise WireError("the other side is gone") from None

    def receive(self, expected: Kind, most: int) -> bytes:
        """Payload of the next frame, which must be `expected` with at most `most` bytes.

        Raises WireError (with the other side's own words if it sent FAILED), TimeoutError past the deadline.
        """
        kind, length = _FRAME.unpack(self._exactly(_FRAME.size))
        if kind == Kind.FAILED:
            words = self._exactly(min(length, MESSAGE_BYTES)).decode("utf-8", "replace")
            raise WireError(words or "failed without a word")
        if kind != expected:
            raise WireError(f"sent a frame of kind {kind} where {expected.name} was due")
        if length > most:
            raise WireError(f"sent {length:,} bytes of {expected.name} where at most {most:,} are allowed")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._arm()
            try:
                part = self.socket.recv(min(count - len(data), 1 << 20))
            except TimeoutError:
                raise
            except OSError:
                part = b""
            if not part:
                raise WireError("the other side is gone")
            data += part
        return bytes(data)

    def _arm(self) -> None:
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)


class Ring:
    """Shared memory for logits: `SLOTS` slots in a memory file whose size is sealed."""

    def __init__(self, fd: int, slot_bytes: int) -> None:
        """Map the ring behind `fd`."""
        self.fd = fd
        self.slot_bytes = slot_bytes
        self._map = mmap.mmap(fd, SLOTS * slot_bytes)

    @staticmethod
    def create(slot_bytes: int) -> "Ring":
        """A new ring. Sealed, because a worker that shrank the file would crash the scorer on its next read."""
        slot_bytes += -slot_bytes % mmap.PAGESIZE
        fd = os.memfd_create("pgolf-logits", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, SLOTS * slot_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return Ring(fd, slot_bytes)

    def slot(self, number: int, count: int) -> memoryview:
        """`count` bytes of a slot, writable. Raises WireError when the slot has fewer or does not exist."""
        if not 0 <= number < SLOTS or not 0 <= count <= self.slot_bytes:
            raise WireError(f"slot {number} has no {count:,} bytes")
        start = number * self.slot_bytes
        return memoryview(self._map)[start : start + count]

    def close(self) -> None:
        """Give the memory file back; the mapping goes with its last view."""
        os.close(self.fd)


def encode_texts(texts: list[bytes]) -> bytes:
    """The payload of a TEXTS frame: count, lengths in bytes, the bytes."""
    lengths = np.array([len(text) for text in texts], dtype="<u4")
    return _COUNT.pack(len(texts)) + lengths.tobytes() + b"".join(texts)


def decode_texts(payload: bytes) -> list[bytes]:
    """Read a TEXTS payload."""
    return [payload[start:end] for start, end in _spans(payload, 1)]


def encode_tokens(documents: list[Ids]) -> bytes:
    """The payload of a TOKENS frame: count, lengths in tokens, the ids as int32."""
    lengths = np.array([len(ids) for ids in documents], dtype="<u4")
    return _COUNT.pack(len(documents)) + lengths.tobytes() + b"".join(i.astype("<i4").tobytes() for i in documents)


def decode_tokens(payload: bytes) -> list[Ids]:
    """Read a TOKENS payload."""
    return [np.frombuffer(payload[start:end], dtype="<i4") for start, end in _spans(payload, 4)]


def _spans(payload: bytes, item_bytes: int) -> list[tuple[int, int]]:
    """Start and end of each part of a group; they fill the payload exactly."""
    (count,) = _unpack(_COUNT, payload)
    begin = _COUNT.size + 4 * count
    if begin > len(payload):
        raise WireError(f"a group of {count} parts in {len(payload)} bytes")
    lengths = np.frombuffer(payload, dtype="<u4", count=count, offset=_COUNT.size).astype(np.int64)
    ends = begin + item_bytes * np.cumsum(lengths)
    if (int(ends[-1]) if count else begin) != len(payload):
        raise WireError(f"a group of {count} parts does not fill its {len(payload)} bytes")
    starts = ends - item_bytes * lengths
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) < layout.size:
        raise WireError(f"a payload of {len(payload)} bytes where a header has {layout.size}")
    return layout.unpack_from(payload)
