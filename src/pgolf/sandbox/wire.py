"""The wire between scorer and worker: framed messages on a socket, logits through shared memory.

A frame is one byte of kind, four bytes of payload length (little-endian), the payload. Every payload has a
fixed layout, and every receiver names the kind that it expects and its longest length; anything else is a
WireError. Logits never travel in frames: the worker writes them into a slot of a sealed memory file and announces
them. The scorer copies the slot before it looks at it, so that nothing can change between check and use. Descriptors
sent along with a frame are dropped by the kernel: no receiver here has room for them.

This module is all that scorer and worker share. It imports the standard library, numpy and, for GPUs, torch, and
trusts nothing that it reads.
"""

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

TEXT_FRAME_BYTES = 1 << 20  # texts travel in groups of about this size
MESSAGE_BYTES = 4096
SLOTS = 2  # a batch of windows is computed while the one before it is scored; step k uses slot k % 2
_PORTABLE = 1  # cudaHostRegisterPortable: for all GPUs

Ids = npt.NDArray[np.int32]

_FRAME = struct.Struct("<BI")
_STEP = struct.Struct("<II")
_WINDOWS = struct.Struct("<IIII")
_LOGITS = struct.Struct("<IIII")
_COUNT = struct.Struct("<I")
LOGITS_BYTES = _LOGITS.size
PLAN_BYTES = 4


class WireError(Exception):
    """The other side broke the protocol, or is gone."""


class Kind(IntEnum):
    """What a frame carries."""

    READY = 1  # worker: loaded; a predictor of the step form sends its plan
    FAILED = 2  # worker: one line of UTF-8 that says why
    TEXTS = 3  # a group of byte strings
    TOKENS = 4  # a group of id arrays
    STEP = 5  # scorer: one token for each active lane
    WINDOWS = 6  # scorer: windows to run
    LOGITS = 7  # worker: logits lie in a slot
    PLAN = 8  # scorer: the plan that the predictor is to follow
    STARTED = 9  # worker: the harness runs; what happens from here on is the submission's doing
    OPEN = 10  # trainer: ready for the training data; the clock starts
    OPENED = 11  # harness: the shards are there
    ARTIFACT = 12  # trainer: the finished artifact; the clock stops with its last byte
    LOG = 13  # trainer: its log, at most once and before the artifact


class Dtype(IntEnum):
    """Element type of logits; the value is its code on the wire."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2


DTYPE_BYTES = {Dtype.FLOAT32: 4, Dtype.FLOAT16: 2, Dtype.BFLOAT16: 2}


@dataclass(frozen=True)
class Step:
    """One token for each active lane; the worker submits the logits of what follows it in each."""

    number: int
    lane: Ids  # (B,)
    ids: Ids  # (B,)

    def encode(self) -> bytes:
        """The payload of a STEP frame."""
        header = _STEP.pack(self.number, len(self.ids))
        return header + self.lane.astype("<i4").tobytes() + self.ids.astype("<i4").tobytes()

    @staticmethod
    def decode(payload: bytes) -> "Step":
        """Read a STEP payload."""
        number, count = _unpack(_STEP, payload)
        if len(payload) != _STEP.size + 8 * count:
            raise WireError(f"a step of {count} lanes came with {len(payload)} bytes")
        numbers = np.frombuffer(payload, dtype="<i4", offset=_STEP.size)
        return Step(number, numbers[:count], numbers[count:])


@dataclass(frozen=True)
class WindowBatch:
    """Windows of one length; the worker submits rows `first` to `first` + `count` of each, in order."""

    number: int
    first: int
    count: int
    ids: Ids  # (B, T)

    def encode(self) -> bytes:
        """The payload of a WINDOWS frame."""
        header = _WINDOWS.pack(self.number, self.first, self.count, len(self.ids))
        return header + self.ids.astype("<i4").tobytes()

    @staticmethod
    def decode(payload: bytes) -> "WindowBatch":
        """Read a WINDOWS payload."""
        number, first, count, windows = _unpack(_WINDOWS, payload)
        values = payload[_WINDOWS.size :]
        if windows == 0 or not values or len(values) % (4 * windows):
            raise WireError(f"{windows} windows came with {len(values)} bytes")
        return WindowBatch(number, first, count, np.frombuffer(values, dtype="<i4").reshape(windows, -1))


@dataclass(frozen=True)
class Logits:
    """Logits (rows, width) lie in slot `number` % SLOTS."""

    number: int
    rows: int
    width: int
    dtype: Dtype

    def encode(self) -> bytes:
        """The payload of a LOGITS frame."""
        return _LOGITS.pack(self.number, self.rows, self.width, self.dtype)

    @staticmethod
    def decode(payload: bytes) -> "Logits":
        """Read a LOGITS payload."""
        number, rows, width, dtype = _unpack(_LOGITS, payload)
        if len(payload) != LOGITS_BYTES:
            raise WireError(f"logits announced with {len(payload)} bytes")
        if dtype not in list(Dtype):
            raise WireError(f"unknown element type {dtype}")
        return Logits(number, rows, width, Dtype(dtype))


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
        """Payload of the next frame, which must be `expected` with at most `most` bytes; errors as below."""
        return self.receive_one_of({expected: most})[1]

    def receive_one_of(self, most: Mapping[Kind, int]) -> tuple[Kind, bytes]:
        """Kind and payload of the next frame, which must be of one of these kinds with at most so many bytes.

        Raises WireError (with the other side's own words if it sent FAILED), TimeoutError past the deadline.
        """
        kind, length = _FRAME.unpack(self._exactly(_FRAME.size))
        if kind == Kind.FAILED:
            words = self._exactly(min(length, MESSAGE_BYTES)).decode("utf-8", "replace")
            raise WireError(words or "failed without a word")
        if kind not in most:
            due = " or ".join(expected.name for expected in most)
            raise WireError(f"sent a frame of kind {kind} where {due} was due")
        kind = Kind(kind)
        if length > most[kind]:
            raise WireError(f"sent {length:,} bytes of {kind.name} where at most {most[kind]:,} are allowed")
        return kind, self._exactly(length)

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
        self._pinned: int | None = None

    @staticmethod
    def create(slot_bytes: int) -> "Ring":
        """A new ring. Sealed, because a worker that shrank the file would crash the scorer on its next read."""
        slot_bytes += -slot_bytes % mmap.PAGESIZE
        if not hasattr(os, "memfd_create"):  # no Linux, so no sandbox either
            with tempfile.TemporaryFile() as file:
                os.ftruncate(file.fileno(), SLOTS * slot_bytes)
                return Ring(os.dup(file.fileno()), slot_bytes)
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

    def pin(self) -> None:
        """Have a GPU copy to and from this mapping directly, four times as fast, if the driver allows it."""
        import torch

        address = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        if int(torch.cuda.cudart().cudaHostRegister(address, SLOTS * self.slot_bytes, _PORTABLE)) == 0:
            self._pinned = address
        else:
            with contextlib.suppress(RuntimeError):  # the driver's last error, which some later call would raise
                torch.zeros(1, device="cuda")

    def close(self) -> None:
        """Give the memory file back; the mapping goes with its last view."""
        if self._pinned is not None:
            import torch

            torch.cuda.cudart().cudaHostUnregister(self._pinned)
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
