"""What a run leaves behind besides the artifact: JSON lines, a progress bar, a picture of the loss."""

import contextlib
import fcntl
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pgolf.errors import Refused, UsageError
from pgolf.plots import draw


def say(line: str, stream: TextIO | None = None) -> None:
    """Print on stdout or `stream`, whatever its encoding. A terminal or a reader that is gone ends no run."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError):
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    flush(stream)


def flush(stream: TextIO) -> None:
    """Write what the stream holds, or point it at nothing: else the exit would try again, and fail."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def open_alone(path: Path) -> TextIO:
    """The file, emptied and locked until it is closed. Raises UsageError when another run is writing it."""
    file = path.open("a", encoding="utf-8", buffering=1)
    if path.is_file():  # not for devices and pipes
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(f"{path}: another run is writing this log; choose another --out") from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
    return file


class Log:
    """JSON lines for machines, progress bar and loss curve for people; a Log without a path is silent."""

    def __init__(self, path: Path | None, steps: int | None, seconds: float, every: int, tokens: int) -> None:
        """The bar goes to `steps`, or to `seconds` when `steps` is None; `tokens` are those of one step.

        Raises OSError when the file cannot be opened, UsageError when another run is writing it.
        """
        self.file = open_alone(path) if path else None
        self.failure: str | None = None
        """Why a line could not be written; there are no more after it."""
        self.limit, self.by_steps, self.every, self.tokens = seconds, steps is not None, every, tokens
        self.bar = tqdm(
            total=round(seconds) if steps is None else steps,
            bar_format="{percentage:3.0f}%|{bar}| {n:.0f}/{total} {unit}{postfix}",
            unit="s" if steps is None else "steps",
            disable=None if path else True,  # None: only where there is a terminal
        )
        self.curve: list[tuple[int, float]] = []

    def write(self, **line: Any) -> None:
        """Add a line; a full disk, or a figure that JSON has not, is noted in `failure` and does not end the run."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
        except (OSError, ValueError) as error:
            self.fail(error)

    def close(self) -> None:
        """Complete the file and take the bar from the screen."""
        self.bar.close()
        flush(sys.stderr)  # where the bar was
        try:
            if self.file is not None:
                self.file.close()
        except OSError as error:
            self.fail(error)

    def fail(self, error: OSError | ValueError) -> None:
        self.failure = getattr(error, "strerror", None) or str(error)
        file, self.file = self.file, None
        with contextlib.suppress(OSError):  # what it still holds cannot be written either
            if file is not None:
                file.close()

    def step(self, done: int, loss: float, seconds: float, scale: float) -> None:
        """Note the `done`-th step, finished `seconds` after the start. Raises Refused when training diverged."""
        if not math.isfinite(loss):
            raise Refused(f"the loss of step {done} is {loss}: training diverged; lower the learning rates")
        self.curve.append((done, loss))
        if done > 1 and done % self.every:
            return
        tokens = done * self.tokens
        self.write(
            step=done,
            loss=round(loss, 5),
            tokens=tokens,
            seconds=round(seconds, 3),
            lr_scale=round(scale, 5),
            tokens_per_second=round(tokens / seconds),
        )
        self.bar.set_postfix_str(f"step {done}, loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        self.bar.update((done if self.by_steps else seconds) - self.bar.n)

    def plot(self, path: Path) -> str | None:
        """Draw the loss curve; returns why there is no picture, or None (see plots.draw)."""

        def fill(axes: Any) -> None:
            axes.plot([done for done, _ in self.curve], [loss for _, loss in self.curve], linewidth=1)
            axes.set(xlabel="step", ylabel="training loss (nats per token)")
            axes.set_title(os.fsencode(path.stem).decode(errors="replace"), parse_math=False)

        return draw(path, (8, 5), fill)
