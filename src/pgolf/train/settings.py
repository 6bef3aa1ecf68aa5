"""What all trainers do alike: command line, settings, errors in one sentence, signals, first line of a log."""

import argparse
import contextlib
import hashlib
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from pgolf import __version__, rules
from pgolf.errors import EnvironmentBroken, PgolfError, Refused, UsageError
from pgolf.files import beside, check_replaceable
from pgolf.train.log import say
from pgolf.train.ranks import Ranks

S = TypeVar("S", bound=Any)
LARGEST = 2**63 - 1
"""Of seeds, steps and whole settings: what torch can hold."""
PICTURE = ".png"


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


def read_settings(args: argparse.Namespace, ranks: Ranks, presets: Mapping[str, S]) -> S:
    """The preset with the changes of the command line. Raises UsageError when they cannot work."""
    settings = presets[args.preset or args.track]
    known = {field.name for field in fields(settings)} - {"vocab_size"}  # that one comes with the data
    changes: dict[str, Any] = {}
    for key, _, text in (change.partition("=") for change in args.set):
        if key not in known:
            raise UsageError(f"--set {key}: there is no such setting; choose from {', '.join(sorted(known))}")
        changes[key] = parse_value(f"--set {key}={text}", text, type(getattr(settings, key)))
    try:
        settings = replace(settings, **changes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if settings.batch_tokens // settings.context % ranks.world:
        raise UsageError(
            f"{settings.batch_tokens // settings.context} sequences per step do not split evenly over "
            f"{ranks.world} processes"
        )
    if not 0 <= args.seed <= LARGEST:
        raise UsageError(f"--seed must be from 0 to {LARGEST}")
    if any(value is not None and not 0 < value < math.inf for value in (args.steps, args.seconds)):
        raise UsageError("--steps and --seconds must be positive and finite")
    if args.steps and args.steps > LARGEST:
        raise UsageError(f"--steps must be at most {LARGEST}")
    if not args.steps and not args.seconds and rules.track(args.track).train_seconds is None:
        raise UsageError(f"track {args.track} has no time limit: give --seconds or --steps")
    return settings


def parse_value(option: str, text: str, kind: type) -> float:
    """A setting's value: finite, and 0 or 1 for a switch. Raises UsageError when it is not of the kind."""
    try:
        value = float(text) if kind is float else int(text)
    except ValueError:
        raise UsageError(f"{option}: not a number of the kind that it takes") from None
    if kind is bool and value not in (0, 1):
        raise UsageError(f"{option}: a switch is 0 or 1")
    if not (math.isfinite(value) if kind is float else abs(value) <= LARGEST):
        raise UsageError(f"{option}: too large, or no finite number")
    return cast(float, kind(value))


def check_paths(args: argparse.Namespace) -> None:
    """Raises UsageError when a file to be written would fall on another, on the data or on a folder.

    Raises OSError when artifact or picture could not take their names.
    """
    if args.out.is_dir():
        raise UsageError(f"--out {args.out} is a folder; name a file in it")
    seen: dict[Path, str] = {}
    for name, path in (
        ("--out", args.out),
        ("--log" if args.log else "the log", log_path(args)),
        ("the picture of the loss", beside(args.out, PICTURE)),
    ):
        if path.is_dir():
            raise UsageError(f"{name} {path} is a folder; name a file in it")
        if path != log_path(args):  # which is written in place, so it may be a link or a device
            check_replaceable(path)
        real = Path(os.path.realpath(path))  # unlike Path.resolve it lets loops of links pass
        if real.is_relative_to(os.path.realpath(args.data)):
            raise UsageError(f"{name} {path} lies in the dataset folder {args.data}; choose another folder")
        if real in seen:
            raise UsageError(f"{seen[real]} and {name} are both {path}; choose another name for one of them")
        seen[real] = name


def log_path(args: argparse.Namespace) -> Path:
    return args.log or beside(args.out, ".jsonl")


def run_trainer(
    argv: Sequence[str] | None,
    description: str,
    presets: Mapping[str, S],
    train_and_pack: Callable[[argparse.Namespace, S, Ranks], None],
) -> int:
    """A trainer from its command line to its exit code."""
    args = parse(argv, description, list(presets))
    on_signals(interrupt)
    try:
        ranks = Ranks()
        settings = read_settings(args, ranks, presets)
        with one_sentence(settings):
            check_paths(args)
            ranks.join()
            train_and_pack(args, settings, ranks)
        ranks.leave()  # not after a failure: it would wait for ranks that wait for this one
        return 0
    except PgolfError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, EnvironmentBroken):
            complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted before the clock started")
        return 130


def complain(sentence: str) -> None:
    say(f"train.py: {sentence}", sys.stderr)


def use_compiler(settings: Any, ranks: Ranks) -> bool:
    """Whether to use torch.compile: where it is wanted and, on CPUs, works on every rank."""
    if not settings.compile or ranks.gpu:  # on a GPU eager mode would be too slow to be of use
        return bool(settings.compile)
    reason = compiler_error()
    (failed,) = ranks.all_reduce_max(reason is not None)
    if failed and ranks.rank == 0:
        complain(f"torch.compile does not work here ({reason or 'on another rank'}); training without it, more slowly")
    return not failed


def compiler_error() -> str | None:
    """Why torch.compile cannot compile and load a tiny function on this CPU; None when it can. Takes 1 to 2 seconds."""
    number = time.time()  # never compiled before: a cached result would say nothing about the compiler
    try:
        torch.compile(lambda x: x * number, dynamic=False, fullgraph=True)(torch.ones(8))
    except Exception as error:  # of the compiler, the loader or the disk
        return gist(error)
    return None


def gist(error: Exception) -> str:
    """One line of an error that may have many."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])[:200]


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
        if type(error).__module__ == "torch._inductor.exc":
            raise EnvironmentBroken(
                f"torch.compile failed ({gist(error)}); mend what it needs, or train without it by --set compile=0"
            ) from None
        memory = "can't allocate memory", "Storage size calculation overflowed"
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in memory):
            raise
        raise EnvironmentBroken(
            f"out of memory with {settings.micro_tokens:,} tokens at once; try --set micro_tokens="
            f"{settings.micro_tokens // 2}"
        ) from None


def faster_dtype(ranks: Ranks) -> torch.dtype:
    """bf16 on GPUs and on CPUs that multiply matrices faster in it: some 2 times as fast, others 20 times slower."""
    if ranks.gpu:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise EnvironmentBroken(f"{torch.cuda.get_device_name()} has no bf16; hide it with CUDA_VISIBLE_DEVICES=")
        return torch.bfloat16
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for dtype in [*seconds] * 5:  # the fastest counts: others may have waited for other programs
        matrix = torch.ones(384, 384, dtype=dtype)
        start = time.monotonic()
        matrix @ matrix
        seconds[dtype] = min(seconds[dtype], time.monotonic() - start)
    (slower,) = ranks.all_reduce_max(seconds[torch.bfloat16] / seconds[torch.float32])
    return torch.bfloat16 if slower < 1 else torch.float32


def on_signals(handler: Callable[..., None]) -> None:
    """Handle Ctrl-C, SIGTERM and a lost terminal. What the caller ignores stays ignored: nohup does that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def stop_on_signals() -> threading.Event:
    """An event that the signals of `on_signals` set; from now on they do nothing else."""
    stop = threading.Event()
    on_signals(lambda *_: stop.set())
    return stop


def description(run: Any, source: Mapping[str, bytes], step_seconds: float, pack_seconds: float) -> dict[str, Any]:
    """The first line of the log: what is needed to repeat the run."""
    digest = hashlib.sha256()
    for _, code in sorted(source.items()):
        digest.update(code)
    gpu = run.ranks.gpu
    return {
        "settings": asdict(run.settings),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "track": run.args.track,
        "data": run.data.name,
        "seed": run.args.seed,
        "source_sha256": digest.hexdigest(),
        "world": run.ranks.world,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(run.model.dtype).removeprefix("torch."),
        "compiled": run.forward is not run.model,
        "pgolf": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "step_seconds": round(step_seconds, 4),
        "pack_seconds": round(pack_seconds, 3),
    }
