"""The clock of a training run: it starts when the data does and stops when the artifact is on disk."""

import time


class Clock:
    """Wall clock with an optional limit in seconds. Imports, compilation and warm-up come before `start`."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._start: float | None = None

    def start(self) -> None:
        """Begin to count; the next thing to do is to open the training data."""
        self._start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since `start`, 0 before it."""
        return 0.0 if self._start is None else time.monotonic() - self._start

    def remaining(self) -> float:
        """Seconds until the limit, negative when it has passed; infinite without a limit."""
        return float("inf") if self.seconds is None else self.seconds - self.elapsed()
