"""Data and artifact change hands, and between the two the clock runs.

Under an organizer's harness train.py sits in a sandbox: it asks for the training shards over a socket, and sends the
finished artifact over it. Elsewhere the shards are files from the start, and the same code runs with the same limit.
A trainer that does not use this module can do the same with a few lines (docs/artifact.md).
"""

import os
import socket
from functools import cache
from pathlib import Path

from pgolf import rules
from pgolf.errors import EnvironmentBroken
from pgolf.sandbox.wire import Channel, Kind, WireError
from pgolf.train.clock import Clock
from pgolf.train.ranks import Ranks

HARNESS = "PGOLF_HARNESS"
"""The environment variable with the number of the socket; only the first rank has it."""


@cache
def _harness() -> Channel | None:
    number = os.environ.get(HARNESS)
    return Channel(socket.socket(fileno=int(number))) if number else None


def open_data(seconds: float, ranks: Ranks) -> Clock:
    """Start the clock, with a limit of `seconds`, and have the training shards readable on every rank from here on."""
    clock = Clock(seconds)
    clock.start()
    if harness := _harness():
        try:
            harness.send(Kind.OPEN)
            harness.receive(Kind.OPENED, 0)
        except WireError as error:
            raise EnvironmentBroken(f"the harness does not hand over the data: {error}") from None
    ranks.all_reduce_max(0.0)  # the other ranks wait for the first
    return clock


def hand_over(artifact: Path, log: Path | None = None) -> None:
    """Send the log and the finished artifact, which stops the clock; under a harness this process ends here."""
    if harness := _harness():
        if log is not None and log.is_file():
            harness.send(Kind.LOG, log.read_bytes()[-rules.TRAIN_LOG_BYTES :])
        harness.send(Kind.ARTIFACT, artifact.read_bytes())
        harness.socket.recv(1)  # the harness kills everything
