"""From settings to artifact: what trainers share, in the order in which it happens.

Build the model, compile and warm up on random tokens, pack once for practice, undo all that, start the clock, open
the data, train, pack. What comes before the clock is free and teaches nothing; everything after it is timed.
"""

import json
import math
import os
import shlex
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from statistics import median_low
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pgolf import __version__, rules
from pgolf.data.dataset import Dataset, open_dataset
from pgolf.errors import EnvironmentBroken, PgolfError, Refused, UsageError
from pgolf.files import beside
from pgolf.train.clock import Clock
from pgolf.train.handover import hand_over, open_data
from pgolf.train.loader import batches
from pgolf.train.log import Log, say
from pgolf.train.ranks import Ranks
from pgolf.train.settings import (
    PICTURE,
    Options,
    check,
    check_paths,
    complain,
    description,
    faster_dtype,
    flags,
    interrupt,
    log_path,
    on_signals,
    one_sentence,
    parse,
    stop_on_signals,
    use_compiler,
)

S = TypeVar("S")


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    options: Options
    settings: Any
    data: Dataset
    ranks: Ranks
    model: Any
    forward: Callable[..., Tensor]
    """Loss of the model, compiled or not."""
    orthogonalize: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or by the wall clock when `steps` is None."""

    steps: int | None
    seconds: float
    """Time to train: the limit less what packing takes."""
    step_seconds: float
    """Of the slowest kind of step in the warm-up."""
    in_flight: int
    """In-flight steps to reserve time for."""

    def left(self, step: int, elapsed: float, begun: float = 0.0) -> float:
        """Steps that there is time for, before step number `step` at `elapsed` seconds; the first began at `begun`."""
        if self.steps is not None:
            return self.steps - step
        each = max(self.step_seconds, (elapsed - begun) / step if step else 0.0)
        return (self.seconds - elapsed) / each - self.in_flight

    def done(self, step: int, elapsed: float) -> float:
        """Fraction of the run that is over, from 0 to 1."""
        return min(1.0, elapsed / self.seconds) if self.steps is None else step / self.steps


class Trainer(Protocol):
    """What differs between baselines; a new one is made after the warm-up."""

    def begin(self) -> None:
        """First thing under the clock."""

    def stages(self) -> Sequence[Callable[[Tensor], object]]:
        """One function for each kind of step that training will take, to be called on random ids (B, T)."""

    def step(self, step: int, left: float, done: float, ids: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        """Train on a batch (B, T); returns the loss and the factor of the learning rates."""

    def save(
        self, path: Path, feed: Iterator[tuple[Tensor, Tensor]], training: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        """Pack the artifact, on rank 0; returns facts for the log and a sentence.

        `feed` has unused batches, `training` is the manifest's field.
        """


def main(
    argv: Sequence[str] | None,
    summary: str,
    presets: Mapping[str, S],
    build: Callable[[Options, S, Ranks], Run],
    new_trainer: Callable[[Run], Trainer],
    source: Mapping[str, bytes],
) -> int:
    """A trainer from its command line to its exit code; `source` is the code that goes into the artifact."""
    on_signals(interrupt)
    try:
        options, settings = parse(argv, summary, presets)
        ranks = Ranks()
        check(options, settings, ranks)
        with one_sentence(settings):
            check_paths(options)
            ranks.join()
            arguments = flags(options, settings, presets)
            train_and_pack(build(options, settings, ranks), new_trainer, source, arguments)
        ranks.leave()  # not after a failure: it would wait for ranks that wait for this one
        return 0
    except PgolfError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, EnvironmentBroken):
            complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted before the clock started")
        return 130


def build(
    options: Options,
    settings: Any,
    ranks: Ranks,
    model_class: Any,
    config_class: Any,
    orthogonalize: Callable[..., Tensor],
) -> Run:
    """Model and compiled functions. Of the data this reads names and tokenizer, no training token."""
    data = open_dataset(options.data)
    if not data.train_shards:
        raise UsageError(f"{options.data}: holds no training shards")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        settings = replace(settings, vocab_size=data.vocab_size)
    except ValueError as error:
        raise UsageError(f"{options.data}: {error}") from None
    torch.manual_seed(options.seed)  # on the CPU and the same on each rank, so all start from the same weights
    config = config_class(**{f.name: getattr(settings, f.name) for f in fields(config_class)})
    model = model_class(config).to(ranks.device)
    model.dtype = faster_dtype(ranks) if settings.bf16 else torch.float32
    orthogonalize = partial(orthogonalize, dtype=model.dtype)
    compiling = use_compiler(settings, ranks)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if compiling else model
    if compiling and ranks.gpu:  # on a CPU there is next to nothing to fuse in it
        orthogonalize = torch.compile(orthogonalize, dynamic=False)
    return Run(options, settings, data, ranks, model, forward, orthogonalize)


PACK_MARGIN = 1.3
"""Safety factor on the packing time of the warm-up: the machine may be busier at the end."""
RESERVE = 0.5
"""Seconds to spare: a step or the writing of the file may take longer than any before."""
IN_FLIGHT = 2
"""Steps that a GPU may have queued when the host looks at its clock."""


def train_and_pack(
    run: Run, new_trainer: Callable[[Run], Trainer], source: Mapping[str, bytes], arguments: Sequence[str]
) -> None:
    """Warm up, train, pack and report. Raises what `warm_up` and `report` do, UsageError when there is no time."""
    options, s, ranks = run.options, run.settings, run.ranks
    limit = options.seconds or rules.track(options.track).train_seconds or math.inf
    # Nothing of the warm-up stays but its times, so that training can stop when there is just time to pack.
    step_seconds, pack_seconds = warm_up(run, new_trainer(run), arguments)
    train_seconds = limit - PACK_MARGIN * pack_seconds - RESERVE
    if not options.steps and train_seconds < 2 * step_seconds:
        raise UsageError(f"{limit:g} s are too few: packing takes {pack_seconds:.1f} s, a step {step_seconds:.1f} s")
    budget = Budget(options.steps, train_seconds, step_seconds, IN_FLIGHT if ranks.gpu else 0)
    # Before the clock: a log that cannot be opened ends the run here, and the optimizer state is allocated.
    log = Log(log_path(options) if ranks.rank == 0 else None, options.steps, limit, s.log_every, s.batch_tokens)
    log.write(**description(run, source, step_seconds, pack_seconds))
    trainer, stop = new_trainer(run), stop_on_signals()

    clock = open_data(limit, ranks)
    steps, feed = train(run, trainer, budget, clock, stop, log)
    if ranks.rank == 0:
        trained = clock.elapsed()
        facts, sentence = trainer.save(options.out, feed, declared(run, arguments, steps))
        seconds = clock.elapsed()
        times = {"seconds": round(seconds, 3), "train_seconds": round(trained, 3), "stopped": stop.is_set()}
        log.write(steps=steps, tokens=steps * s.batch_tokens, **times, **facts)
        hand_over(options.out, log_path(options))
        log.close()
        say(f"{steps:,} steps, {steps * s.batch_tokens:,} tokens{', stopped by a signal' if stop.is_set() else ''}")
        say(f"{sentence}; {seconds:.1f} seconds of {limit:g}")
        report(options, log, seconds - limit)


def report(options: Options, log: Log, late: float) -> None:
    """Say what comes next and draw the loss, now that artifact and log are complete.

    Raises EnvironmentBroken when the log was cut short, Refused when the artifact was `late`, in seconds.
    """
    say("score it with: " + shlex.join(["pgolf", "score", str(options.out), "--data", str(options.data)]))
    if fault := log.plot(beside(options.out, PICTURE)):
        complain(f"{fault}; artifact and log are not affected")
    if log.failure:
        raise EnvironmentBroken(f"{log_path(options)}: {log.failure}; the log is cut short, {options.out} is complete")
    if late > 0 and not options.steps:
        raise Refused(f"the artifact was finished {late:.1f} s after the limit of {log.limit:g} s")


def warm_up(run: Run, trainer: Trainer, arguments: Sequence[str]) -> tuple[float, float]:
    """Compile, take some steps on random tokens and pack, then restore the weights bit for bit.

    Returns the seconds of the slowest kind of step and of packing. Raises Refused when the artifact cannot fit.
    """
    s, ranks = run.settings, run.ranks
    initial = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    generator, step_seconds = torch.Generator().manual_seed(0), 0.0
    shape = s.batch_tokens // s.context // ranks.world, s.context
    for stage in trainer.stages():
        taken: list[float] = []
        for _ in range(s.warmup_steps):
            ids = torch.randint(s.vocab_size, shape, generator=generator).to(ranks.device)
            ranks.synchronize()
            start = time.monotonic()
            stage(ids)
            ranks.synchronize()
            taken.append(time.monotonic() - start)
        step_seconds = max(step_seconds, median_low(taken[-5:]))  # the first ones compile
    start = time.monotonic()
    if ranks.rank == 0:
        out = run.options.out
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".warm-up-") as folder:
            trainer.save(Path(folder) / out.name, repeat((ids, ids)), declared(run, arguments, 0))
    pack_seconds = time.monotonic() - start
    run.model.load_state_dict(initial)
    step_seconds, pack_seconds = ranks.all_reduce_max(step_seconds, pack_seconds)
    return step_seconds, pack_seconds


def train(
    run: Run, trainer: Trainer, budget: Budget, clock: Clock, stop: threading.Event, log: Log
) -> tuple[int, Iterator[tuple[Tensor, Tensor]]]:
    """Train until the budget is spent or a signal came; returns the number of steps, and the batches not used."""
    s, ranks = run.settings, run.ranks
    shape = s.vocab_size, s.batch_tokens, s.context
    feed = batches(run.data.train_shards, *shape, rank=ranks.rank, world=ranks.world, device=ranks.device)
    unread: deque[tuple[int, float, Callable[[], float]]] = deque()
    trainer.begin()
    begun = clock.elapsed()
    for step, batch in enumerate(feed):
        elapsed, stopping = ranks.all_reduce_max(clock.elapsed(), stop.is_set())
        left = budget.left(step, elapsed, begun)
        if stopping or left < 1:
            break
        loss, scale = trainer.step(step, left, budget.done(step, elapsed), *batch)
        unread.append((step + 1, scale, ranks.read_later(loss)))
        # Reading an old loss waits for its step only, and so keeps the host from running further ahead.
        while len(unread) > budget.in_flight:
            done, scale, read = unread.popleft()
            log.step(done, read(), clock.elapsed(), scale)
    for done, scale, read in unread:
        log.step(done, read(), clock.elapsed(), scale)
    return step, chain([batch], feed)


def gradients(forward: Callable[..., Tensor], batch: Sequence[Tensor], at_once: int) -> Tensor:
    """Forward and backward on a batch (B, T, ...), in equal parts of at most `at_once` sequences; returns the loss."""
    count = len(batch[0])
    micro = max(size for size in range(1, max(1, at_once) + 1) if count % size == 0)  # equal: one compiled shape
    total = torch.zeros((), device=batch[0].device)
    for part in zip(*(torch.split(t, micro) for t in batch), strict=True):
        loss = forward(*part) * (micro / count)
        loss.backward()
        total += loss.detach()
    return total


def momentum(settings: Any, step: int) -> float:
    """Muon's, which rises to its final value over the first steps."""
    s = settings
    return float(s.momentum_start + (s.momentum - s.momentum_start) * min(1.0, step / s.momentum_steps))


LANES = {"main": 2048, "laptop": 512, "unlimited": 128}
"""Lanes of the step form: fewer are slower, more take more memory and cut the text into shorter parts."""


def declared(run: Run, arguments: Sequence[str], steps: int) -> dict[str, Any]:
    """What the manifest says about the training run."""
    s = run.settings
    parameters = sum(p.numel() for p in run.model.parameters())
    counts = {"steps": steps, "tokens": steps * s.batch_tokens, "parameters": parameters}
    return {"arguments": list(arguments), "settings": asdict(s), **counts}


def members(data: Dataset, track: str, source: Mapping[str, bytes], name: str, **changes: Any) -> dict[str, bytes]:
    """The artifact without its weights: code, tokenizer, and the usual manifest with these changes."""
    manifest = {
        "name": name,
        "author": "pgolf",
        "track": track,
        "vocab_size": data.vocab_size,
        "bos": data.bos,
        "tokenizer": "tokenizer.model",
        "form": "step",
        "layout": "parts",
        "lanes": LANES[track],
        "packages": ["torch"],
        "pgolf": __version__,
    }
    if data.transform is not None:
        manifest["transform"] = data.transform
    text = json.dumps(manifest | changes, indent=1, allow_nan=False)
    return dict(source) | {"submission.json": text.encode(), "tokenizer.model": data.tokenizer.read_bytes()}
