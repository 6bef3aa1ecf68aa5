"""Run a trainer in this process and watch its loop: compilation under the clock, waiting of the host, kernels, memory.

    python scripts/benchmarks/watch.py FIGURES.json baselines/naive/train.py --steps 30 --data DIR --out a.zst

The steps FIRST to LAST are profiled. What is compiled after the clock has started would cost a run minutes, and a host
that waits for the GPU within a step leaves it idle.
"""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pgolf.files import write_atomically
from pgolf.train import loop

FIRST, LAST = 5, 8
"""Steps to be profiled: after the first ones, which find caches empty."""
TOP = 10
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize")
"""Calls in which the host waits for what it has queued. The loop reads each loss later, after an event."""


class Watched:
    """A trainer whose steps FIRST to LAST are profiled (see loop.Trainer)."""

    def __init__(self, trainer: loop.Trainer) -> None:
        self.trainer = trainer
        gpu = torch.cuda.is_available()
        self.profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])
        self.gpu = gpu
        self.time = "self_device_time_total" if gpu else "self_cpu_time_total"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trainer, name)

    def step(self, step: int, *rest: Any) -> Any:
        if step == FIRST:
            self.profile.start()
        done = self.trainer.step(step, *rest)
        if step == LAST:
            self.profile.stop()
        return done

    def figures(self) -> dict[str, Any]:
        """Kernels by their share of the time of all, and how often the host waited, in the steps that were profiled."""
        every = self.profile.key_averages()
        on_card = "DeviceType.CUDA"  # an operator of the CPU repeats the time of its kernels
        events = [e for e in every if not self.gpu or (str(e.device_type) == on_card and not e.is_user_annotation)]
        total = sum(getattr(event, self.time) for event in events) or 1
        events.sort(key=lambda event: -getattr(event, self.time))
        kernels = [
            {"name": e.key[:80], "share": round(getattr(e, self.time) / total, 4), "calls": e.count}
            for e in events[:TOP]
        ]
        waits = sum(e.count for e in every if e.key in WAITS) - self.gpu  # the profiler waits once when it stops
        return {"waits": waits, "kernels": kernels}


def watched(train: Callable[..., Any], figures: dict[str, Any]) -> Callable[..., Any]:
    """`loop.train`, which also fills in `figures`."""

    def run(run: loop.Run, trainer: loop.Trainer, *rest: Any) -> Any:
        watching, before = Watched(trainer), graphs()
        done = train(run, watching, *rest)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        figures.update(compiled_under_the_clock=graphs() - before, peak_memory_bytes=memory)
        if done[0] > LAST:
            figures["profile"] = watching.figures  # takes seconds, and the clock is running
        return done

    return run


def graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def main() -> None:
    """Run the trainer that the command line names."""
    out, trainer, *arguments = sys.argv[1:]
    figures: dict[str, Any] = {}
    loop.train = watched(loop.train, figures)
    sys.argv = [trainer, *arguments]
    sys.path.insert(0, str(Path(trainer).parent))
    try:
        runpy.run_path(trainer, run_name="__main__")
    finally:
        figures |= figures.pop("profile", dict)()
        write_atomically(Path(out), json.dumps(figures, indent=1).encode())


if __name__ == "__main__":
    main()
