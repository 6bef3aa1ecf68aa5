"""Paired differences with their intervals: of runs that share their seeds, of scores that share their documents."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special


def row(name: str, runs: Sequence[dict[str, Any]], base: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Effect of a variant: the mean of the differences by seed, with its 95 % interval by Student's t."""
    scores = np.array([run["bpb"] for run in runs])
    effect, half = mean_interval(scores - base)
    return {
        "variant": name,
        "bpb": [round(float(s), 5) for s in scores],
        "mean": round(float(scores.mean()), 5),
        "effect": round(effect, 5),
        "half_interval": None if math.isnan(half) else round(half, 5),
        "parameters": runs[0]["parameters"],
        "artifact_bytes": max(run["artifact_bytes"] for run in runs),
        "tokens": runs[0]["tokens"],
        "tokens_per_second": round(float(np.median([run["tokens_per_second"] for run in runs]))),
    }


def mean_interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean of values (N,), and the half-width of its 95 % interval by Student's t; NaN for one value."""
    mean, count = float(values.mean()), len(values)
    return mean, _half_interval(float(values.std(ddof=1)) / math.sqrt(count), count) if count > 1 else math.nan


def paired_difference(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """sum(b - a) / sum(sizes) of D documents (D,), and the half-width of its 95 % interval; NaN for one document.

    Documents are the sample, so this is a ratio estimator: its variance is that of the residuals of b - a about the
    line through the origin, with Student's t for D - 1 degrees of freedom (Cochran 1977, equation 6.13).
    """
    difference, count = b - a, len(sizes)
    ratio = float(difference.sum() / sizes.sum())
    if count < 2:
        return ratio, math.nan
    residuals = difference - ratio * sizes
    error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / float(sizes.sum())
    return ratio, _half_interval(error, count)


def _half_interval(error: float, count: int) -> float:
    """Half-width of the 95 % interval by Student's t, from the standard error of `count` samples."""
    return float(special.stdtrit(count - 1, 0.975) * error)
