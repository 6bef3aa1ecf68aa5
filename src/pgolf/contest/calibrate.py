"""How fast a machine is: arithmetic, memory, and a step of the naive baseline in the training sandbox."""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import pgolf
from pgolf.artifact import code_in
from pgolf.contest.rerun_record import Calibration
from pgolf.data.dataset import Dataset, training_files
from pgolf.errors import PgolfError
from pgolf.rules import Track
from pgolf.sandbox import lock, training

BASELINE = Path(pgolf.__file__).parent.parent.parent / "baselines" / "naive"
_STEPS = 20
_SKIPPED = 3  # the first steps are slower
_SECONDS = 600.0  # most that preparing, and then training, may take: a slow machine is measured too
_TRIES = 8  # the fastest counts: others may have waited for other programs
_CPU_SIZE, _GPU_SIZE = 1024, 8192  # of the matrices: rows and columns
_CPU_BYTES, _GPU_BYTES = 1 << 27, 1 << 30  # copied


def calibrate(dataset: Dataset, track: Track, device: str, processes: int, isolated: bool) -> Calibration:
    """Measure one device, and naive's step on `processes` of them. Takes some 20 seconds on a CPU."""
    start = time.monotonic()
    size, copied = (_GPU_SIZE, _GPU_BYTES) if device.startswith("cuda") else (_CPU_SIZE, _CPU_BYTES)
    with lock.hold():  # so that nothing else is measured with it
        fp32, bf16 = (matrix_rate(dtype, device, size) for dtype in (torch.float32, torch.bfloat16))
        bandwidth = copy_rate(device, copied)
    naive = naive_step(dataset, track, device, processes, isolated)
    return Calibration(
        round(fp32, 4),
        round(bf16, 4) if bf16 > fp32 else None,
        round(bandwidth, 2),
        None if naive is None else round(naive, 3),
        round(time.monotonic() - start, 3),
    )


def matrix_rate(dtype: torch.dtype, device: str, size: int) -> float:
    """TFLOP/s of a product of two square matrices of `size`."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: a @ b, device) / 1e12


def copy_rate(device: str, size: int) -> float:
    """Bytes read and written by a copy of `size` bytes, in 1e9 bytes per second."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device) / 1e9


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several tries, up to two seconds of them."""
    best, until = math.inf, time.monotonic() + 2
    for _ in range(_TRIES):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        if time.monotonic() > until:
            break
    return best


def naive_step(dataset: Dataset, track: Track, device: str, processes: int, isolated: bool) -> float | None:
    """Median milliseconds of a step of the naive baseline with the track's preset; None where it cannot be had.

    Its own log says when a step ended. It is the checkout's code, so that may be believed.
    """
    sources = code_in(BASELINE)
    if "train.py" not in sources:
        return None
    options = f"--out=/tmp/a.zst --track={track.name} --steps={_STEPS} --log_every=1"
    files, shards = training_files(dataset)
    gpu = device.startswith("cuda")  # where naive always compiles
    job = training.Job(sources, files, shards, tuple(options.split()), (), gpu, "cuda" if gpu else "cpu", processes)
    try:
        done = training.train(job, training.Limits(_SECONDS, _SECONDS, track.artifact_bytes), isolated=isolated)
    except PgolfError:
        return None
    return median_step((done.log or b"").decode("utf-8", "replace"))


def median_step(log: str) -> float | None:
    """Milliseconds of the median step, from the log's lines; None for fewer than two."""
    ends: dict[int, float] = {}
    for line in log.splitlines():
        try:
            values = json.loads(line)
            ends[values["step"]] = values["seconds"]
        except (ValueError, KeyError, TypeError):
            continue
    times = [ends[step] - ends[step - 1] for step in ends if step > _SKIPPED and step - 1 in ends]
    return 1000 * statistics.median(times) if times else None
