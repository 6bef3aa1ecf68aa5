"""A thread in place of the sandbox, for tests of what the scorer sends and accepts."""

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pytest

from pgolf.errors import Refused
from pgolf.sandbox.wire import Channel, Kind, Ring, WireError
from pgolf.score import predictors

Play = Callable[[Channel, Ring], None]


class Stub:
    """While entered, each Predictor talks to a thread that runs `play` with the worker's ends of socket and ring."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.sent: list[tuple[Kind, bytes]] = []
        """What the scorer has sent."""
        self.setup: list[Any] = []
        """What workers were started with: role, sizes, options."""
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Stub":
        self._patch.setattr(predictors, "Worker", self._worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.undo()

    def _worker(self, role: str, members: dict[str, bytes], *, ring: Ring, **options: Any) -> "_Worker":
        self.setup.append((role, {name: len(data) for name, data in members.items()}, ring.slot_bytes, options))
        return _Worker(self, ring)


class _Worker:
    """The part of box.Worker that a Predictor uses."""

    def __init__(self, stub: Stub, ring: Ring) -> None:
        ours, theirs = socket.socketpair()
        self.channel, self._stub, self._theirs = Channel(ours), stub, theirs
        self._thread = threading.Thread(target=self._run, args=(Channel(theirs), ring), daemon=True)
        self._thread.start()

    def _run(self, channel: Channel, ring: Ring) -> None:
        with self._theirs, contextlib.suppress(WireError, OSError):
            self._stub.play(channel, ring)

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        self._stub.sent.append((kind, payload))
        with contextlib.suppress(WireError):
            self.channel.send(kind, payload)

    def receive(self, expected: Kind, most: int) -> bytes:
        try:
            return self.channel.receive(expected, most)
        except WireError as error:
            raise Refused(str(error)) from None

    def close(self) -> None:
        self.channel.socket.close()
        self._thread.join(10)
