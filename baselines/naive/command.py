"""What all trainers here do alike: command line, settings, errors in one sentence, signals, first line of a log."""

import argparse
import contextlib
import hashlib
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from team import Team

from pgolf import rules
from pgolf.errors import EnvironmentBroken, PgolfError, Refused, UsageError

S = TypeVar("S", bound=Any)


def parse(argv: Sequence[str] | None, description: str, presets: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="example:\n  %(prog)s --track laptop --data data/demo --out a.zst",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    parser.add_argument("--out", type=Path, default=Path("artifact.zst"), metavar="FILE")
    parser.add_argument("--track", default="main", choices=list(rules.TRACKS))
    parser.add_argument("--preset", choices=presets, help="settings to begin with (default: those of the track)")
    parser.add_argument("--seed", type=int, default=1)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="time limit, artifact included (default: the track's)")
    length.add_argument("--steps", type=int, help="train exactly so many steps, however long they take")
    parser.add_argument("--log", type=Path, metavar="FILE", help="JSON lines (default: beside the artifact)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    return parser.parse_args(argv)


def read_settings(args: argparse.Namespace, team: Team, presets: Mapping[str, S]) -> S:
    """The preset with the changes of the command line. Raises UsageError when they cannot work."""
    settings = presets[args.preset or args.track]
    known = {field.name for field in fields(settings)} - {"vocab_size"}  # that one comes with the data
    changes: dict[str, Any] = {}
    for key, _, value in (change.partition("=") for change in args.set):
        if key not in known:
            raise UsageError(f"--set {key}: there is no such setting; choose from {', '.join(sorted(known))}")
        try:
            kind = type(getattr(settings, key))
            changes[key] = bool(int(value)) if kind is bool else kind(value)
        except ValueError:
            raise UsageError(f"--set {key}={value}: not a number of the kind that it takes") from None
    try:
        settings = replace(settings, **changes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if settings.batch_tokens // settings.context % team.world:
        raise UsageError(
            f"{settings.batch_tokens // settings.context} sequences per step do not split evenly over "
            f"{team.world} processes"
        )
    if any(value is not None and not 0 < value < math.inf for value in (args.steps, args.seconds)):
        raise UsageError("--steps and --seconds must be positive and finite")
    if args.out.is_dir():
        raise UsageError(f"--out {args.out} is a folder; name a file in it")
    if not args.steps and not args.seconds and rules.track(args.track).train_seconds is None:
        raise UsageError(f"track {args.track} has no time limit: give --seconds or --steps")
    return settings


def run(
    argv: Sequence[str] | None,
    description: str,
    presets: Mapping[str, S],
    train_and_pack: Callable[[argparse.Namespace, S, Team], None],
) -> int:
    """A trainer from its command line to its exit code."""
    args, team = parse(argv, description, list(presets)), Team()
    try:
        settings = read_settings(args, team, presets)
        with one_sentence(settings):
            team.join()
            train_and_pack(args, settings, team)
        team.leave()  # not after a failure: it would wait for ranks that wait for this one
        return 0
    except PgolfError as error:
        if team.rank == 0 or isinstance(error, EnvironmentBroken):
            print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("train.py: interrupted before the clock started", file=sys.stderr)
        return 130


def can_compile(settings: Any, team: Team) -> bool:
    """Whether torch.compile is wanted and has what it needs: on a CPU that is a C++ compiler."""
    return settings.compile and (team.gpu or shutil.which(os.environ.get("CXX", "g++")) is not None)


@contextlib.contextmanager
def one_sentence(settings: Any) -> Iterator[None]:
    """Turn the failures that people meet into one sentence."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise EnvironmentBroken(f"{where}{error.strerror or error}") from None
    except MemoryError as error:
        raise EnvironmentBroken(f"out of memory on the host: {error or 'use a smaller dataset'}") from None
    except RuntimeError as error:
        if "onnection closed by peer" in str(error) or "onnection reset by peer" in str(error):
            raise Refused("another process of this run has failed") from None  # it has said why
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise EnvironmentBroken(
            f"out of memory with {settings.micro_tokens:,} tokens at once; try --set micro_tokens="
            f"{settings.micro_tokens // 2}"
        ) from None


def faster_dtype(team: Team) -> torch.dtype:
    """bf16 on GPUs and on CPUs that multiply matrices faster in it: some 2 times as fast, others 20 times slower."""
    if team.gpu:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise EnvironmentBroken(f"{torch.cuda.get_device_name()} has no bf16; hide it with CUDA_VISIBLE_DEVICES=")
        return torch.bfloat16
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for dtype in [*seconds] * 5:  # the fastest counts: others may have waited for other programs
        matrix = torch.ones(384, 384, dtype=dtype)
        start = time.monotonic()
        matrix @ matrix
        seconds[dtype] = min(seconds[dtype], time.monotonic() - start)
    (slower,) = team.most(seconds[torch.bfloat16] / seconds[torch.float32])
    return torch.bfloat16 if slower < 1 else torch.float32


def stop_on_signals() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set; from now on they do nothing else."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def description(run: Any, source: Mapping[str, bytes], step_seconds: float, pack_seconds: float) -> dict[str, Any]:
    """The first line of the log: what is needed to repeat the run."""
    digest = hashlib.sha256()
    for _, code in sorted(source.items()):
        digest.update(code)
    gpu = run.team.gpu
    return {
        "settings": asdict(run.settings),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "track": run.args.track,
        "data": run.data.name,
        "seed": run.args.seed,
        "source_sha256": digest.hexdigest(),
        "world": run.team.world,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(run.model.dtype).removeprefix("torch."),
        "compiled": run.forward is not run.model,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "step_seconds": round(step_seconds, 4),
        "pack_seconds": round(pack_seconds, 3),
    }
