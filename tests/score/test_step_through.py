"""The scorer's walk takes the log-loss of several steps at once; nothing of the score depends on how many."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf.artifact import Manifest
from pgolf.errors import Refused
from pgolf.score import schedule, score
from pgolf.score.schedule import Step

LANES, VOCAB, TOKENS = 3, 7, 500


class Fake:
    """In place of `predictors.Predictor`: logits by lane and token shown."""

    def __init__(self, bad: tuple[int, int, float] | None = None) -> None:
        """`bad`: a step, a row, and a value for one of its logits."""
        self.table = torch.randn(LANES, VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
        self.bad, self.number = bad, 0

    def submit(self, step: Step) -> None:
        self.logits: Tensor = self.table[step.lane, step.shown]
        if self.bad and self.bad[0] == self.number:
            self.logits[self.bad[1], 2] = self.bad[2]
        self.number += 1

    def receive(self, rows: int) -> Tensor:
        return self.logits.clone()


def walk(predictor: Fake) -> tuple[np.ndarray, int, list[float]]:
    manifest = Manifest("t", "a", "laptop", VOCAB, 0, "bytes", "step", lanes=LANES, layout="parts")
    ids = np.random.default_rng(1).integers(1, VOCAB, TOKENS - 1).astype(np.int32)
    count = schedule.count(manifest, 1, TOKENS)
    return score.step_through(manifest, [ids], count, predictor, lambda done: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("together", [1, 5 * LANES * VOCAB])
def test_the_score_does_not_depend_on_how_many_steps_are_scored_at_once(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-losses, steps and the bits of each `rules.CODE_EVERY` steps are the same, bit for bit."""
    nll, steps, bits = walk(Fake())
    monkeypatch.setattr(score, "_TOGETHER", together)
    again, *rest = walk(Fake())
    assert np.isfinite(nll).all() and len(bits) == steps // 64 == 2
    assert again.tolist() == nll.tolist() and rest == [steps, bits]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("step", [0, 100, 166])
def test_a_logit_that_is_not_finite_is_refused_by_its_token(step: int, value: float) -> None:
    """The refusal names the token that the logits were for, in the last step too."""
    token = 167 + step  # the second lane's part begins at token 167, and has 167
    with pytest.raises(Refused, match=f"the logits for token {token} of the text hold NaN or infinity"):
        walk(Fake(bad=(step, 1, value)))
