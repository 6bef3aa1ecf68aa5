"""Two scores of one text, compared document by document."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import plots
from pgolf.errors import UsageError
from pgolf.files import printable
from pgolf.score import losses, record
from pgolf.score.losses import Losses
from pgolf.score.record import Record
from pgolf.stats import paired_difference


@dataclass(frozen=True)
class Side:
    """One of the two scores."""

    path: Path
    record: Record
    losses: Losses


@dataclass(frozen=True)
class Comparison:
    """B against A; differences are B minus A, so B is better where they are negative."""

    a: Side
    b: Side
    bpb: float
    """Difference in bits per byte."""
    half_interval: float
    """Of its 95 % interval over documents; NaN for one document."""
    better: int
    """Documents that B codes in fewer bits."""
    documents: int


def compare(a: Path, b: Path) -> Comparison:
    """Compare the scores whose records are at `a` and `b`. Raises UsageError when they cannot be paired."""
    left, right = _read(a), _read(b)
    counts = [len(side.losses.sizes) for side in (left, right)]
    if left.losses.data != right.losses.data or counts[0] != counts[1]:
        raise UsageError(
            f"{a} and {b} are scores of different texts, of {counts[0]:,} and {counts[1]:,} documents; "
            "score both with the same --data and --documents"
        )
    bits = left.losses.bits, right.losses.bits
    difference, half = paired_difference(*bits, left.losses.sizes)
    return Comparison(left, right, difference, half, int((bits[1] < bits[0]).sum()), len(bits[0]))


def _read(path: Path) -> Side:
    missing, other = "no such record; `pgolf score` writes one", "not a record of `pgolf score`"
    found_record = record.read_scored(path, missing, other)
    found = losses.read(losses.path(path))
    if found.artifact != found_record.artifact.sha256:
        raise UsageError(f"{losses.path(path)}: of another artifact than {path}; score it again")
    return Side(path, found_record, found)


def as_json(result: Comparison) -> dict[str, Any]:
    """For programs."""
    return {
        "a": str(result.a.path),
        "b": str(result.b.path),
        "bpb_a": result.a.record.bpb,
        "bpb_b": result.b.record.bpb,
        "difference": result.bpb,
        "half_interval": None if math.isnan(result.half_interval) else result.half_interval,
        "documents": result.documents,
        "documents_b_better": result.better,
    }


def table(result: Comparison) -> str:
    """For people."""
    rows = [("", "A", "B")]
    rows += [(name, show(result.a.record), show(result.b.record)) for name, show in _FIELDS.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{name:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}" for name, a, b in rows]
    interval = "" if math.isnan(result.half_interval) else f" ± {result.half_interval:.6f} (95 %, over documents)"
    lines.append(f"B - A: {result.bpb:+.6f} bpb{interval}; B is better on {result.better:,} of {result.documents:,}")
    return "\n".join(lines)


def plot(result: Comparison, path: Path) -> str | None:
    """The difference over the text: of all documents so far, and of each. Returns as `plots.draw` does."""
    sizes = result.a.losses.sizes
    bits = result.b.losses.bits - result.a.losses.bits
    at = sizes.cumsum()

    def fill(axes: Any) -> None:
        axes.scatter(at / 1e6, bits / np.maximum(sizes, 1), s=4, alpha=0.3, color="tab:gray", label="one document")
        axes.plot(at / 1e6, bits.cumsum() / np.maximum(at, 1), color="tab:blue", label="all so far")
        axes.axhline(0, color="black", linewidth=1)
        axes.set(xlabel="validation text (MB)", ylabel="B minus A (bits per byte)")
        axes.legend()

    return plots.draw(path, (8, 5), fill)


_FIELDS: dict[str, Callable[[Record], str]] = {
    "submission": lambda r: printable(r.submission.name) if r.submission else "-",
    "bpb": lambda r: f"{r.bpb:.6f}",
    "artifact bytes": lambda r: f"{r.artifact.bytes:,}",
    "tokens": lambda r: f"{r.tokens:,}",
    "steps": lambda r: "-" if r.steps is None else f"{r.steps:,}",
    "evaluation seconds": lambda r: f"{sum(record.phases(r.seconds).values()):.1f}",
    "eligible": lambda r: "yes" if r.eligible else "no",
}
