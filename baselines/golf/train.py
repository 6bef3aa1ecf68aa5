"""Train the strong baseline under the clock, fit it to the limit, and pack the artifact.

    python baselines/golf/train.py --data DIR --out artifact.zst --track laptop
    torchrun --standalone --nproc_per_node=8 baselines/golf/train.py --data DIR --out artifact.zst

The order of events: read the command line, build the model, compile and warm up on made-up tokens, pack once for
practice, undo all that, start the clock, open the data, train, calibrate, quantise, write the artifact. What comes
before the clock costs nothing and learns nothing; everything after it counts.

Command line, log and processes are the naive baseline's (`command`, `runlog`, `team`); an artifact holds copies.
"""

import argparse
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
SHARED = HERE.parent / "naive"
sys.path.append(str(SHARED))  # behind this folder, so only what it lacks comes from there

import coder
import command
import ngram
import numpy as np
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
from pgolf.data.shards import read_shard
from pgolf.errors import Refused, UsageError

DESCRIPTION = "Train the strong baseline under the clock and pack the artifact."
BORROWED = (SHARED / f"{name}.py" for name in ("command", "runlog", "team"))
SOURCE = {path.name: path.read_bytes() for path in (*HERE.glob("*.py"), *BORROWED) if path.is_file()}  # what runs now


@dataclass(frozen=True)
class Settings(GPTConfig):
    """Shape and switches of the model (see GPTConfig) and recipe; the defaults are for 8 H100."""

    batch_tokens: int = 786_432
    """Tokens per step, all ranks together."""
    micro_tokens: int = 98_304
    """Most tokens that one rank takes through the model at once."""
    context_start: int = 1024
    """Sequences are so long until `grow_at` of the run is done (sequence length warm-up, arXiv:2108.06084); 0: off."""
    grow_at: float = 0.3
    loop_at: float = 0.35
    """Depth recurrence is switched on when so much of the run is done."""
    matrix_lr: float = 0.023
    table_lr: float = 0.03
    vector_lr: float = 0.02
    weight_decay: float = 0.09
    """Decoupled, for matrices and tables; smaller weights are cheaper to code as well (contest, April)."""
    momentum: float = 0.97
    momentum_start: float = 0.85
    momentum_steps: int = 500
    """Muon's momentum goes from `momentum_start` to `momentum` over these steps."""
    polar: bool = True
    """Polar Express instead of five equal Newton-Schulz steps (arXiv:2505.16932)."""
    row_norm: bool = True
    """Muon's rows get equal length before they are orthogonalised (contest)."""
    warmdown: float = 0.7
    """The learning rates fall linearly over the last so much of the run (arXiv:2405.18392) ..."""
    floor: float = 0.1
    """... to this part of their height (contest: 0.1)."""
    ema: float = 0.997
    """The packed weights are a moving average over the steps with this decay (contest); 0: the last ones."""

    gptq: bool = True
    """Round with the help of the layers' inputs (see quant.py) instead of to the nearest."""
    calibration_tokens: int = 131_072
    """Training tokens, one rank's, that show these inputs; inside the clock."""
    row_power: float = 1.0
    """1: the step follows each row's deviation; 0: one step per tensor."""
    step_table: float = 1.0
    step_attention: float = 1.0
    step_mlp: float = 1.0
    """Relative quantisation steps of tables, attention and MLPs: mixed precision."""
    finest: float = 0.04
    """Smallest step in standard deviations, when there is room to spare: 6.7 bits per weight."""
    ngram_least: int = 2
    """Rarer n-grams are dropped; more are where they would take over a third of the limit."""
    limit: int = 0
    """Largest artifact in bytes; 0: the track's."""

    document: bool = False
    """Score each document from its own start rather than one packed stream."""
    stride: int = 64
    """Sliding window: each window scores so many new tokens and sees the rest before them; 0: windows side by side."""

    warmup_steps: int = 20
    """Steps on made-up tokens before the clock; undone afterwards."""
    compile: bool = True
    log_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        least_one = "batch_tokens", "micro_tokens", "momentum_steps", "warmup_steps", "log_every", "calibration_tokens"
        for name in least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_tokens % self.context:
            raise ValueError(f"batch_tokens {self.batch_tokens} is not a multiple of the context {self.context}")
        if self.context_start and self.context % self.context_start:
            raise ValueError(f"context {self.context} is not a multiple of context_start {self.context_start}")
        if not 0 <= self.stride <= self.context:
            raise ValueError(f"stride {self.stride} is not within the context of {self.context}")
        if not quant.FINEST <= self.finest <= quant.COARSEST:
            raise ValueError(f"finest {self.finest} is not between {quant.FINEST} and {quant.COARSEST}")

    def length(self, progress: float) -> int:
        """Tokens per sequence when `progress` of the run is done."""
        return self.context_start if self.context_start and progress < self.grow_at else self.context

    def depth(self, progress: float) -> int:
        """Loops of the recurrent layers when `progress` of the run is done."""
        return self.loops if progress >= self.loop_at else 0

    def lr_scale(self, progress: float) -> float:
        """Factor for the learning rates when `progress` of the run is done."""
        return self.floor + (1 - self.floor) * min(1.0, (1 - progress) / max(self.warmdown, 1e-9))

    def precision(self) -> quant.Precision:
        return quant.Precision(self.gptq, self.row_power, self.step_table, self.step_attention, self.step_mlp)


# The main preset's switches are the contest's practice. Those of the laptop are measured: docs/benchmarks/golf.md.
LAPTOP = Settings(
    context=256,
    layers=4,
    dim=128,
    heads=2,
    kv_heads=1,
    mlp_ratio=2,
    rope_dims=0,
    softcap=0.0,
    parallel=0,
    loops=0,
    xsa=4,
    norm_scale=False,
    skips=False,
    bigram=0,
    ngram=4,
    batch_tokens=2048,
    micro_tokens=2048,
    context_start=0,
    momentum=0.95,
    momentum_steps=100,
    ema=0.0,
    floor=0.0,
    calibration_tokens=16_384,
    stride=0,
    warmup_steps=3,
    log_every=10,
)
MIDDLE = replace(
    LAPTOP,
    context=512,
    context_start=256,
    layers=5,
    dim=256,
    heads=4,
    mlp_ratio=3,
    xsa=5,
    norm_scale=True,
    skips=True,
    bigram=4096,
    batch_tokens=4096,
    micro_tokens=4096,
    matrix_lr=0.02,
    momentum_steps=300,
    stride=256,
    limit=3_000_000,
    log_every=50,
)
"""For 3,000,000 bytes and half an hour on one core: --track unlimited --preset middle --seconds 2100."""
PRESETS = {"main": Settings(), "laptop": LAPTOP, "unlimited": Settings(), "middle": MIDDLE}


@dataclass(frozen=True)
class Schedule:
    """How long to train: by steps, or by the wall clock when `steps` is None."""

    steps: int | None
    seconds: float
    """Time to train: the limit less what packing takes."""
    step_seconds: float
    """What the longest kind of step took in the warm-up."""
    ahead: int
    """Steps that the host may be ahead of the device, so that its clock is early."""

    def progress(self, step: int, elapsed: float) -> float | None:
        """How much of the run is done before step `step` at `elapsed` seconds; None when there is no time for it."""
        if self.steps is not None:
            return step / self.steps if step < self.steps else None
        each = max(self.step_seconds, elapsed / step if step else 0.0)
        return elapsed / self.seconds if elapsed + (1 + self.ahead) * each <= self.seconds else None


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    args: argparse.Namespace
    settings: Settings
    data: Dataset
    team: Team
    model: GPT
    forward: Callable[..., Tensor]
    """The model's loss, compiled or not."""
    orthogonalize: Callable[[Tensor], Tensor]

    def optimizer(self) -> optim.Optimizer:
        s = self.settings
        return optim.Optimizer(
            self.model,
            matrix_lr=s.matrix_lr,
            table_lr=s.table_lr,
            vector_lr=s.vector_lr,
            decay=s.weight_decay,
            orthogonalize=self.orthogonalize,
        )

    def limit(self) -> int:
        track = rules.track(self.args.track).artifact_bytes
        return min(self.settings.limit or track, track)

    def counts_limit(self) -> int:
        """Most bytes that the counts of n-grams may take."""
        return self.limit() // 3 if self.settings.ngram else 0


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(argv, DESCRIPTION, PRESETS, train_and_pack)


def train_and_pack(args: argparse.Namespace, settings: Settings, team: Team) -> None:
    run = build(args, settings, team)
    step_seconds, pack_seconds = warm_up(run)
    track = rules.track(args.track)
    limit = args.seconds or track.train_seconds or math.inf
    time_to_train = limit - 1.3 * pack_seconds - 0.5
    if not args.steps and time_to_train < 2 * step_seconds:
        raise UsageError(f"{limit:g} s are too few: packing takes {pack_seconds:.1f} s, a step {step_seconds:.1f} s")
    schedule = Schedule(args.steps, time_to_train, step_seconds, 2 if team.gpu else 0)
    path = (args.log or args.out.with_suffix(".jsonl")) if team.rank == 0 else None
    log = Log(path, args.steps, limit, settings.log_every, settings.batch_tokens)
    log.write(**description(run, SOURCE, step_seconds, pack_seconds))
    optimizer, stop, clock = run.optimizer(), stop_on_signals(), Clock(limit)

    clock.start()
    steps, calibration, counts = train(run, optimizer, schedule, clock, stop, log)
    if team.rank != 0:
        return
    trained = clock.elapsed()
    packed = save(run, calibration, counts, args.out)
    seconds = clock.elapsed()

    log.bar.close()
    tokens = steps * settings.batch_tokens
    log.write(
        steps=steps,
        tokens=tokens,
        seconds=round(seconds, 3),
        train_seconds=round(trained, 3),
        stopped=stop.is_set(),
        **asdict(packed),
    )
    log.plot(args.out.with_suffix(".png"))
    print(f"{steps:,} steps, {tokens:,} tokens{', stopped by a signal' if stop.is_set() else ''}")
    print(f"{packed.artifact_bytes:,} bytes of {run.limit():,}; {seconds:.1f} seconds of {limit:g}")
    print(
        f"weights: {packed.weights_bytes:,} bytes, {packed.bits:.2f} bits each, in steps of {packed.step:.3f} standard "
        f"deviations (finest {settings.finest:g}), which changed them by {100 * packed.error:.1f} %"
    )
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
    orthogonalize = partial(optim.orthogonalize, polar=settings.polar, row_norm=settings.row_norm)
    if compiling and team.gpu:  # on a CPU there is next to nothing to fuse in it
        orthogonalize = torch.compile(orthogonalize, dynamic=False)
    return Run(args, settings, data, team, model, forward, orthogonalize)


def warm_up(run: Run) -> tuple[float, float]:
    """Compile, take some steps on made-up tokens, calibrate on them and pack, then restore the weights bit for bit.

    Returns the seconds of a step and of packing. Raises Refused when no precision makes the artifact fit.
    """
    s, team = run.settings, run.team
    initial = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    optimizer, step_seconds = run.optimizer(), 0.0
    kinds = dict.fromkeys((s.length(p), s.depth(p)) for p in (0.0, s.grow_at, s.loop_at, 1.0))
    for length, depth in kinds:
        for _ in range(s.warmup_steps):
            shape = s.batch_tokens // s.context // team.world, s.context
            ids = torch.randint(s.vocab_size, shape, generator=generator).to(team.device)
            team.settle()
            start = time.monotonic()
            train_step(run, optimizer, (ids, ids, *made_up(s, ids)), length, depth, s.momentum_start, 1.0)
            team.settle()
        step_seconds = max(step_seconds, time.monotonic() - start)
    start = time.monotonic()
    if team.rank == 0:
        trial = run.args.out.with_name(run.args.out.name + ".trial")
        counts = bytes(torch.randint(256, (run.counts_limit(),), generator=generator).tolist())  # as large as they get
        try:
            save(run, ids.flatten().repeat(-(-s.calibration_tokens // ids.numel())), counts, trial)
        finally:
            trial.unlink(missing_ok=True)
    pack_seconds = time.monotonic() - start
    run.model.load_state_dict(initial)
    step_seconds, pack_seconds = team.most(step_seconds, pack_seconds)
    return step_seconds, pack_seconds


def train(
    run: Run, optimizer: optim.Optimizer, schedule: Schedule, clock: Clock, stop: threading.Event, log: Log
) -> tuple[int, Tensor, bytes]:
    """Train until the schedule ends or a signal came.

    Returns the number of steps, tokens (N,) for the calibration, and the packed counts of n-grams.

    The model is left with the averaged weights.
    """
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
    experts = Counted(run) if s.ngram else None
    weights = list(run.model.parameters())
    average = [w.detach().clone() for w in weights] if s.ema else []
    unread: deque[tuple[int, float, Callable[[], float]]] = deque()
    for step, (ids, targets) in enumerate(feed):
        elapsed, stopping = team.most(clock.elapsed(), stop.is_set())
        progress = schedule.progress(step, elapsed)
        if stopping or progress is None:
            break
        scale = s.lr_scale(progress)
        momentum = s.momentum_start + (s.momentum - s.momentum_start) * min(1.0, step / s.momentum_steps)
        batch = ids, targets, *(experts.batch(step) if experts else ())
        loss = train_step(run, optimizer, batch, s.length(progress), s.depth(progress), momentum, scale)
        if average:
            with torch.no_grad():  # the first weights are soon forgotten
                torch._foreach_lerp_(average, weights, max(1 - s.ema, 1 / (1 + step)))
        unread.append((step + 1, scale, team.read_later(loss)))
        # Reading an old loss waits for its step only, and so keeps the host from running further ahead.
        while len(unread) > schedule.ahead:
            done, scale, read = unread.popleft()
            log.step(done, read(), clock.elapsed(), scale)
    for done, scale, read in unread:
        log.step(done, read(), clock.elapsed(), scale)
    for weight, mean in zip(weights, average, strict=False):
        weight.data.copy_(mean)
    counts = experts.packed if experts else b""
    return step, tokens_for_calibration(ids, feed, s.calibration_tokens) if team.rank == 0 else ids, counts


class Counted:
    """The experts of the whole training text: packed, and what they say about each token when its fold is left out."""

    def __init__(self, run: Run) -> None:
        s, data, team = run.settings, run.data, run.team
        tokens = np.concatenate([read_shard(path, s.vocab_size) for path in data.train_shards]).astype(np.int64)
        least = s.ngram_least
        tables = ngram.count(tokens, s.vocab_size, s.ngram, least)
        while len(packed := ngram.dumps(tables, s.vocab_size)) > run.counts_limit():
            least += 1 + least // 4
            tables = ngram.count(tokens, s.vocab_size, s.ngram, least)
        said, kinds = zip(
            *(ngram.held_out(tokens, s.vocab_size, order, least) for order in range(2, s.ngram + 1)), strict=True
        )
        self.packed, self.device, self.context = packed, team.device, s.context
        self.said, self.kinds = np.stack(said, -1), np.stack(kinds, -1)  # (N, E)
        own = s.batch_tokens // team.world
        self.targets = team.rank * own + 1 + np.arange(own)  # positions in the stream of this rank's first targets
        self.step = s.batch_tokens

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """For batch number `step`, (B, T, E): what the experts say about the targets, and the kinds of contexts."""
        at = (self.targets + step * self.step) % len(self.said)
        shape = -1, self.context, self.said.shape[1]
        return tuple(torch.from_numpy(a[at]).view(shape).to(self.device) for a in (self.said, self.kinds))


def made_up(s: Settings, ids: Tensor) -> tuple[Tensor, ...]:
    """Experts' part of a made-up batch."""
    if not s.ngram:
        return ()
    shape = *ids.shape, s.ngram - 1
    return torch.full(shape, 0.1, device=ids.device), torch.ones(shape, dtype=torch.uint8, device=ids.device)


def tokens_for_calibration(ids: Tensor, feed: Iterator[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """`count` training tokens (count,), beginning with a batch `ids` that was fetched and not trained on."""
    parts = [ids.flatten()]
    while sum(map(len, parts)) < count:
        parts.append(next(feed)[0].flatten())
    return torch.cat(parts)[:count]


def train_step(
    run: Run,
    optimizer: optim.Optimizer,
    batch: Sequence[Tensor],
    length: int,
    depth: int,
    momentum: float,
    scale: float,
) -> Tensor:
    """One step on this rank's batch, cut into sequences of `length`; returns the loss.

    The batch is ids and targets (B, T) and, with experts, what they said and the kinds of contexts, (B, T, E). Where
    it is too large it goes through the model in equal parts.
    """
    batch = [t.reshape(-1, length, *t.shape[2:]) for t in batch]
    count, most = len(batch[0]), max(1, run.settings.micro_tokens // length)
    micro = max(size for size in range(1, most + 1) if count % size == 0)  # equal parts: one compiled shape
    total = torch.zeros((), device=batch[0].device)
    for ids, targets, *experts in zip(*(t.split(micro) for t in batch), strict=True):
        loss = run.forward(ids, targets, depth, *experts) * (micro / count)
        loss.backward()
        total += loss.detach()
    return optimizer.step(scale, momentum, total)


@dataclass(frozen=True)
class Packed:
    """What became of the weights."""

    artifact_bytes: int
    weights_bytes: int
    bits: float
    """Per weight of the matrices and tables, all side information included."""
    step: float
    error: float


@torch.no_grad()
def save(run: Run, calibration: Tensor, counts: bytes, path: Path) -> Packed:
    """Calibrate, quantise to what fits, and pack weights, code and tokenizer into the artifact at `path`."""
    s, limit = run.settings, run.limit()
    manifest = {
        "name": "golf baseline",
        "author": "pgolf",
        "track": run.args.track,
        "vocab_size": run.data.vocab_size,
        "bos": run.data.bos,
        "context": s.context,
        "window": "document" if s.document else "packed",
        "stride": s.stride or None,
        "form": "simple",
        "adapts": False,
        "tokenizer": "tokenizer.model",
        "packages": ["torch", "numpy", "constriction"],
    }
    members = dict(SOURCE)
    members["submission.json"] = json.dumps(manifest, indent=1).encode()
    members["tokenizer.model"] = run.data.tokenizer.read_bytes()
    if counts:
        members["counts.bin"] = counts
    without = pack({**members, "weights.bin": b""}, path, rules.track(run.args.track).artifact_bytes)

    state = {name: tensor.detach().float() for name, tensor in run.model.state_dict().items()}
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise Refused("some weights are no longer finite: training diverged; lower the learning rates")
    matrices = {name: t for name, t in state.items() if name.endswith("weight")}
    plain = {name: t.cpu().numpy() for name, t in state.items() if name not in matrices}
    grams = inputs_of(run, calibration) if s.gptq else {}

    def dump(step: float) -> bytes:
        nonlocal coded
        coded = quant.quantize(matrices, grams, s.precision(), step)
        return coder.dumps(asdict(run.model.config), coded, plain)

    coded: dict[str, coder.Coded] = {}
    count = sum(map(Tensor.numel, matrices.values()))
    room = limit - without - 1024  # for the tar's padding and the frame's block headers, 3 bytes in 128 KiB
    try:
        weights, step = quant.fit(dump, room, count, s.finest)
    except ValueError as error:
        raise Refused(
            f"the artifact cannot fit its limit of {limit:,} bytes: code, tokenizer and counts take {without:,}, "
            f"{count:,} weights {error}; choose a smaller shape or vocabulary"
        ) from None
    size = pack({**members, "weights.bin": weights}, path, limit)
    return Packed(size, len(weights), quant.bits(coded.values(), len(weights)), step, quant.error(matrices, coded))


def inputs_of(run: Run, tokens: Tensor) -> dict[str, Tensor]:
    """Gram matrices of the linear layers' inputs on the calibration tokens (N,).

    The embedding is left to plain rounding: what GPTQ gains for it as the head it loses twice as the input.
    """
    s = run.settings
    ids = tokens[: len(tokens) // s.context * s.context].view(-1, s.context)
    with quant.Inputs(run.model) as inputs:
        for part in ids.split(max(1, s.micro_tokens // s.context)):
            run.model.features(part, s.loops)
    return inputs.grams


if __name__ == "__main__":
    sys.exit(main())
