"""The blind audit: what it hands over, and what its verdict is worth (docs/security.md states these figures)."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf import rules
from pgolf.score import audit, windows
from pgolf.score.audit import Floats

RUNS = 100
Noise = Callable[[np.random.Generator, int], Floats]


def fp32(rng: np.random.Generator, count: int) -> Floats:
    """Differences between batch shapes of an fp32 model on a CPU: 1e-6 nats."""
    return 1e-6 * rng.standard_normal(count)


def bf16(rng: np.random.Generator, count: int) -> Floats:
    """The same of a bf16 model with bf16 logits: half exactly zero, rms 0.0185, tails heavier than normal."""
    return np.asarray(0.0185 * rng.standard_t(8, count) * np.sqrt(0.75 * 2) * (rng.random(count) < 0.5))


def plan(tokens: int, context: int) -> windows.Windows:
    return windows.plan(np.array([0, tokens]), "packed", context, context)


def accepted(tokens: int, noise: Noise, gain: float = 0.0, share: float = 0.0, runs: int = RUNS) -> int:
    """How many of `runs` audits accept a predictor that peeks `gain` nats on a `share` of its rows."""
    shown, good = plan(tokens, 1024), 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        sample = audit.draw(shown, max(rules.AUDIT_TOKENS, int(rules.AUDIT_SHARE * tokens)), rng)
        peeked = rng.random(len(sample.row)) < share
        good += audit.verdict(noise(rng, len(sample.row)) + gain * peeked, sample.weight).accepted
    return good


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=20),
    st.sampled_from(["packed", "document"]),
    st.integers(1, 24),
    st.data(),
)
def test_no_audited_token_is_handed_over(sizes: list[int], mode: str, context: int, data: st.DataObject) -> None:
    """Over all samples of an audit: what the worker is shown never holds a token that it is asked for."""
    stride = data.draw(st.integers(1, context))
    documents = [np.full(size, 5, dtype=np.int32) for size in sizes]
    _, boundaries = windows.stream(documents, bos=1)
    shown = windows.plan(boundaries, mode, context, stride)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sample = audit.draw(shown, data.draw(st.integers(1, 400)), rng)
    handed = {int(p) for start, row in zip(sample.start, sample.row, strict=True) for p in range(start, row + 1)}
    assert handed.isdisjoint((sample.row + 1).tolist())
    assert len(np.unique(sample.row)) == len(sample.row) > 0
    rows = {(int(s), int(s + o)) for s, n, f in zip(shown.start, shown.length, shown.first, strict=True)
            for o in range(f, n)}  # fmt: skip
    assert rows.issuperset(zip(sample.start.tolist(), sample.row.tolist(), strict=True))


def test_weights_undo_the_sampling() -> None:
    """The weighted mean of any quantity over samples is its mean over all rows, whatever it depends on."""
    shown = plan(200_000, 512)
    offsets = np.concatenate([np.arange(n) for n in shown.length])
    means = []
    for seed in range(40):
        sample = audit.draw(shown, 10**9, np.random.default_rng(seed))
        means.append(np.average((sample.row - sample.start) ** 2, weights=sample.weight))
    error = np.std(means) / np.sqrt(len(means))
    assert abs(np.mean(means) - np.mean(offsets**2)) < 4 * error


def test_padding_batches_lengths_cheaply() -> None:
    """Few distinct lengths, none below its own, none beyond the context, a tenth more tokens on average."""
    lengths = [audit.padded(n, 1024) for n in range(1, 1025)]
    assert all(n <= full <= 1024 for n, full in enumerate(lengths, 1))
    assert len(set(lengths)) <= 40
    assert sum(lengths) < 1.15 * sum(range(1, 1025))


@pytest.mark.parametrize("noise", [fp32, bf16])
@pytest.mark.parametrize("tokens", [60_000, 1_000_000])
def test_honest_predictors_are_accepted(noise: Noise, tokens: int) -> None:
    """100 of 100, with the rounding of fp32 and of bf16."""
    assert accepted(tokens, noise) == RUNS


def test_power_over_a_million_tokens() -> None:
    """0.002 nats per token, spread over 1 % of the rows or over more of them, is refused 99 times of 100."""
    for share in (0.01, 0.1, 1.0):
        assert accepted(1_040_060, fp32, 0.002 / share, share) <= 1


@pytest.mark.parametrize("noise", [fp32, bf16])
def test_power_at_the_contests_size(noise: Noise) -> None:
    """0.005 nats per token from 0.05 % of the rows, 0.002 from 1 %: refused 19 times of 20 and more."""
    assert accepted(62_021_632, noise, 10.0, 0.0005, runs=20) <= 1
    assert accepted(62_021_632, noise, 0.2, 0.01, runs=20) == 0


def test_power_over_long_documents() -> None:
    """A peek that keeps to the second half of long documents is found as well, whatever share of the text they are.

    0.005 nats per token from tokens of 6 nats each, in documents of over 4,096 tokens, shown whole in rounds.
    """
    rng = np.random.default_rng(0)
    boundaries = np.concatenate([[0], np.cumsum(rng.lognormal(6.3, 1.1, 62_000).astype(np.int64) + 2)])
    pieces = windows.rounds(boundaries, rules.ROUND[1])
    shown = windows.Windows(*(np.concatenate([getattr(p, f) for p in pieces]) for f in ("start", "length", "first")))
    length, tokens = np.diff(boundaries), int(boundaries[-1])
    good = 0
    for _ in range(10):
        sample = audit.draw(shown, int(rules.AUDIT_SHARE * tokens), rng)
        document = np.searchsorted(boundaries, sample.row, side="right") - 1
        late = (length[document] > 4096) & (sample.row - boundaries[document] > length[document] // 2)
        reachable = float(np.sum(length[length > 4096] / 2)) / tokens
        peeked = late & (rng.random(len(late)) < 0.005 / 6 / reachable)
        good += audit.verdict(fp32(rng, len(late)) + 6 * peeked, sample.weight).accepted
    assert good <= 1


def test_noise_makes_an_audit_of_few_tokens_inconclusive() -> None:
    """Where rounding, or noise that was put in on purpose, hides a record's margin, the verdict says so."""
    for tokens, noise, expected in [(1_040_060, fp32, True), (1_040_060, bf16, False), (62_021_632, bf16, True)]:
        rng = np.random.default_rng(0)
        sample = audit.draw(plan(tokens, 1024), int(rules.AUDIT_SHARE * tokens), rng)
        assert audit.verdict(noise(rng, len(sample.row)), sample.weight).conclusive == expected


def test_losses_are_no_offence() -> None:
    """A predictor that does better blind is noisy, not a cheat."""
    rng = np.random.default_rng(0)
    assert audit.verdict(-0.04 * rng.random(500), np.ones(500)).accepted


def test_noise_cannot_hide_a_large_peek() -> None:
    """However noisy a predictor makes itself, tokens that cost half a nat more when blind count as outliers."""
    rng = np.random.default_rng(0)
    difference = 0.3 * rng.standard_normal(2000)
    difference[:40] += 2.0
    verdict = audit.verdict(difference, np.ones(2000))
    assert not verdict.accepted
    assert "blind audit" in verdict.reason() and "\n" not in verdict.reason()
