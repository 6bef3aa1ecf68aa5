"""What all trainers share: command line, errors in one sentence, signals, the first line of the log."""

import contextlib
import hashlib
import io
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args

import torch
import tyro
from tyro.conf import arg

from pgolf import __version__, rules
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import beside, check_replaceable
from pgolf.train.log import say
from pgolf.train.ranks import Ranks

S = TypeVar("S")
LARGEST = 2**63 - 1
"""Of integers on the command line: what torch can hold."""
PICTURE = ".png"


@dataclass(frozen=True)
class Options:
    """Data, files, budget and seed; the same for every trainer."""

    data: Annotated[Path, arg(metavar="DIR")]
    """Dataset folder."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("artifact.zst")
    """Artifact to write."""
    track: Annotated[str, arg(metavar="{" + ",".join(rules.TRACKS) + "}")] = "main"
    """Its limits apply."""
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: those of the track)")] = None
    """Settings to begin with."""
    seed: int = 1
    """Of the weights."""
    seconds: Annotated[float | None, arg(help_behavior_hint="(default: the track's)")] = None
    """Time limit, artifact included."""
    steps: Annotated[int | None, arg(help_behavior_hint="(default: until the time is up)")] = None
    """Train for this number of steps, however long they take."""
    log: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: beside the artifact)")] = None
    """Training log, JSON lines."""


@dataclass(frozen=True)
class Command(Generic[S]):
    """The whole command line."""

    run: tyro.conf.OmitArgPrefixes[Options]
    settings: tyro.conf.OmitArgPrefixes[S]


FromData = Annotated[int, tyro.conf.Fixed, tyro.conf.Suppress]
"""Type of a setting that comes with the dataset and has no flag."""
_numbers = tyro.constructors.ConstructorRegistry()


@_numbers.primitive_rule
def _number(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Numbers on the command line are finite, and a switch is 0 or 1."""
    kind: Any = next((kind for kind in get_args(info.type) if kind is not NoneType), info.type)  # of `float | None`
    if kind not in (bool, int, float):
        return None

    def read(texts: list[str]) -> Any:
        try:
            value = float(texts[0]) if kind is float else int(texts[0])
        except ValueError:
            raise ValueError(f"{texts[0]!r:.40} is not {'a' if kind is float else 'a whole'} number") from None
        if kind is bool and value not in (0, 1):
            raise ValueError("a switch is 0 or 1")
        if not (math.isfinite(value) if kind is float else abs(value) <= LARGEST):
            raise ValueError(f"must be finite and at most {LARGEST}")
        return kind(value)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar={bool: "{0,1}", int: "INT", float: "FLOAT"}[kind],
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind | None),
        str_from_instance=lambda value: [str(int(value) if kind is bool else value)],
    )


def parse(argv: Sequence[str] | None, description: str, presets: Mapping[str, S]) -> tuple[Options, S]:
    """Options and settings of a command line: the preset's, changed by flags. Raises UsageError when it is wrong.

    Ends the process after --help.
    """
    text = f"{description}\n\nexample:\n  train.py --track laptop --data data/demo --out a.zst"
    # The preset decides on the defaults of all other flags, so it is read first; --data and --help come later.
    first, _ = _cli(Options, argv, default=Options(Path()), return_unknown_args=True, add_help=False)
    for name, value, known in (("track", first.track, rules.TRACKS), ("preset", first.preset, presets)):
        if value not in (None, *known):
            raise UsageError(f"--{name} {value}: choose from {', '.join(known)}")
    preset = presets[first.preset or first.track]
    default = Command(Options(tyro.MISSING), preset)
    command = _cli(Command.__class_getitem__(type(preset)), argv, default=default, description=text)  # type: ignore[attr-defined]
    return command.run, command.settings


def flags(options: Options, settings: S, presets: Mapping[str, S]) -> tuple[str, ...]:
    """The command line that gives these settings and this budget again, without files, track and seed."""
    given = {name: getattr(options, name) for name in ("preset", "steps", "seconds")}
    preset = presets[options.preset or options.track]
    changed: dict[str, Any] = {
        name: value
        for name, value in asdict(settings).items()  # type: ignore[call-overload]
        if value != getattr(preset, name) and name != "vocab_size"
    }
    values = {name: value for name, value in (given | changed).items() if value is not None}
    return tuple(f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in values.items())


def _cli(kind: Any, argv: Sequence[str] | None, **options: Any) -> Any:
    """tyro.cli, with the help in any terminal's encoding and its framed messages as one sentence."""
    printed, message = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(message):
            options |= {"use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}  # switches take 0 or 1
            return tyro.cli(kind, args=argv, prog="train.py", registry=_numbers, **options)
    except SystemExit as end:
        if not end.code:
            say(printed.getvalue().rstrip())
            raise
        body = re.split("-{10,}", message.getvalue())[1]  # between the lines under the title and above the hints
        raise UsageError(" ".join(body.split())) from None


def check(options: Options, settings: Any, ranks: Ranks) -> None:
    """Raises UsageError when options and settings cannot work together on these ranks."""
    sequences = settings.batch_tokens // settings.context
    if sequences % ranks.world:
        raise UsageError(f"{sequences} sequences per step do not split evenly over {ranks.world} processes")
    if options.seed < 0:
        raise UsageError(f"--seed must be from 0 to {LARGEST}")
    if any(value is not None and value <= 0 for value in (options.steps, options.seconds)):
        raise UsageError("--steps and --seconds must be positive")
    if options.steps and options.seconds:
        raise UsageError("--steps and --seconds are two budgets: give one")
    if not options.steps and not options.seconds and rules.track(options.track).train_seconds is None:
        raise UsageError(f"track {options.track} has no time limit: give --seconds or --steps")


def check_paths(options: Options) -> None:
    """Raises UsageError when a file to be written would fall on another, on the data or on a folder.

    Raises OSError when artifact or picture could not take their names.
    """
    if options.out.is_dir():
        raise UsageError(f"--out {options.out} is a folder; name a file in it")
    seen: dict[Path, str] = {}
    for name, path in (
        ("--out", options.out),
        ("--log" if options.log else "the log", log_path(options)),
        ("the picture of the loss", beside(options.out, PICTURE)),
    ):
        if path.is_dir():
            raise UsageError(f"{name} {path} is a folder; name a file in it")
        if path != log_path(options):  # which is written in place, so it may be a link or a device
            check_replaceable(path)
        real = Path(os.path.realpath(path))  # unlike Path.resolve it lets loops of links pass
        if real.is_relative_to(os.path.realpath(options.data)):
            raise UsageError(f"{name} {path} lies in the dataset folder {options.data}; choose another folder")
        if real in seen:
            raise UsageError(f"{seen[real]} and {name} are both {path}; choose another name for one of them")
        seen[real] = name


def log_path(options: Options) -> Path:
    return options.log or beside(options.out, ".jsonl")


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
                f"torch.compile failed ({gist(error)}); mend what it needs, or train without it by --compile=0"
            ) from None
        memory = "can't allocate memory", "Storage size calculation overflowed"
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in memory):
            raise
        raise EnvironmentBroken(
            f"out of memory with {settings.micro_tokens:,} tokens at once; try --micro_tokens="
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
        "track": run.options.track,
        "data": run.data.name,
        "seed": run.options.seed,
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
