"""The verdict of a re-run, case by case."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from pgolf import rules
from pgolf.contest.verdict import (
    DOES_NOT,
    INCONCLUSIVE,
    NO_CLAIM,
    QUARANTINED,
    REFUSED,
    REPRODUCES,
    Speed,
    distinct,
    judge,
)

WIDEST = 0.005
CLOSE = [1.1000, 1.1004, 1.1008]  # mean 1.1004, half-width 0.00099
FAR = [1.1, 1.2, 1.3]
SLOW, SAME = Speed(0.9, "calibration"), Speed(1 - rules.SLOWER, "calibration")


@pytest.mark.parametrize(
    ("claimed", "scores", "speed", "status", "words"),
    [
        (1.1004, CLOSE, None, REPRODUCES, "not above"),
        (1.2, CLOSE, None, REPRODUCES, "not above"),  # better than claimed
        (1.0975, CLOSE, None, REPRODUCES, "not above"),  # worse, within margin and interval
        (1.0973, CLOSE, None, DOES_NOT, "above the claim"),
        (1.0973, CLOSE, SLOW, INCONCLUSIVE, "slower machine"),
        (1.0973, CLOSE, SAME, DOES_NOT, "above the claim"),
        (1.0973, CLOSE, Speed(2.0, "declared steps"), DOES_NOT, "above the claim"),
        (1.1004, CLOSE, SLOW, REPRODUCES, "not above"),  # in spite of the slower machine
        (1.1, FAR, None, INCONCLUSIVE, "too few seeds"),  # an interval that wide would let any claim pass
        (0.5, FAR, None, DOES_NOT, "above the claim"),
        (1.1, [1.1], None, INCONCLUSIVE, "one score"),
        (0.5, [1.1], SLOW, INCONCLUSIVE, "one score"),
        (1.15, [1.1864, 1.1865], None, DOES_NOT, "above the claim"),
        (1.1, [1.1, 1.1], None, REPRODUCES, "not above"),
        (None, CLOSE, None, NO_CLAIM, "no claimed score"),
    ],
)
def test_verdicts(claimed: float | None, scores: list[float], speed: Speed | None, status: str, words: str) -> None:
    found = judge(claimed, scores, WIDEST, speed=speed)
    assert (found.status, words in found.reason) == (status, True), found
    assert found.seeds == len(scores)
    assert found.mean == pytest.approx(np.mean(scores))


def test_a_refusal_comes_first_then_the_quarantine() -> None:
    for claimed, scores in product((None, 1.0, 2.0), ([], [1.1], CLOSE)):
        found = judge(claimed, scores, WIDEST, refused="too late", quarantine=["odd"])
        assert (found.status, found.reason) == (REFUSED, "too late")
        found = judge(claimed, scores, WIDEST, speed=SLOW, quarantine=["odd", "strange"])
        assert (found.status, found.reason) == (QUARANTINED, "odd; strange")


@pytest.mark.parametrize(
    ("claimed", "quarantine", "status"),
    [
        (1.1004, [], INCONCLUSIVE),
        (1.0, [], DOES_NOT),
        (1.1004, ["odd"], QUARANTINED),
        (None, [], NO_CLAIM),
    ],
)
def test_scores_that_do_not_count_confirm_nothing(claimed: float | None, quarantine: list[str], status: str) -> None:
    found = judge(claimed, CLOSE, WIDEST, quarantine=quarantine, practice=["no sandbox", "a small text"])
    assert found.status == status
    assert found.reason.startswith("practice scores, which do not count (no sandbox; a small text): ")
    refused = judge(claimed, CLOSE, WIDEST, refused="too late", practice=["no sandbox"])
    assert (refused.status, refused.reason) == (REFUSED, "too late")


@given(st.lists(st.floats(0.5, 3), min_size=2, max_size=9), st.floats(0.5, 3), st.floats(0.1, 2))
def test_figures_are_those_of_students_t(scores: list[float], claimed: float, speed: float) -> None:
    found = judge(claimed, scores, WIDEST, speed=Speed(speed, "calibration"))
    half = t.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / math.sqrt(len(scores))
    assert found.half_interval == pytest.approx(half, abs=1e-12)
    assert found.mean is not None and found.half_interval is not None
    assert found.difference == found.mean - claimed
    above = found.mean - found.half_interval > claimed + rules.CLAIM_BPB
    expected = {
        (False, False): REPRODUCES,
        (False, True): INCONCLUSIVE,
        (True, False): INCONCLUSIVE if speed < 1 - rules.SLOWER else DOES_NOT,
    }
    assert found.status == expected.get((above, not above and found.half_interval > WIDEST))


def test_an_honest_claim_is_seldom_denied() -> None:
    """Three seeds claimed, three run again, seeds as noisy as the noisiest good entries: 1 in 1,000 is denied."""
    generator = np.random.default_rng(0)
    tries = 2000
    runs = generator.normal(1.1, 0.0009, (tries, 2, 3))
    verdicts = [judge(float(claim.mean()), list(again), WIDEST).status for claim, again in runs]
    assert verdicts.count(DOES_NOT) < tries / 500
    raised = [judge(float(claim.mean()) - 0.0155, list(again), WIDEST).status for claim, again in runs]
    assert raised.count(DOES_NOT) > 0.99 * tries  # the fastest machine's score, claimed from the slowest (docs)


def test_equal_runs_count_once() -> None:
    assert distinct([("a", 1), ("b", 2), ("c", 3)]) == [0, 1, 2]
    assert distinct([("a", 1), ("a", 2), ("c", 3)]) == [0, 2]  # equal artifacts
    assert distinct([("a", 1), ("b", 1), ("c", 1)]) == [0]  # equal losses
    assert distinct([(1, "a"), ("a", 1)]) == [0, 1]  # the parts of a key are different things
    assert distinct([]) == []
