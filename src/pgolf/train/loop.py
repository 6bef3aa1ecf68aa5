"""From settings to artifact: what trainers share, in the order in which it happens.

Build the model, compile and warm up on made-up tokens, pack once for practice, undo all that, start the clock, open
the data, train, pack. What comes before the clock costs nothing and learns nothing; everything after it counts.
"""

import argparse
import json
import math
import shlex
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pgolf import rules
from pgolf.data.dataset import Dataset, open_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import beside
from pgolf.train.clock import Clock
from pgolf.train.loader import batches
from pgolf.train.log import Log, say
from pgolf.train.ranks import Ranks
from pgolf.train.settings import (
    PICTURE,
    complain,
    description,
    faster_dtype,
    log_path,
    stop_on_signals,
    use_compiler,
)


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    args: argparse.Namespace
    settings: Any
    data: Dataset
    ranks: Ranks
    model: Any
    forward: Callable[..., Tensor]
    """The model's loss, compiled or not."""
    orthogonalize: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """How long to train: so many steps, or by the wall clock when `steps` is None."""

    steps: int | None
    seconds: float
    """Time to train: the limit less what packing takes."""
    step_seconds: float
    """What the longest kind of step took in the warm-up."""
    ahead: int
    """Steps that the host may be ahead of the device, so that its clock is early."""

    def left(self, step: int, elapsed: float, begun: float = 0.0) -> float:
        """Steps that there is time for, before step number `step` at `elapsed` seconds; the first began at `begun`."""
        if self.steps is not None:
            return self.steps - step
        each = max(self.step_seconds, (elapsed - begun) / step if step else 0.0)
        return (self.seconds - elapsed) / each - self.ahead

    def done(self, step: int, elapsed: float) -> float:
        """How much of the run is over then, from 0 to 1."""
        return min(1.0, elapsed / self.seconds) if self.steps is None else step / self.steps


class Trainer(Protocol):
    """What a baseline does its own way; made anew after the warm-up."""

    def begin(self) -> None:
        """First thing under the clock."""

    def stages(self) -> Sequence[Callable[[Tensor], object]]:
        """One function for each kind of step that training will take, for practice on made-up ids (B, T)."""

    def step(self, step: int, left: float, done: float, ids: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        """Train on a batch (B, T); returns the loss and the factor of the learning rates."""

    def save(self, path: Path, feed: Iterator[tuple[Tensor, Tensor]]) -> tuple[dict[str, Any], str]:
        """Pack the artifact, on rank 0; returns facts for the log and a sentence. `feed` has unused batches."""


def build(
    args: argparse.Namespace,
    settings: Any,
    ranks: Ranks,
    model_class: Any,
    config_class: Any,
    orthogonalize: Callable[..., Tensor],
) -> Run:
    """Model and compiled functions. Of the data this reads names and tokenizer, no training token."""
    data = open_dataset(args.data)
    if not data.train_shards:
        raise UsageError(f"{args.data}: holds no training shards")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        settings = replace(settings, vocab_size=data.vocab_size)
    except ValueError as error:
        raise UsageError(f"{args.data}: {error}") from None
    torch.manual_seed(args.seed)  # on the CPU and the same on each rank, so all start from the same weights
    config = config_class(**{f.name: getattr(settings, f.name) for f in fields(config_class)})
    model = model_class(config).to(ranks.device)
    model.dtype = faster_dtype(ranks) if settings.bf16 else torch.float32
    orthogonalize = partial(orthogonalize, dtype=model.dtype)
    compiling = use_compiler(settings, ranks)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if compiling else model
    if compiling and ranks.gpu:  # on a CPU there is next to nothing to fuse in it
        orthogonalize = torch.compile(orthogonalize, dynamic=False)
    return Run(args, settings, data, ranks, model, forward, orthogonalize)


def train_and_pack(run: Run, new_trainer: Callable[[Run], Trainer], source: Mapping[str, bytes]) -> None:
    """All the rest."""
    args, settings, ranks = run.args, run.settings, run.ranks
    limit = args.seconds or rules.track(args.track).train_seconds or math.inf
    step_seconds, pack_seconds = warm_up(run, new_trainer(run))
    time_to_train = limit - 1.3 * pack_seconds - 0.5
    if not args.steps and time_to_train < 2 * step_seconds:
        raise UsageError(f"{limit:g} s are too few: packing takes {pack_seconds:.1f} s, a step {step_seconds:.1f} s")
    budget = Budget(args.steps, time_to_train, step_seconds, 2 if ranks.gpu else 0)
    log = Log(log_path(args) if ranks.rank == 0 else None, args.steps, limit, settings.log_every, settings.batch_tokens)
    log.write(**description(run, source, step_seconds, pack_seconds))
    trainer, stop, clock = new_trainer(run), stop_on_signals(), Clock(limit)

    clock.start()
    steps, feed = train(run, trainer, budget, clock, stop, log)
    if ranks.rank != 0:
        return
    trained = clock.elapsed()
    facts, sentence = trainer.save(args.out, feed)
    seconds = clock.elapsed()

    tokens = steps * settings.batch_tokens
    times = {"seconds": round(seconds, 3), "train_seconds": round(trained, 3), "stopped": stop.is_set()}
    log.write(steps=steps, tokens=tokens, **times, **facts)
    log.close()
    say(f"{steps:,} steps, {tokens:,} tokens{', stopped by a signal' if stop.is_set() else ''}")
    say(f"{sentence}; {seconds:.1f} seconds of {limit:g}")
    say("score it with: " + shlex.join(["pgolf", "score", str(args.out), "--data", str(args.data)]))
    if fault := log.plot(beside(args.out, PICTURE)):
        complain(f"{fault}; artifact and log are not affected")
    if log.failure:
        raise EnvironmentBroken(f"{log_path(args)}: {log.failure}; the log is cut short, {args.out} is complete")
    if seconds > limit and not args.steps:
        raise Refused(f"the artifact was finished {seconds - limit:.1f} s after the limit of {limit:g} s")


def warm_up(run: Run, trainer: Trainer) -> tuple[float, float]:
    """Compile, take some steps on made-up tokens and pack, then restore the weights bit for bit.

    Returns the seconds of the longest kind of step and of packing. Raises Refused when the artifact cannot fit.
    """
    s, ranks = run.settings, run.ranks
    initial = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    generator, step_seconds = torch.Generator().manual_seed(0), 0.0
    shape = s.batch_tokens // s.context // ranks.world, s.context
    for stage in trainer.stages():
        for _ in range(s.warmup_steps):
            ids = torch.randint(s.vocab_size, shape, generator=generator).to(ranks.device)
            ranks.synchronize()
            start = time.monotonic()
            stage(ids)
            ranks.synchronize()
        step_seconds = max(step_seconds, time.monotonic() - start)
    start = time.monotonic()
    if ranks.rank == 0:
        out = run.args.out
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".warm-up-") as folder:
            trainer.save(Path(folder) / out.name, repeat((ids, ids)))
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
        while len(unread) > budget.ahead:
            done, scale, read = unread.popleft()
            log.step(done, read(), clock.elapsed(), scale)
    for done, scale, read in unread:
        log.step(done, read(), clock.elapsed(), scale)
    return step, chain([batch], feed)


def gradients(forward: Callable[..., Tensor], batch: Sequence[Tensor], most: int) -> Tensor:
    """Forward and backward on a batch (B, T, ...), in equal parts of at most `most` sequences; returns the loss."""
    count = len(batch[0])
    micro = max(size for size in range(1, max(1, most) + 1) if count % size == 0)  # equal: one compiled shape
    total = torch.zeros((), device=batch[0].device)
    for part in zip(*(torch.split(t, micro) for t in batch), strict=True):
        loss = forward(*part) * (micro / count)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def momentum(settings: Any, step: int) -> float:
    """Muon's, which rises to its final value over the first steps."""
    s = settings
    return float(s.momentum_start + (s.momentum - s.momentum_start) * min(1.0, step / s.momentum_steps))


LANES = {"main": 2048, "laptop": 128, "unlimited": 128}
"""Parts of the text that are scored beside each other: fewer are slower, more cut the text into shorter pieces."""


def members(run: Run, source: Mapping[str, bytes], name: str, **changes: Any) -> dict[str, bytes]:
    """The artifact without its weights: code, tokenizer, and the manifest, usual but for these changes."""
    manifest = {
        "name": name,
        "author": "pgolf",
        "track": run.args.track,
        "vocab_size": run.data.vocab_size,
        "bos": run.data.bos,
        "tokenizer": "tokenizer.model",
        "form": "step",
        "layout": "parts",
        "lanes": LANES[run.args.track],
        "packages": ["torch"],
    }
    if run.data.transform is not None:
        manifest["transform"] = run.data.transform
    text = json.dumps(manifest | changes, indent=1)
    return dict(source) | {"submission.json": text.encode(), "tokenizer.model": run.data.tokenizer.read_bytes()}
