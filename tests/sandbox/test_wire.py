"""The wire parser takes any bytes: it gives the message back or raises WireError, and nothing else."""

import socket
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import damaged
from pgolf.sandbox import wire
from pgolf.sandbox.wire import Channel, Dtype, Kind, Ring, WireError

PARSERS = (wire.decode_texts, wire.decode_tokens, wire.Step.decode, wire.WindowBatch.decode, wire.Logits.decode)


@given(st.lists(st.binary(max_size=30), max_size=8))
def test_texts_round_trip(texts: list[bytes]) -> None:
    """Groups of byte strings, empty ones too."""
    assert wire.decode_texts(wire.encode_texts(texts)) == texts


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=30), max_size=8))
def test_tokens_round_trip(documents: list[list[int]]) -> None:
    """Groups of id arrays, empty ones too."""
    back = wire.decode_tokens(wire.encode_tokens([np.array(ids, dtype=np.int32) for ids in documents]))
    assert [ids.tolist() for ids in back] == documents


def test_headers_round_trip() -> None:
    """Headers carry their numbers."""
    lane, ids = np.array([0, 2, 5], dtype=np.int32), np.arange(12, dtype=np.int32).reshape(3, 4)
    step = wire.Step.decode(wire.Step(7, lane, ids[:, 1]).encode())
    assert (step.number, step.lane.tolist(), step.ids.tolist()) == (7, lane.tolist(), ids[:, 1].tolist())
    batch = wire.WindowBatch.decode(wire.WindowBatch(3, 1, 2, ids).encode())
    assert (batch.number, batch.first, batch.count, batch.ids.tolist()) == (3, 1, 2, ids.tolist())
    logits = wire.Logits(9, 5, 7, Dtype.BFLOAT16)
    assert wire.Logits.decode(logits.encode()) == logits


IDS = st.integers(-(2**31), 2**31 - 1)
NUMBERS = st.integers(0, 2**32 - 1)


def array(values: list[int]) -> wire.Ids:
    return np.array(values, dtype=np.int32)


@st.composite
def steps(draw: st.DrawFn) -> wire.Step:
    lanes = draw(st.integers(0, 6))
    lane, ids = (array(draw(st.lists(IDS, min_size=lanes, max_size=lanes))) for _ in range(2))
    return wire.Step(draw(NUMBERS), lane, ids)


@st.composite
def batches(draw: st.DrawFn) -> wire.WindowBatch:
    b, t = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    ids = draw(st.lists(IDS, min_size=b * t, max_size=b * t))
    return wire.WindowBatch(draw(NUMBERS), draw(NUMBERS), draw(NUMBERS), array(ids).reshape(b, t))


LOGITS = st.builds(wire.Logits, NUMBERS, NUMBERS, NUMBERS, st.sampled_from(Dtype))


@given(st.one_of(steps(), batches(), LOGITS), st.data())
def test_a_message_has_one_spelling(message: wire.Step | wire.WindowBatch | wire.Logits, data: st.DataObject) -> None:
    """Encoded and decoded it is the same; damaged bytes are another message, spelled like that, or a WireError."""
    payload = message.encode()
    assert type(message).decode(payload).encode() == payload
    changed = damaged(data, payload)
    try:
        back = type(message).decode(changed)
    except WireError as error:
        assert str(error).isprintable()
    else:
        assert back.encode() == changed


@given(st.sampled_from(PARSERS), st.binary(max_size=64))
def test_parsers_survive_anything(parser: object, payload: bytes) -> None:
    """Hostile payloads end in WireError."""
    try:
        parser(payload)  # type: ignore[operator]
    except WireError as error:
        assert str(error)


@given(st.binary(max_size=64), st.integers(0, 2**32 - 1))
def test_group_lengths_must_fill_the_payload(tail: bytes, count: int) -> None:
    """A count that the payload cannot hold costs no memory and is refused."""
    with pytest.raises(WireError):
        wire.decode_texts((count | 1 << 20).to_bytes(4, "little") + tail)


def pair(seconds: float = 5.0) -> tuple[Channel, socket.socket]:
    ours, theirs = socket.socketpair()
    return Channel(ours, time.monotonic() + seconds), theirs


def test_channel_refuses_what_it_did_not_ask_for() -> None:
    """Wrong kind, too long, hung up: WireError; silence: TimeoutError at the deadline."""
    channel, other = pair()
    other.sendall(bytes([Kind.TOKENS]) + bytes(4))
    with pytest.raises(WireError, match="kind 4"):
        channel.receive(Kind.LOGITS, 20)
    other.sendall(bytes([Kind.LOGITS]) + (2**32 - 1).to_bytes(4, "little"))
    with pytest.raises(WireError, match="at most 20"):
        channel.receive(Kind.LOGITS, 20)
    other.sendall(bytes([Kind.FAILED]) + (2**32 - 1).to_bytes(4, "little") + b"x" * wire.MESSAGE_BYTES)
    with pytest.raises(WireError, match="xxx"):
        channel.receive(Kind.LOGITS, 20)
    other.sendall(bytes([Kind.FAILED]) + bytes(4))
    with pytest.raises(WireError, match="without a word"):
        channel.receive(Kind.LOGITS, 20)
    other.close()
    with pytest.raises(WireError, match="gone"):
        channel.receive(Kind.LOGITS, 20)
    channel, other = pair(0.2)
    other.sendall(b"\x07")
    with pytest.raises(TimeoutError):
        channel.receive(Kind.LOGITS, 20)


def test_ring_cannot_be_shrunk_and_slots_are_bounded() -> None:
    """A worker that truncates the file would crash the scorer; the seal forbids it."""
    import os

    ring = Ring.create(100)
    with pytest.raises(OSError):
        os.ftruncate(ring.fd, 0)
    assert len(ring.slot(1, 100)) == 100
    for number, count in ((2, 1), (-1, 1), (0, ring.slot_bytes + 1), (0, -1)):
        with pytest.raises(WireError):
            ring.slot(number, count)
    ring.close()


@pytest.mark.parametrize("status", [0, 712])
def test_a_ring_is_unpinned_before_its_memory_goes(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """CUDA's runtime: returns `status`, and knows what is pinned."""

        pinned: ClassVar[dict[int, int]] = {}

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            if status == 0:
                self.pinned[address] = size
            return status

        def cudaHostUnregister(self, address: int) -> int:
            self.pinned.pop(address)  # raises where nothing is
            return 0

    def zeros(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: the last one")

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(torch, "zeros", zeros)
    ring = Ring.create(100)
    ring.pin()
    assert sum(Driver.pinned.values()) == (wire.SLOTS * ring.slot_bytes if status == 0 else 0)
    ring.slot(0, 4)[:] = b"abcd"
    ring.close()
    assert not Driver.pinned
