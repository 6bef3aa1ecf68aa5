"""The defences, taken away one by one: scorers as they were, or as one would easily write them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from attacks.texts import english

from pgolf.sandbox import bubblewrap, wire
from pgolf.score import likelihood, predictors, schedule, score, tokenization


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def tokens_first(manifest: Any, encoded: Any, count: int, predictor: Any, done: Any) -> Any:
    """A scorer that shows what follows while the logits are still computed, to save the wait."""
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
    """A scorer that reads the logits where they lie, after it has shown what follows."""

    def receive(self: predictors.Predictor, rows: int) -> torch.Tensor:
        reply = wire.Logits.decode(self.worker.receive(wire.Kind.LOGITS, wire.LOGITS_BYTES))
        shared = self.ring.slot(reply.number % wire.SLOTS, 4 * rows * self.width)
        return torch.frombuffer(shared, dtype=torch.float32).view(rows, self.width)

    def late(*arguments: Any) -> Any:
        time.sleep(0.003)
        return likelihood.log_losses(*arguments)

    with replaced(predictors.Predictor, "receive", receive), replaced(score, "log_losses", late):
        yield


@contextmanager
def without_constant_time() -> Iterator[None]:
    """A scorer that takes longer over the token that it is about to show: here it looks up what follows it, too."""
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


def nan_is_nothing(logits: torch.Tensor, tokens: Any, at: Any) -> Any:
    targets = torch.from_numpy(tokens[at].astype("int64"))
    return likelihood.negative_log_likelihood(logits, targets).nan_to_num(0.0).numpy()


@contextmanager
def told_in_the_environment() -> Iterator[None]:
    """Whatever this process has in its environment is handed on."""
    text = "\n".join(english()).encode("ascii", "ignore").decode()
    real = bubblewrap.variables
    with replaced(bubblewrap, "variables", lambda device: real(device) | {"TEXT": text}):
        yield


WITHOUT: dict[str, Callable[[], Any]] = {
    "": lambda: nullcontext(),
    "sandbox": lambda: nullcontext(),
    "step form": lambda: nullcontext(),
    "logits first": lambda: replaced(score, "step_through", tokens_first),
    "copy": without_copy,
    "constant time": without_constant_time,
    "dataset order": longest_first,
    "fp64 sum": lambda: replaced(likelihood, "negative_log_likelihood", low_precision),
    "NaN refused": lambda: replaced(score, "log_losses", nan_is_nothing),
    "clean environment": told_in_the_environment,
    "decoding": lambda: replaced(tokenization, "check_decoding", lambda *arguments: None),
}
