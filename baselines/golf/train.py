"""Train the strong baseline under the clock, fit it to the limit, and pack the artifact.

    python baselines/golf/train.py --data DIR --out artifact.zst --track laptop
    torchrun --standalone --nproc_per_node=8 baselines/golf/train.py --data DIR --out artifact.zst

Command line, order of events, optimizer, log and processes come from `pgolf.train`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: an end without a traceback

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import coder
import numpy as np
import quant
import torch
from mixer import NO_CONTEXTS, Mixer, switched_off
from model import GPT, GPTConfig
from torch import Tensor

from pgolf import rules
from pgolf.artifact import code_in, pack
from pgolf.data.shards import first_tokens
from pgolf.errors import Refused, UsageError
from pgolf.train import loop, optim
from pgolf.train.ranks import Ranks
from pgolf.train.settings import FromData, Options

CALIBRATION_BATCHES = 16  # at least, unless they would be shorter than one sequence
FRAMING = 1024
"""Bytes that packing adds to the weights: padding of the tar, and zstd's block headers, 3 bytes per 128 KiB."""
SMALLEST_PRIOR = 64  # bytes: the mixer's coder keeps some in reserve
PACKAGES = ["torch", "numpy", "constriction", "sentencepiece"]
DIVERGED = "training diverged; lower the learning rates"
LANES = 64
"""With a mixer. It learns a step's tokens after the step, so with fewer lanes it has learned more before each one."""
DESCRIPTION = "Train the strong baseline under the clock and pack the artifact."
SOURCE = code_in(Path(__file__).parent)  # what runs now


@dataclass(frozen=True)
class Settings(GPTConfig):
    """Shape and switches of the model (see GPTConfig) and recipe; the defaults are for 8 H100.

    What a switch is worth is in bpb of the laptop track's network alone, three seeds (docs/benchmarks/golf.md).
    """

    vocab_size: FromData = 8192
    batch_tokens: int = 786_432  # Tokens per step, all ranks together.
    micro_tokens: int = 98_304  # Largest number of tokens that one rank takes through the model at once.
    matrix_lr: float = 0.023  # Learning rate of matrices (Muon).
    table_lr: float = 0.03  # Learning rate of the embedding (Adam).
    vector_lr: float = 0.02  # Learning rate of vectors (Adam).
    weight_decay: float = 0.09
    """Decoupled, for matrices and tables (contest: smaller weights are cheaper to code): -0.041 ± 0.017."""
    momentum: float = 0.97  # Of Muon, after momentum_steps.
    momentum_start: float = 0.85  # Of Muon, at the first step.
    momentum_steps: int = 500  # Muon's momentum goes from `momentum_start` to `momentum` over these steps.
    warmdown: float = 0.7  # Last part of the run, in which the learning rates fall linearly (arXiv:2405.18392).
    floor: float = 0.1  # Fraction of the learning rates at the end of the run (contest).
    ema: float = 0.997
    """The packed weights are a moving average over the steps with this decay (contest); 0: the last ones."""

    gptq: bool = True
    """Round with the help of the layers' inputs (see quant.py) instead of to the nearest: -0.006 ± 0.005."""
    calibration_tokens: int = 131_072
    """Training tokens, one rank's, that show how much each weight matters; inside the clock."""
    balance: bool = True
    """Finer steps for rows whose rounding changes most what the model predicts, not by deviation: -0.040 ± 0.015."""
    prior_bytes: int = 0
    """Training text that the mixer learns before it predicts, in bytes of the artifact (see mixer.py); 0: no mixer."""
    off: str = ""
    """Names of the mixer's contexts that are switched off, or "text" or "mixer", with ; between them (see mixer.py)."""
    limit: int = 0  # Largest artifact in bytes; 0: the track's.

    warmup_steps: int = 20  # Steps on random tokens before the clock; undone afterwards.
    bf16: bool = True  # Matrix products in bf16, on a GPU and on the CPUs that are faster with it; 0: all in fp32.
    compile: bool = True  # Use torch.compile, if it works here.
    log_every: int = 50  # Steps from one line of the log to the next.

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = "batch_tokens", "micro_tokens", "momentum_steps", "warmup_steps", "log_every", "calibration_tokens"
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("momentum", "momentum_start", "warmdown", "floor", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if self.limit < 0:
            raise ValueError(f"limit is {self.limit}; it cannot be below 0")
        if self.prior_bytes and self.prior_bytes < SMALLEST_PRIOR:
            raise ValueError(f"prior_bytes is {self.prior_bytes}; it must be 0, or at least {SMALLEST_PRIOR}")
        if self.batch_tokens % self.context:
            raise ValueError(f"batch_tokens {self.batch_tokens} is not a multiple of the context {self.context}")

    def lr_scale(self, progress: float) -> float:
        """Factor for the learning rates when `progress` of the run is done."""
        return self.floor + (1 - self.floor) * min(1.0, (1 - progress) / max(self.warmdown, 1e-9))


# The main preset's switches are the contest's practice. Those of the laptop are measured: docs/benchmarks/golf.md.
# fmt: off
LAPTOP = Settings(
    vocab_size=2048, context=64, layers=2, dim=128, heads=2, kv_heads=1, mlp_ratio=2, rope_dims=0, softcap=0.0, xsa=2,
    batch_tokens=2048, micro_tokens=2048, momentum=0.95, momentum_steps=100, floor=0.0, ema=0.0,
    calibration_tokens=16_384, prior_bytes=780_000, warmup_steps=3, log_every=10,
)
MIDDLE = replace(
    LAPTOP, context=512, layers=5, dim=256, heads=4, mlp_ratio=3, xsa=5, batch_tokens=4096, matrix_lr=0.02,
    momentum_steps=300, prior_bytes=1_000_000, limit=3_000_000, log_every=50,
)
# fmt: on
"""For 3,000,000 bytes and half an hour on one core: --track unlimited --preset middle --seconds 1800."""
PRESETS = {"main": Settings(), "laptop": LAPTOP, "unlimited": Settings(), "middle": MIDDLE}


class Trainer:
    """Optimizer, averaged weights and prior (see loop.Trainer)."""

    def __init__(self, run: loop.Run) -> None:
        s = run.settings
        rates = {"matrix_lr": s.matrix_lr, "table_lr": s.table_lr, "vector_lr": s.vector_lr, "decay": s.weight_decay}
        self.run, self.settings = run, s
        self.optimizer = optim.Optimizer(run.model, **rates, betas=(0.8, 0.95), orthogonalize=run.orthogonalize)
        self.weights = list(run.model.parameters())
        self.average = [w.detach().clone() for w in self.weights] if s.ema else []
        self.prior: Future[bytes] | None = None
        self.mixer: Mixer | None = None
        if s.prior_bytes and run.ranks.rank == 0:  # compiled before the clock starts
            try:
                self.mixer = Mixer(run.data.tokenizer, run.data.bos, 0, switched_off(s.off) - NO_CONTEXTS)
            except ValueError as error:
                raise UsageError(f"off is {s.off!r}: {error}") from None
            if self.mixer.vocab_size != s.vocab_size:
                raise UsageError(
                    f"{run.data.tokenizer}: has {self.mixer.vocab_size} pieces, the dataset {s.vocab_size}"
                )
        # Encoding takes a core for the first part of the run. torch's threads wait for each other, so one on that core
        # would slow down all of them: until the prior is encoded, torch has one thread less.
        every = torch.get_num_threads()
        fewer = max(1, every - 1) if self.mixer else every
        self.threads = [fewer, every] if s.prior_bytes else [every]  # two stages on all ranks: they warm up together

    def begin(self) -> None:
        if self.mixer:
            s, shards = self.settings, self.run.data.train_shards
            tokens = first_tokens(shards, s.vocab_size, 2 * s.prior_bytes)  # two per byte: more than fit
            self.prior = ThreadPoolExecutor(1).submit(self.mixer.encode, tokens, s.prior_bytes)  # beside training
            torch.set_num_threads(self.threads[0])

    def stages(self) -> Sequence[Callable[[Tensor], object]]:
        return [partial(self.warm_up, threads) for threads in self.threads]

    def warm_up(self, threads: int, ids: Tensor) -> None:
        torch.set_num_threads(threads)  # torch compiles once for each number
        self.take_step(0, 1.0, ids, ids)

    def step(self, step: int, left: float, done: float, ids: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        if self.prior and self.prior.done():  # its core is free
            torch.set_num_threads(self.threads[-1])
        scale = self.settings.lr_scale(done)
        return self.take_step(step, scale, ids, targets), scale

    def take_step(self, step: int, scale: float, ids: Tensor, targets: Tensor) -> Tensor:
        """One step on ids and targets (B, T); returns the loss."""
        s = self.settings
        loss = loop.gradients(self.run.forward, (ids, targets), s.micro_tokens // s.context)
        loss = self.optimizer.step(scale, loop.momentum(s, step), loss)
        if s.ema:
            with torch.no_grad():  # early on over the last tenth of the steps, which forgets the initial weights
                torch._foreach_lerp_(self.average, self.weights, max(1 - s.ema, 10 / (10 + step)))
        return loss

    @torch.no_grad()
    def save(
        self, path: Path, feed: Iterator[tuple[Tensor, Tensor]], training: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        """Calibrate, quantise to what fits, and pack."""
        run, s = self.run, self.settings
        largest = rules.track(run.options.track).artifact_bytes
        limit = min(s.limit or largest, largest)
        members = self.members(training)
        # The average predicts better than the last weights, so calibration looks at it, too.
        for weight, mean in zip(self.weights, self.average, strict=False):
            weight.copy_(mean)
        state = {name: tensor.detach().float() for name, tensor in run.model.state_dict().items()}
        if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
            raise Refused(f"weights are no longer finite: {DIVERGED}")
        try:
            inverses, sensitivity = calibrate(run, feed)
        except ValueError as error:
            raise Refused(f"{error}: {DIVERGED}") from None
        # All other members are packed once, to know the room that the weights may fill.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".size-") as folder:
            taken = pack({**members, "weights.bin": b""}, Path(folder) / path.name, largest)
        matrices = {name: t for name, t in state.items() if name.endswith("weight")}
        vectors = {name: t.cpu().numpy() for name, t in state.items() if name not in matrices}
        count = sum(map(Tensor.numel, matrices.values()))
        used = inverses if s.gptq else {}
        rows = quant.row_steps(matrices, used, sensitivity) if s.balance else None

        def quantise(step: float) -> bytes:
            """The weights in steps of `step` standard deviations."""
            return coder.dumps(asdict(run.model.config), quant.quantize(matrices, used, step, rows), vectors)

        try:
            weights, step = quant.fit(quantise, limit - taken - FRAMING, count)
        except ValueError as error:
            raise Refused(
                f"the artifact cannot fit its limit of {limit:,} bytes: code, tokenizer and prior take {taken:,}, "
                f"{count:,} weights {error}; choose a smaller shape or vocabulary"
            ) from None
        size, bits = pack({**members, "weights.bin": weights}, path, limit), 8 * len(weights) / count
        facts = {"artifact_bytes": size, "weights_bytes": len(weights), "bits": round(bits, 3), "step": round(step, 4)}
        return facts, (
            f"{size:,} bytes of {limit:,}, weights in {bits:.2f} bits each and steps of {step:.3f} standard deviations "
            f"(finest {quant.FINEST:g})"
        )

    def members(self, training: dict[str, Any]) -> dict[str, bytes]:
        """The artifact without its weights."""
        run, track = self.run, self.run.options.track
        changes = {"packages": PACKAGES, "compiler": True, "training": training}
        if self.settings.prior_bytes and track != "main":
            changes["lanes"] = LANES
        members = loop.members(run.data, track, SOURCE, "golf baseline", **changes)
        if self.prior and self.mixer:
            if not run.options.steps:  # training is over, and the clock runs
                self.mixer.stop()
            members["prior.bin"] = self.prior.result()
            torch.set_num_threads(self.threads[-1])
        elif self.settings.prior_bytes:  # in the warm-up: as large as it gets, and as hard to compress
            members["prior.bin"] = np.random.bytes(self.settings.prior_bytes)
        return members


def calibrate(
    run: loop.Run, feed: Iterator[tuple[Tensor, Tensor]]
) -> tuple[dict[str, quant.InverseHessian], dict[str, Tensor]]:
    """Inverse-Hessian factors and sensitivities (see quant.calibrate), from the next `calibration_tokens` or so."""
    model, s = run.model, run.settings
    tokens = min(s.micro_tokens, s.batch_tokens // run.ranks.world, s.calibration_tokens // CALIBRATION_BATCHES)
    at_once = max(1, tokens // s.context)
    parts = (part for ids, _ in feed for part in ids.split(at_once))
    count = max(1, s.calibration_tokens // (at_once * s.context))
    return quant.calibrate(model, model, islice(parts, count))


def main(argv: Sequence[str] | None = None) -> int:
    return loop.main(argv, DESCRIPTION, PRESETS, build, Trainer, SOURCE)


def build(options: Options, settings: Settings, ranks: Ranks) -> loop.Run:
    return loop.build(options, settings, ranks, GPT, GPTConfig, optim.orthogonalize)


if __name__ == "__main__":
    sys.exit(main())
