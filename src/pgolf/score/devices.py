"""Where and how a submission's code runs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pgolf.errors import UsageError


@dataclass(frozen=True)
class Runtime:
    """How a submission's code is run."""

    device: str = "cpu"
    """"cpu", "cuda" (all GPUs) or "cuda:N", as `find_device` returns it."""
    isolated: bool = True
    """In the sandbox. False: with all rights of this user."""


def find_device(device: str) -> str:
    """The device that a user asked for: "cpu", "cuda" (all GPUs) or "cuda:N". Raises UsageError when it is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return "cpu"
    if not (match := re.fullmatch(r"cuda(?::(\d{1,3}))?", device)):
        raise UsageError(f"there is no device {device!r}; use cpu, cuda (all GPUs) or cuda:N")
    count = torch.cuda.device_count()
    if int(match[1] or 0) >= count:
        raise UsageError(f"device {device} is not here: torch {torch.__version__} sees {count} GPUs")
    return device


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """On a CPU let this process compute in one thread, so that it does not fight with the predictor for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
