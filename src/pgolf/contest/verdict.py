"""Does a claimed score reproduce? The statistics of a re-run, without anything else.

With the scores x_1 ... x_n of n seeds in bits per byte, their mean m, their standard deviation s and Student's t:

    half = t(0.975, n - 1) * s / sqrt(n)            the 95 % interval of the mean is m - half ... m + half

    m - half > claim + CLAIM_BPB                    does not reproduce, or inconclusive if the machine is slower
    else: n < 2 or half > the track's interval_bpb  inconclusive: too few seeds
    else:                                           reproduces; inconclusive if the scores do not count
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pgolf import rules
from pgolf.stats import mean_interval

REPRODUCES, DOES_NOT = "reproduces", "does not reproduce"
INCONCLUSIVE, QUARANTINED, REFUSED, NO_CLAIM = "inconclusive", "quarantined", "refused", "no claim"
STATUSES = REPRODUCES, DOES_NOT, INCONCLUSIVE, QUARANTINED, REFUSED, NO_CLAIM
FAILING = DOES_NOT, REFUSED
"""Those with exit code 1; the others have 0."""


@dataclass(frozen=True)
class Speed:
    """How fast this machine is: its speed over that of the machine on which the claim was made."""

    ratio: float
    basis: str
    """Where it comes from: "calibration" or "declared steps"."""


@dataclass(frozen=True)
class Verdict:
    """What the re-run says about the claim. All figures are in bits per byte."""

    status: str
    """One of `STATUSES`."""
    reason: str
    seeds: int
    """Seeds that count: those with equal artifacts or equal log-losses count once."""
    mean: float | None = None
    """None: no seed has a score."""
    half_interval: float | None = None
    """Half-width of the mean's 95 % interval; None for one seed."""
    claimed: float | None = None
    difference: float | None = None
    """Mean minus claim."""
    speed: Speed | None = None


def judge(
    claimed: float | None,
    scores: Sequence[float],
    widest: float,
    *,
    speed: Speed | None = None,
    refused: str | None = None,
    quarantine: Sequence[str] = (),
    practice: Sequence[str] = (),
) -> Verdict:
    """The verdict on a claim, from the scores of the seeds that count.

    `widest`: largest half-width that decides. `refused`: why the submission is. `quarantine`: why a person has to look.
    `practice`: why the scores do not count, by the machine or the text. A submission could have cheated where they do
    not, which lowers a score; so a claim below them is still denied, and none is confirmed.
    """
    mean = half = None
    if scores:
        mean, width = mean_interval(np.array(scores, dtype=np.float64))
        half = None if math.isnan(width) else width
    difference = None if mean is None or claimed is None else mean - claimed
    if refused is not None:
        status, reason = REFUSED, refused
    elif quarantine:
        status, reason = QUARANTINED, "; ".join(quarantine)
    elif claimed is None:
        status, reason = NO_CLAIM, "there is no claimed score to compare with"
    else:
        status, reason = _compare(claimed, scores, half, widest, speed)
    if practice and status != REFUSED:
        status = INCONCLUSIVE if status == REPRODUCES else status
        reason = f"practice scores, which do not count ({'; '.join(practice)}): {reason}"
    return Verdict(status, reason, len(scores), mean, half, claimed, difference, speed)


def _compare(
    claimed: float, scores: Sequence[float], half: float | None, widest: float, speed: Speed | None
) -> tuple[str, str]:
    """Status and reason of a claim that nothing else speaks against."""
    if half is None:
        return INCONCLUSIVE, "too few seeds: one score has no interval; run more"
    mean = float(np.mean(scores))
    low, most = mean - half, claimed + rules.CLAIM_BPB
    if low > most:
        reason = f"the interval begins at {low:.5f}, above the claim and its margin, {most:.5f}"
        if speed and speed.ratio < 1 - rules.SLOWER:
            slower = f"this machine has {speed.ratio:.2f} of the speed behind the claim, by {speed.basis}"
            return INCONCLUSIVE, f"slower machine: {slower}; {reason}"
        return DOES_NOT, reason
    if half > widest:
        return INCONCLUSIVE, f"too few seeds: the interval is ±{half:.5f}, wider than ±{widest:g}; run more"
    return REPRODUCES, f"the interval begins at {low:.5f}, not above the claim and its margin, {most:.5f}"


def distinct(keys: Iterable[tuple[Hashable, ...]]) -> list[int]:
    """Which seeds count, by their numbers: the first of those that share a key, such as an artifact's digest."""
    seen: set[tuple[int, Hashable]] = set()
    counted = []
    for number, key in enumerate(keys):
        parts = set(enumerate(key))
        if not parts & seen:
            counted.append(number)
        seen |= parts
    return counted
