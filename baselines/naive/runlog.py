"""What a run leaves behind besides the artifact: JSON lines, a progress bar, a picture of the loss."""

import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pgolf.errors import Refused


class Log:
    """JSON lines for machines, progress bar and loss curve for people; a Log without a path is silent."""

    def __init__(self, path: Path | None, steps: int | None, seconds: float, every: int, tokens: int) -> None:
        """The bar goes to `steps`, or to `seconds` when `steps` is None; `tokens` are those of one step."""
        self.file = path.open("w", encoding="utf-8", buffering=1) if path else None
        self.by_steps, self.every, self.tokens = steps is not None, every, tokens
        self.bar = tqdm(
            total=round(seconds) if steps is None else steps,
            bar_format="{percentage:3.0f}%|{bar}| {n:.0f}/{total} {unit}{postfix}",
            unit="s" if steps is None else "steps",
            disable=None if path else True,  # None: only where there is a terminal
        )
        self.curve: list[tuple[int, float]] = []

    def write(self, **line: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")

    def step(self, done: int, loss: float, seconds: float, scale: float) -> None:
        """Note the `done`-th step, finished `seconds` after the start. Raises Refused when training diverged."""
        if not math.isfinite(loss):
            raise Refused(f"the loss of step {done} is {loss}: training diverged; lower the learning rates")
        self.curve.append((done, loss))
        if done > 1 and done % self.every:
            return
        tokens = done * self.tokens
        self.write(
            step=done,
            loss=round(loss, 5),
            tokens=tokens,
            seconds=round(seconds, 3),
            lr_scale=round(scale, 5),
            tokens_per_second=round(tokens / seconds),
        )
        self.bar.set_postfix_str(f"step {done}, loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        self.bar.update((done if self.by_steps else seconds) - self.bar.n)

    def plot(self, path: Path) -> None:
        """Draw the loss curve."""
        import matplotlib  # slow to import, and not needed before the artifact is on disk

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        axes.plot([done for done, _ in self.curve], [loss for _, loss in self.curve], linewidth=1)
        axes.set(xlabel="step", ylabel="training loss (nats per token)", title=path.stem)
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
        plt.close(figure)
