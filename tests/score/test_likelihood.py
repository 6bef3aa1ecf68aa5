"""A log-loss is that of a distribution, whatever the logits are."""

import math

import pytest
import torch

from pgolf.score.likelihood import negative_log_likelihood


def test_probabilities_cannot_add_up_to_more_than_one() -> None:
    """Logits built to lose their small terms in an fp32 sum gain nothing: the sum is taken in fp64."""
    vocab = 1 << 18
    logits = torch.full((1, vocab), math.log(5.9e-8))
    logits[0, 0] = 0.0
    nll = negative_log_likelihood(logits, torch.tensor([0]))
    exact = math.log(1 + (vocab - 1) * math.exp(float(logits[0, 1])))
    assert float(nll) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-42, 1.0, 1e38])
def test_extreme_logits_stay_a_distribution(scale: float) -> None:
    """Denormal and huge logits give a proper code length for every symbol (Kraft's inequality)."""
    row = torch.tensor([0.0, 1.0, -1.0, 3.0, -3.0]) * scale
    logits = row.repeat(5, 1)
    nll = negative_log_likelihood(logits, torch.arange(5))
    assert float(torch.exp(-nll).sum()) == pytest.approx(1.0, abs=1e-6)


def test_logits_that_are_not_finite_are_marked() -> None:
    """NaN and both infinities in any place make that token's log-loss NaN, and only that token's."""
    logits = torch.zeros(4, 8)
    logits[0, 3], logits[1, 0], logits[2, 7] = math.nan, math.inf, -math.inf
    nll = negative_log_likelihood(logits, torch.zeros(4, dtype=torch.int64))
    assert torch.isnan(nll).tolist() == [True, True, True, False]
