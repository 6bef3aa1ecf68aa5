"""The blind audit: sampled tokens are scored again by a fresh worker that never receives their future.

Each audited token is asked for with the tokens that were before it when it was scored, and nothing else: its
window is cut behind its prefix, or, in the streaming form, the documents are shown again round by round with the
audited ones cut. What a predictor gained by looking ahead, by memory of other windows or by the shape of its
input is missing there, so the token costs more. The verdict compares the two code lengths of each token.

No audited token is among the tokens that the worker was shown before it answered, so not even a predictor that
keeps everything it sees, and knows that it is being audited, can do better than without the future.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from pgolf import rules
from pgolf.artifact import Artifact
from pgolf.score.predictors import SLOT_BYTES, Floats, Lane, Question, answers, code_lengths
from pgolf.score.windows import Index, Plan, Windows

_MOST = 1 << 17  # samples
_LAST_SHARE = 1 / 32  # of the samples, at the end of a window: there its length can give something away
_PADDING = 1.1  # `padded` over the plain length, on average
_FLOOR = 0.02  # nats; smaller differences are never called outliers
_CEILING = 0.5  # nats; larger ones always are, however noisy the predictor
_SIGMAS = 10.0  # an outlier is so many times the noise,
_CHANCE = 1e-5  # which an honest predictor's rounding reaches with at most this probability,
_TAIL = 6  # falling at least with this power beyond
_LEEWAY = 5.0  # standard errors of the noise of few samples
_FALSE_ALARM = 1e-4  # chance of refusing an honest predictor for its outliers


@dataclass(frozen=True)
class Sample:
    """K audited rows, in the order of the stream."""

    start: Index
    """(K,) position of the first token handed over."""
    row: Index
    """(K,) position of the last token handed over; audited is the token after it."""
    weight: Floats
    """(K,) scored tokens that each one stands for, up to a common factor."""


@dataclass(frozen=True)
class Verdict:
    """What the paired differences (blind code length minus scored code length, in nats) say."""

    accepted: bool
    positions: int
    mean: float
    """Weighted: an estimate of what looking ahead was worth per token of the whole text."""
    interval: tuple[float, float]
    """For the mean, at `rules.AUDIT_CONFIDENCE`."""
    largest: float
    noise: float
    """Root mean square of numeric noise, told by the negative differences, which nobody gains from."""
    outlier: float
    """Differences above this are outliers."""
    outliers: int
    allowed: int
    """Outliers that noise may explain."""
    tolerance: float
    """What the mean may be, in nats."""
    quiet: bool
    """Whether the noise is small enough for the mean to tell something."""
    conclusive: bool
    """Whether a peek worth a record would have been found: enough tokens, and an interval that is narrow enough."""

    def reason(self) -> str:
        """One sentence for a refusal."""
        if not self.quiet and self.outliers <= self.allowed and self.interval[0] <= self.tolerance:
            return (
                f"the blind audit refuses it: {self.positions:,} tokens scored again differ by {self.noise:.2g} nats "
                f"of noise ({rules.AUDIT_NOISE:g} allowed), in which a peek can hide; the same tokens must give the "
                "same rows"
            )
        return (
            f"the blind audit refuses it: of {self.positions:,} tokens scored again without their future, "
            f"{self.outliers} cost over {self.outlier:.2g} nats more ({self.allowed} allowed), the mean is "
            f"{self.mean:+.5f} nats [{self.interval[0]:+.5f}, {self.interval[1]:+.5f}] "
            f"({self.tolerance:g} allowed), the largest {self.largest:+.2g}; the probabilities depend on more than the "
            "tokens before"
        )


def draw(windows: Windows, tokens: int, rng: np.random.Generator) -> Sample:
    """Draw rows to audit, at most one a window, until their prefixes hold about `tokens` tokens.

    The chance of a window is in proportion to the rows it scores; the chance of row o in it falls with 1 / (o + 1):
    every octave of prefix lengths costs the same, and there are several times as many samples as with equal chances.
    No drawn token is part of another one's prefix.
    """
    rows = windows.length - windows.first
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int(windows.length.max()) + 1))])
    octaves = harmonic[windows.length] - harmonic[windows.first]
    share = _shares(rows, (1 - _LAST_SHARE) * rows / octaves + _LAST_SHARE * windows.length, tokens)
    chosen = np.flatnonzero(rng.random(len(rows)) < share)
    if not len(chosen):
        chosen = rng.choice(len(rows), size=1, p=rows / rows.sum())
    end = int((windows.start + windows.length).max())
    shown, secret = np.zeros(end + 1, dtype=bool), np.zeros(end + 1, dtype=bool)
    drawn: list[tuple[int, int, float]] = []
    for index in rng.permutation(chosen):
        start, length, first = (int(a[index]) for a in (windows.start, windows.length, windows.first))
        if rng.random() < _LAST_SHARE:
            offset = length - 1
        else:
            at = harmonic[first] + rng.random() * octaves[index]
            offset = min(max(int(np.searchsorted(harmonic, at, side="right")) - 1, first), length - 1)
        chance = (1 - _LAST_SHARE) / (offset + 1) / octaves[index] + _LAST_SHARE * (offset == length - 1)
        row = start + offset
        if shown[row + 1] or secret[start : row + 1].any():
            continue
        shown[start : row + 1] = True
        secret[row + 1] = True
        drawn.append((row, start, 1 / (chance * share[index])))
        tokens -= padded(offset + 1, length)
        if tokens <= 0 or len(drawn) == _MOST:
            break
    positions, starts, weights = zip(*sorted(drawn), strict=True)
    return Sample(np.array(starts), np.array(positions), np.array(weights))


def _shares(rows: Index, cost: Floats, tokens: int) -> Floats:
    """Chances (W,) of windows, in proportion to their rows (W,), at which they cost `tokens` tokens; 1 at most."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        enough = _PADDING * float(np.sum(np.minimum(1.0, middle * rows) * cost)) > tokens
        low, high = (low, middle) if enough else (middle, high)
    shares: Floats = np.minimum(1.0, high * rows)
    return shares


def padded(length: int, most: int) -> int:
    """`length` rounded up to one of four steps per octave, so that equal lengths can be batched; at most `most`."""
    step = 1 << max(0, length.bit_length() - 3)
    return min(-(-length // step) * step, max(length, most))


def verdict(difference: Floats, weight: Floats, tolerance: float = rules.AUDIT_TOLERANCE) -> Verdict:
    """Judge differences (K,), blind minus scored, of tokens with sampling weights (K,).

    Two tests, each one-sided: the mean, by its t interval with a survey sample's standard error (Hájek) and effective
    size (Kish); and the number of outliers, by Poisson bounds. docs/security.md has their power and their false alarms.
    Both lose power to noise, which a cheat can add in the audit alone at no cost, so there is a limit to that as well.
    """
    count = len(difference)
    mean = float(np.average(difference, weights=weight))
    error = float(np.sqrt(np.sum((weight * (difference - mean)) ** 2)) / np.sum(weight))
    half = _student((1 + rules.AUDIT_CONFIDENCE) / 2, float(np.sum(weight) ** 2 / np.sum(weight**2)) - 1) * error
    noise = math.sqrt(2 * float(np.mean(np.minimum(difference, 0) ** 2)))
    # Also at the ceiling and beyond: fewer outliers settle it there, since noise reaches it more rarely.
    for outlier in (min(max(_FLOOR, _SIGMAS * noise), _CEILING), _CEILING, 2 * _CEILING):
        chance = _CHANCE * min(1.0, _SIGMAS * noise / outlier) ** _TAIL
        outliers, allowed = int(np.sum(difference > outlier)), _poisson_allowance(count * chance)
        if outliers > allowed:
            break
    spoiling = math.sqrt(2 * float(np.average(np.minimum(difference, 0) ** 2, weights=weight**2)))  # as in `error`
    quiet = max(noise, spoiling) <= rules.AUDIT_NOISE * (1 + _LEEWAY / math.sqrt(count))
    return Verdict(
        accepted=mean - half <= tolerance and outliers <= allowed and quiet,
        positions=count,
        mean=mean,
        interval=(mean - half, mean + half),
        largest=float(difference.max()),
        noise=noise,
        outlier=outlier,
        outliers=outliers,
        allowed=allowed,
        tolerance=tolerance,
        quiet=quiet,
        conclusive=count >= rules.AUDIT_LEAST and half <= rules.AUDIT_PRECISION,
    )


def _student(probability: float, freedom: float) -> float:
    """Quantile of Student's t, by its expansion around the normal one (Abramowitz and Stegun 26.7.5)."""
    z, freedom = NormalDist().inv_cdf(probability), max(freedom, 1.0)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _poisson_allowance(expected: float) -> int:
    """The most events that a Poisson variable exceeds with a chance of no more than _FALSE_ALARM."""
    allowed, term = 0, math.exp(-expected)
    beyond = -math.expm1(-expected)
    while beyond > _FALSE_ALARM:
        allowed += 1
        term *= expected / allowed
        beyond -= term
    return allowed


def blind(artifact: Artifact, plan: Plan, sample: Sample, lanes: Sequence[Lane]) -> Floats:
    """Code lengths in nats (K,) of the sampled tokens, from fresh workers that are shown only what was before them."""
    nll = np.full(len(sample.row), np.nan)
    if artifact.manifest.form == "streaming":
        parts = _blind_streaming(artifact, plan, sample, lanes[0])
    else:
        parts = _blind_simple(artifact, plan, sample, lanes)
    for part, values in parts:
        nll[part] = values
    return nll


def _blind_simple(
    artifact: Artifact, plan: Plan, sample: Sample, lanes: Sequence[Lane]
) -> Iterator[tuple[Index, Floats]]:
    """Indices into the sample and their code lengths, from windows cut behind the sampled row.

    A cut window is filled up to a common length with its own tokens again, which tell nothing new.
    """
    lengths = sample.row - sample.start + 1
    full = np.array([padded(int(n), artifact.manifest.context) for n in lengths])
    groups: list[Index] = []
    for length in np.unique(full):
        members = np.flatnonzero(full == length)
        size = max(1, SLOT_BYTES // (4 * artifact.manifest.vocab_size) // int(length))
        groups += [members[at : at + size] for at in range(0, len(members), size)]

    def questions() -> Iterator[Question]:
        for group in groups:
            prefixes = [plan.stream[sample.start[i] : sample.row[i] + 1] for i in group]
            ids = np.stack([np.resize(prefix, full[group[0]]) for prefix in prefixes])
            yield Question(ids, (lengths[group] - 1).astype(np.int32), 1)

    for number, logits in answers(lanes, questions()):
        yield groups[number], code_lengths(logits, plan.stream, sample.row[groups[number]])


def _blind_streaming(artifact: Artifact, plan: Plan, sample: Sample, lane: Lane) -> Iterator[tuple[Index, Floats]]:
    """The same round by round: first the audited documents, cut, then the whole round to learn from."""
    done = 0
    for number, pieces in enumerate(plan.rounds):
        end = int(pieces.start[-1] + pieces.length[-1])
        here = np.arange(done, int(np.searchsorted(sample.row, end)))
        done += len(here)
        if len(here):
            cut = [plan.stream[sample.start[i] : sample.row[i] + 1] for i in here]
            for logits in lane.show(number, cut, last=True):
                part, here = here[: len(logits)], here[len(logits) :]
                yield part, code_lengths(logits, plan.stream, sample.row[part])
        if done == len(sample.row):
            return
        if artifact.manifest.adapts:
            lane.update(plan.show(number))
