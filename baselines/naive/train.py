"""Train the contest's baseline under the clock and pack the artifact.

    python baselines/naive/train.py --data DIR --out artifact.zst --track laptop
    torchrun --standalone --nproc_per_node=8 baselines/naive/train.py --data DIR --out artifact.zst

`pgolf.train.loop` has the order of events; here are the settings, a step, and what goes into the artifact.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: an end without a traceback

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import quant
from model import GPT, GPTConfig
from torch import Tensor

from pgolf import rules
from pgolf.artifact import code_in, pack
from pgolf.train import loop, optim
from pgolf.train.ranks import Ranks
from pgolf.train.settings import FromData, Options


@dataclass(frozen=True)
class Settings(GPTConfig):
    """Shape of the model (see GPTConfig) and recipe; the defaults are the contest's for 8 H100."""

    vocab_size: FromData = 1024
    batch_tokens: int = 524_288
    """Tokens per step, all ranks together."""
    micro_tokens: int = 65_536
    """Largest number of tokens that one rank takes through the model at once."""
    matrix_lr: float = 0.04  # Learning rate of matrices (Muon).
    embed_lr: float = 0.05  # Learning rate of the embedding (Adam).
    vector_lr: float = 0.04  # Learning rate of vectors (Adam).
    momentum: float = 0.95  # Of Muon, after momentum_steps.
    momentum_start: float = 0.85  # Of Muon, at the first step.
    momentum_steps: int = 500
    """Muon's momentum goes from `momentum_start` to `momentum` over these steps."""
    warmdown_steps: int = 1200
    """The learning rates fall to 0 over this many last steps, or over the time that they take."""
    warmup_steps: int = 20
    """Steps on random tokens before the clock; undone afterwards."""
    bf16: bool = True
    """Matrix products in bf16, on a GPU and on the CPUs that are faster with it; 0: all in fp32."""
    compile: bool = True  # Use torch.compile, if it works here.
    log_every: int = 50  # Steps from one line of the log to the next.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_tokens", "micro_tokens", "momentum_steps", "warmdown_steps", "warmup_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_tokens % self.context:
            raise ValueError(f"batch_tokens {self.batch_tokens} is not a multiple of the context {self.context}")

    def lr_scale(self, step: int, left: float) -> float:
        """Factor for the learning rates at step number `step`, with `left` steps to go."""
        return min(1.0, left / min(self.warmdown_steps, step + left))


LAPTOP = Settings(
    context=256,
    layers=4,
    dim=128,
    heads=2,
    kv_heads=1,
    batch_tokens=8192,
    micro_tokens=2048,
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
    micro_tokens=2048,
    warmdown_steps=1000,
    log_every=50,
)
"""For 3,000,000 bytes and half an hour on one core: --track unlimited --preset middle --seconds 2100."""
DESCRIPTION = "Train the naive baseline under the clock and pack the artifact."
SOURCE = code_in(Path(__file__).parent)  # what runs now
PRESETS = {"main": Settings(), "laptop": LAPTOP, "unlimited": Settings(), "middle": MIDDLE}


class Trainer:
    """A step of training, and the artifact (see loop.Trainer)."""

    def __init__(self, run: loop.Run) -> None:
        s = run.settings
        rates = {"matrix_lr": s.matrix_lr, "table_lr": s.embed_lr, "vector_lr": s.vector_lr}
        self.run, self.settings = run, s
        self.optimizer = optim.Optimizer(run.model, **rates, orthogonalize=run.orthogonalize)

    def begin(self) -> None:
        """Nothing to prepare."""

    def stages(self) -> Sequence[Callable[[Tensor], object]]:
        return [lambda ids: self.step(0, 1.0, 0.0, ids, ids)]

    def step(self, step: int, left: float, done: float, ids: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        scale = self.settings.lr_scale(step, left)
        loss = loop.gradients(self.run.forward, (ids, targets), self.settings.micro_tokens // self.settings.context)
        return self.optimizer.step(scale, loop.momentum(self.settings, step), loss), scale

    def save(
        self, path: Path, feed: Iterator[tuple[Tensor, Tensor]], training: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        limit = rules.track(self.run.options.track).artifact_bytes
        members = loop.members(self.run.data, self.run.options.track, SOURCE, "naive baseline", training=training)
        members["weights.bin"] = quant.dumps(asdict(self.run.model.config), self.run.model.state_dict())
        size = pack(members, path, limit)
        return {"artifact_bytes": size}, f"{size:,} bytes of {limit:,}"


def main(argv: Sequence[str] | None = None) -> int:
    return loop.main(argv, DESCRIPTION, PRESETS, build, Trainer, SOURCE)


def build(options: Options, settings: Settings, ranks: Ranks) -> loop.Run:
    return loop.build(options, settings, ranks, GPT, GPTConfig, optim.orthogonalize)


if __name__ == "__main__":
    sys.exit(main())
