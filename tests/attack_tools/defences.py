"""The defences by name, and how each is switched off: the scorer as one could easily have written it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from attack_tools.texts import english

from pgolf.sandbox import bubblewrap, wire
from pgolf.score import likelihood, predictors, schedule, score, tokenization


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """While entered, a public name of pgolf has another value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def tokens_first(manifest: Any, encoded: Any, count: int, predictor: Any, done: Any) -> Any:
    """A scorer that shows the next tokens while the logits that predict them are computed, to save time."""
    targets = schedule.Targets.of(manifest, encoded)
    nll = torch.zeros(len(targets.tokens)).double().numpy()
    walk = schedule.steps(manifest, count)
    step = schedule.begin(walk)
    predictor.submit(step)
    while step is not None:
        at = targets.at(step)
        following = schedule.advance(walk, targets.tokens[at])
        if following is not None:
            predictor.submit(following)
        nll[at] = score.log_losses(predictor.receive(len(step.lane)), targets.tokens, at)
        step = following
    return nll, 0, []


@contextmanager
def without_copy() -> Iterator[None]:
    """A scorer that reads the logits in shared memory, after it has shown the next tokens."""

    def receive(self: predictors.Predictor, rows: int) -> torch.Tensor:
        reply = wire.Logits.decode(self.worker.receive(wire.Kind.LOGITS, wire.LOGITS_BYTES))
        shared = self.ring.slot(reply.number % wire.SLOTS, 4 * rows * self.width)
        return torch.frombuffer(shared, dtype=torch.float32).view(rows, self.width)

    def late(*arguments: Any) -> Any:
        time.sleep(0.003)
        return likelihood.log_losses(*arguments)

    # Step by step: what waits longer than one step would be overwritten by the honest logits of later ones.
    at_once = replaced(score, "_TOGETHER", 1)
    with replaced(predictors.Predictor, "receive", receive), replaced(score, "log_losses", late), at_once:
        yield


@contextmanager
def without_constant_time() -> Iterator[None]:
    """A scorer whose delay before a step depends on a token that it has not shown yet."""
    real_at, real_submit = schedule.Targets.at, predictors.Predictor.submit
    targets: list[schedule.Targets] = []

    def at(self: schedule.Targets, step: schedule.Step) -> Any:
        targets[:] = [self]
        return real_at(self, step)

    def submit(self: predictors.Predictor, step: schedule.Step) -> None:
        if targets and int(step.lane[0]) == 0 and chr(targets[0].tokens[real_at(targets[0], step)[0]]).islower():
            time.sleep(0.025)
        real_submit(self, step)

    with replaced(schedule.Targets, "at", at), replaced(predictors.Predictor, "submit", submit):
        yield


@contextmanager
def longest_first() -> Iterator[None]:
    """A scorer that saves steps by giving the lanes the longest documents first."""
    real = score.step_through

    def ordered(manifest: Any, encoded: Any, *rest: Any) -> Any:
        return real(manifest, sorted(encoded, key=len, reverse=True), *rest)

    with replaced(score, "step_through", ordered):
        yield


def low_precision(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A softmax whose sum is taken in the logits' own precision."""
    total = torch.zeros(len(logits), dtype=logits.dtype)
    for term in logits.exp().sort(-1, descending=True).values.T:
        total = total + term
    return torch.log(total.double()) - logits.gather(-1, targets[:, None])[:, 0].double()


def nan_is_free(logits: torch.Tensor, tokens: Any, at: Any) -> Any:
    """A scorer that takes a NaN loss as zero."""
    targets = torch.from_numpy(tokens[at].astype("int64"))
    return likelihood.negative_log_likelihood(logits, targets).nan_to_num(0.0).numpy()


@contextmanager
def inherited_environment() -> Iterator[None]:
    """A sandbox that inherits the environment of the scorer."""
    text = "\n".join(english()).encode("ascii", "ignore").decode()
    real = bubblewrap.variables
    with replaced(bubblewrap, "variables", lambda device: real(device) | {"TEXT": text}):
        yield


DEFENCES: dict[str, Callable[[], Any]] = {
    "sandbox": nullcontext,  # every counterfactual runs without it
    "step form": nullcontext,  # the artifact declares the window form
    "logits first": lambda: replaced(score, "step_through", tokens_first),
    "copy": without_copy,
    "constant time": without_constant_time,
    "dataset order": longest_first,
    "fp64 sum": lambda: replaced(likelihood, "negative_log_likelihood", low_precision),
    "NaN refused": lambda: replaced(score, "log_losses", nan_is_free),
    "clean environment": inherited_environment,
    "decoding": lambda: replaced(tokenization, "check_decoding", lambda *arguments: None),
}
