"""Train the contest's baseline under the clock and pack the artifact.

    python baselines/naive/train.py --data DIR --out artifact.zst --track laptop
    torchrun --standalone --nproc_per_node=8 baselines/naive/train.py --data DIR --out artifact.zst

The order of events: read the command line, build the model, compile and warm up on made-up tokens, undo the
warm-up, start the clock, open the data, train, write the artifact. What comes before the clock costs nothing
and learns nothing; everything after it counts.
"""

import argparse
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import command
import optim
import quant
import torch
from command import description, faster_dtype, stop_on_signals
from model import GPT, GPTConfig
from runlog import Log
from team import Team
from torch import Tensor

from pgolf import rules
from pgolf.artifact import pack
from pgolf.clock import Clock
from pgolf.data.dataset import Dataset, open_dataset
from pgolf.data.loader import batches
from pgolf.errors import Refused, UsageError


@dataclass(frozen=True)
class Settings(GPTConfig):
    """Shape of the model (see GPTConfig) and recipe; the defaults are the contest's for 8 H100."""

    batch_tokens: int = 524_288
    """Tokens per step, all ranks together."""
    micro_tokens: int = 65_536
    """Most tokens that one rank takes through the model at once."""
    matrix_lr: float = 0.04
    embed_lr: float = 0.05
    vector_lr: float = 0.04
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_steps: int = 500
    """Muon's momentum goes from `momentum_start` to `momentum` over these steps."""
    warmdown_steps: int = 1200
    """The learning rates fall to 0 over the last so many steps, or over the time that so many take."""
    warmup_steps: int = 20
    """Steps on made-up tokens before the clock; undone afterwards."""
    compile: bool = True
    log_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_tokens", "micro_tokens", "momentum_steps", "warmdown_steps", "warmup_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_tokens % self.context:
            raise ValueError(f"batch_tokens {self.batch_tokens} is not a multiple of the context {self.context}")


LAPTOP = Settings(
    context=256,
    layers=4,
    dim=128,
    heads=2,
    kv_heads=1,
    batch_tokens=8192,
    micro_tokens=8192,
    momentum_steps=100,
    warmdown_steps=150,
    warmup_steps=3,
    log_every=10,
)
MIDDLE = replace(
    LAPTOP,
    context=512,
    dim=256,
    heads=4,
    kv_heads=2,
    batch_tokens=4096,
    micro_tokens=4096,
    warmdown_steps=1000,
    log_every=50,
)
"""For 3,000,000 bytes and half an hour on one core: --track unlimited --preset middle --seconds 2100."""
DESCRIPTION = "Train the naive baseline under the clock and pack the artifact."
SOURCE = {file.name: file.read_bytes() for file in Path(__file__).parent.glob("*.py")}  # what runs now
PRESETS = {"main": Settings(), "laptop": LAPTOP, "unlimited": Settings(), "middle": MIDDLE}


@dataclass(frozen=True)
class Schedule:
    """How long to train and how fast to learn: by steps, or by the wall clock when `steps` is None."""

    steps: int | None
    seconds: float
    """Time to train: the limit less what packing takes."""
    warmdown_steps: int
    step_seconds: float
    """What a step took in the warm-up; counts until the first real one is done."""
    ahead: int
    """Steps that the host may be ahead of the device, so that its clock is early."""

    def scale(self, step: int, elapsed: float) -> float | None:
        """Factor for the learning rates of step `step` at `elapsed` seconds; None when training is over."""
        if self.steps is not None:
            left = float(self.steps - step)
        else:
            left = (self.seconds - elapsed) / (elapsed / step if step else self.step_seconds) - self.ahead
        return None if left < 1 else min(1.0, left / min(self.warmdown_steps, step + left))


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    args: argparse.Namespace
    settings: Settings
    data: Dataset
    team: Team
    model: GPT
    forward: Callable[[Tensor, Tensor], Tensor]
    """The model's loss, compiled or not."""
    orthogonalize: Callable[[Tensor], Tensor]

    def optimizer(self) -> optim.Optimizer:
        s = self.settings
        return optim.Optimizer(self.model, s.matrix_lr, s.embed_lr, s.vector_lr, self.orthogonalize)


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(argv, DESCRIPTION, PRESETS, train_and_pack)


def train_and_pack(args: argparse.Namespace, settings: Settings, team: Team) -> None:
    run = build(args, settings, team)
    step_seconds, pack_seconds = warm_up(run)
    track = rules.track(args.track)
    limit = args.seconds or track.train_seconds or math.inf
    time_to_train = limit - 1.5 * pack_seconds - 0.5
    if not args.steps and time_to_train < 2 * step_seconds:
        raise UsageError(f"{limit:g} s are too few: packing takes {pack_seconds:.1f} s, a step {step_seconds:.1f} s")
    schedule = Schedule(args.steps, time_to_train, settings.warmdown_steps, step_seconds, 2 if team.gpu else 0)
    path = (args.log or args.out.with_suffix(".jsonl")) if team.rank == 0 else None
    log = Log(path, args.steps, limit, settings.log_every, settings.batch_tokens)
    log.write(**description(run, SOURCE, step_seconds, pack_seconds))
    optimizer, stop, clock = run.optimizer(), stop_on_signals(), Clock(limit)

    clock.start()
    steps = train(run, optimizer, schedule, clock, stop, log)
    if team.rank != 0:
        return
    size = save(run, args.out)
    seconds = clock.elapsed()

    log.bar.close()
    tokens = steps * settings.batch_tokens
    log.write(steps=steps, tokens=tokens, seconds=round(seconds, 3), artifact_bytes=size, stopped=stop.is_set())
    log.plot(args.out.with_suffix(".png"))
    print(f"{steps:,} steps, {tokens:,} tokens{', stopped by a signal' if stop.is_set() else ''}")
    print(f"{size:,} bytes of {track.artifact_bytes:,}; {seconds:.1f} seconds of {track.train_seconds or limit:g}")
    print(f"score it with: pgolf score {args.out} --data {args.data}")
    if seconds > limit:
        raise Refused(f"the artifact was finished {seconds - limit:.1f} s after the limit of {limit:g} s")


def build(args: argparse.Namespace, settings: Settings, team: Team) -> Run:
    """Model and compiled functions. Of the data this reads names and tokenizer, no training token."""
    data = open_dataset(args.data)
    if not data.train_shards:
        raise UsageError(f"{args.data}: holds no training shards")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = replace(settings, vocab_size=data.vocab_size)
    torch.manual_seed(args.seed)  # on the CPU and the same on each rank, so all start from the same weights
    model = GPT(GPTConfig(**{f.name: getattr(settings, f.name) for f in fields(GPTConfig)})).to(team.device)
    model.dtype = faster_dtype(model, team)
    compiling = command.can_compile(settings, team)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if compiling else model
    on_gpu = compiling and team.gpu  # on a CPU there is next to nothing to fuse in it
    orthogonalize = torch.compile(optim.orthogonalize, dynamic=False) if on_gpu else optim.orthogonalize
    return Run(args, settings, data, team, model, forward, orthogonalize)


def warm_up(run: Run) -> tuple[float, float]:
    """Compile, take some steps on made-up tokens and pack, then restore the weights bit for bit.

    Returns the seconds of a step and of packing. Raises Refused when the artifact will not fit its limit.
    """
    s, team = run.settings, run.team
    initial = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    optimizer, start = run.optimizer(), 0.0
    for step in range(s.warmup_steps):
        shape = s.batch_tokens // s.context // team.world, s.context
        ids = torch.randint(s.vocab_size, shape, generator=generator).to(team.device)
        if step == s.warmup_steps - 1:
            team.settle()
            start = time.monotonic()
        train_step(run, optimizer, ids, ids, step, 1.0)
    team.settle()
    step_seconds, start = time.monotonic() - start, time.monotonic()
    if team.rank == 0:
        trial = run.args.out.with_name(run.args.out.name + ".trial")
        save(run, trial)
        trial.unlink()
    pack_seconds = time.monotonic() - start
    run.model.load_state_dict(initial)
    step_seconds, pack_seconds = team.most(step_seconds, pack_seconds)
    return step_seconds, pack_seconds


def train(
    run: Run, optimizer: optim.Optimizer, schedule: Schedule, clock: Clock, stop: threading.Event, log: Log
) -> int:
    """Train until the schedule ends or a signal came; returns the number of steps."""
    s, team = run.settings, run.team
    feed = batches(
        run.data.train_shards,
        s.vocab_size,
        s.batch_tokens,
        s.context,
        rank=team.rank,
        world=team.world,
        device=team.device,
    )
    unread: deque[tuple[int, float, Callable[[], float]]] = deque()
    for step, (ids, targets) in enumerate(feed):
        elapsed, stopping = team.most(clock.elapsed(), stop.is_set())
        scale = schedule.scale(step, elapsed)
        if stopping or scale is None:
            break
        loss = train_step(run, optimizer, ids, targets, step, scale)
        unread.append((step + 1, scale, team.read_later(loss)))
        # Reading an old loss waits for its step only, and so keeps the host from running further ahead.
        while len(unread) > schedule.ahead:
            done, scale, read = unread.popleft()
            log.step(done, read(), clock.elapsed(), scale)
    for done, scale, read in unread:
        log.step(done, read(), clock.elapsed(), scale)
    return step


def train_step(run: Run, optimizer: optim.Optimizer, ids: Tensor, targets: Tensor, step: int, scale: float) -> Tensor:
    """One step on this rank's ids and targets (B, T), in micro-steps where B is too large; returns the loss."""
    s = run.settings
    most = max(1, s.micro_tokens // s.context)
    micro = max(size for size in range(1, most + 1) if len(ids) % size == 0)  # equal parts: one compiled shape
    total = torch.zeros((), device=ids.device)
    for x, y in zip(ids.split(micro), targets.split(micro), strict=True):
        loss = run.forward(x, y) * (micro / len(ids))
        loss.backward()
        total += loss.detach()
    total = run.team.average(run.model, total)
    momentum = s.momentum_start + (s.momentum - s.momentum_start) * min(1.0, step / s.momentum_steps)
    optimizer.step(scale, momentum)
    return total


def save(run: Run, path: Path) -> int:
    """Pack weights, code and tokenizer into the artifact at `path`; returns its size in bytes."""
    config = asdict(run.model.config)
    manifest = {
        "name": "naive baseline",
        "author": "pgolf",
        "track": run.args.track,
        "vocab_size": run.data.vocab_size,
        "bos": run.data.bos,
        "context": config["context"],
        "window": "packed",
        "stride": None,
        "form": "simple",
        "adapts": False,
        "tokenizer": "tokenizer.model",
        "packages": ["torch"],
    }
    members = dict(SOURCE)
    members["submission.json"] = json.dumps(manifest, indent=1).encode()
    members["tokenizer.model"] = run.data.tokenizer.read_bytes()
    members["weights.bin"] = quant.dumps(config, run.model.state_dict())
    return pack(members, path, rules.track(run.args.track).artifact_bytes)


if __name__ == "__main__":
    sys.exit(main())
