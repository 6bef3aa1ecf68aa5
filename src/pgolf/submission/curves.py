"""The loss of several training runs over time and over tokens, from the logs that `pgolf.train` writes."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import plots
from pgolf.errors import UsageError
from pgolf.files import printable, read_regular
from pgolf.score.likelihood import Floats

_LARGEST = 1 << 28  # bytes of a log
_FIELDS = ("step", "tokens", "seconds", "loss")
_LAST = 10  # logged steps, over which the last loss is averaged


@dataclass(frozen=True)
class Curve:
    """What one log says, with arrays (S,) over the logged steps."""

    path: str
    step: Floats
    tokens: Floats
    seconds: Floats
    """Since the clock started."""
    loss: Floats
    """Nats per token of the step's batch."""

    @property
    def last_loss(self) -> float:
        """Mean of the last logged steps."""
        return float(self.loss[-_LAST:].mean())


def is_log(path: Path) -> bool:
    """Whether it looks like a log: its first line is JSON by itself and no record."""
    try:
        first = json.loads(read_regular(path, _LARGEST).partition(b"\n")[0])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "artifact" not in first


def read(path: Path) -> Curve:
    """The curve of the log at `path`; a last line that is being written is left out. Raises UsageError."""
    try:
        lines = read_regular(path, _LARGEST).splitlines(keepends=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            values = json.loads(line)
            if "step" in values and "loss" in values:
                rows.append([float(values[name]) for name in _FIELDS])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise UsageError(f"{path}: line {number} is none of a training log") from None
    if not rows or not all(math.isfinite(value) for row in rows for value in row):
        raise UsageError(f"{path}: no step is logged in it, or one without a finite loss")
    return Curve(str(path), *np.array(rows).T)


def as_json(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """For programs."""
    return [
        {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(curve).items()}
        | {"last_loss": curve.last_loss}
        for curve in curves
    ]


def table(curves: Sequence[Curve]) -> str:
    """For people."""
    width = max(len(printable(curve.path)) for curve in curves)
    lines = [f"{'log':<{width}} {'steps':>8} {'tokens':>14} {'seconds':>9} {'tokens/s':>9}  last loss, nats per token"]
    for curve in curves:
        rate = curve.tokens[-1] / curve.seconds[-1] if curve.seconds[-1] > 0 else math.nan
        lines.append(
            f"{printable(curve.path):<{width}} {curve.step[-1]:>8,.0f} {curve.tokens[-1]:>14,.0f} "
            f"{curve.seconds[-1]:>9.1f} {rate:>9,.0f}  {curve.last_loss:.4f}"
        )
    return "\n".join(lines)


def plot(curves: Sequence[Curve], path: Path) -> str | None:
    """Loss over seconds and over tokens; returns as `plots.draw` does."""
    labels = plots.labels([curve.path for curve in curves])
    tokens = max(float(curve.tokens[-1]) for curve in curves)
    unit, name = next(((u, n) for u, n in ((1e9, "billions"), (1e6, "millions")) if tokens >= u), (1e3, "thousands"))

    def fill(axes: Any) -> None:
        for number, (curve, label) in enumerate(zip(curves, labels, strict=True)):
            color = plots.COLORS[number % len(plots.COLORS)]
            for each, x in zip(axes, (curve.seconds, curve.tokens / unit), strict=True):
                each.plot(x, curve.loss, color=color, alpha=0.25, linewidth=0.8)
                each.plot(x, smooth(curve.loss), color=color, linewidth=1.6, label=label)
        axes[0].set(xlabel="training time (s)", ylabel="training loss (nats per token)")
        axes[1].set(xlabel=f"training tokens ({name})", ylabel="training loss (nats per token)")
        axes[1].legend(title="thin: as logged; thick: mean of neighbours", fontsize=9, title_fontsize=9)

    return plots.draw(path, (12, 4.8), fill, columns=2)


def smooth(values: Floats) -> Floats:
    """Each value (S,) averaged with its neighbours: a twentieth of all on each side, as far as there are so many.

    At the beginning, where a loss is steep, as many on both sides.
    """
    sums, at = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    left = np.minimum(len(values) // 20, at)
    right = np.minimum(left, at[::-1])
    means: Floats = (sums[at + right + 1] - sums[at - left]) / (left + right + 1)
    return means
