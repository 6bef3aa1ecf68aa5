"""The processes of a run and the collectives between them."""

import ctypes
import os
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist

# The defaults of its functions keep whatever group exists when it is first imported, and torch imports it during
# the first step. Such a group outlives `leave`: its threads race with the interpreter's exit, which may abort.
import torch.distributed.nn.functional
from torch import Tensor

from pgolf.errors import EnvironmentBroken, UsageError

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of mallopt's settings in glibc's malloc.h."""


class Ranks:
    """One process per GPU, or any number on CPUs. Rank 0 prints and writes."""

    def __init__(self) -> None:
        """Reads what torchrun sets. Raises EnvironmentBroken for no numbers, UsageError for too few GPUs."""
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        try:
            self.rank, self.world, local, local_world = (int(os.environ.get(n, d)) for n, d in defaults.items())
        except ValueError:
            names = ", ".join(defaults)
            raise EnvironmentBroken(f"{names} must be numbers: start with torchrun, or unset them") from None
        self.gpu = torch.cuda.is_available()
        if self.gpu and local_world > torch.cuda.device_count():
            raise UsageError(f"{local_world} processes cannot share {torch.cuda.device_count()} GPUs: start fewer")
        self.device = torch.device(f"cuda:{local}" if self.gpu else "cpu")

    def join(self) -> None:
        """Join the process group. Raises UsageError when the environment does not say where."""
        if self.gpu:
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        if self.world > 1:
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if self.gpu else "gloo")
            except ValueError as error:
                raise UsageError(f"WORLD_SIZE is {self.world}: start with torchrun, or unset it ({error})") from None

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each value over all ranks. Goes from host to host and waits for no device."""
        agreed = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return cast(list[float], agreed.tolist())

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.gpu:
            torch.cuda.synchronize()

    def read_later(self, number: Tensor) -> Callable[[], float]:
        """A function that gives the number; on a GPU it waits for the work queued until now and for no later one."""
        if not self.gpu:
            return lambda: float(number)
        host = number.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def read() -> float:
            event.synchronize()
            return float(host)

        return read


def keep_freed_memory() -> None:
    """Have the C library use freed memory again, blocks of up to 32 MiB, instead of giving it back.

    The kernel has to clear every page that it hands out, which took a third of a training step on a CPU. Without
    glibc this changes nothing.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(MMAP_THRESHOLD, 32 << 20)  # the most that it accepts
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
