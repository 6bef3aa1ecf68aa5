"""The scorer: `python -m pgolf.score artifact.zst`.

    read artifact -> encode the canonical text -> decode it again -> step through it -> sum the code length

bpb = total bits that the model needs to code the validation text, divided by the text's UTF-8 bytes. The text,
the byte count, the targets, the softmax, the sum and the clock live in this process; the submission runs in
a sandbox and only ever returns logits over its whole vocabulary, before it is shown what follows.
"""

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf import rules
from pgolf.artifact import Artifact, Manifest, read
from pgolf.data.dataset import CanonicalText, Dataset, open_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.sandbox import lock, probe
from pgolf.sandbox.box import check_hidden
from pgolf.sandbox.environment import check_installed
from pgolf.sandbox.probe import Isolation
from pgolf.sandbox.wire import Ids, WireError
from pgolf.score import schedule, tokenization, windows
from pgolf.score.deadline import Clock
from pgolf.score.devices import Runtime, find_device, one_thread
from pgolf.score.likelihood import Floats, log_losses
from pgolf.score.losses import Losses
from pgolf.score.predictors import Predictor, progress
from pgolf.score.record import CodeLength, Packed, Record, Submission, Text, new
from pgolf.score.schedule import Index, Targets

_TOGETHER = 1 << 20  # logits: one after the other, the predictor's work empties the cache in between


@dataclass(frozen=True)
class Options:
    """How to score."""

    track: str | None = None
    """None: the artifact's own."""
    device: str = "auto"
    documents: int | None = None
    """Score only N documents: the first ones of the validation text, or as many spread over the development text."""
    isolated: bool = True
    fresh_machine: bool = False
    """The operator states that nothing else runs, or ran, on this machine."""
    development: bool = False
    """Score the development text instead of the validation text."""


def score(
    path: Path,
    data: Path | Dataset,
    options: Options = Options(),
    keep: Callable[[Losses], object] = lambda losses: None,
) -> Record:
    """Score the artifact at `path` on the validation text of `data`; `keep` gets the log-loss of each document.

    A dataset that is open already keeps its text, so that it is not read again.

    Returns the record: status "ok", or "refused" (the submission breaks a rule, or its code raised) or "failed" (this
    machine or the data is not fit) with the reason. Raises UsageError when there is nothing to score.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such artifact")
    runtime = Runtime(find_device(options.device), options.isolated)
    started, clock = time.monotonic(), Clock()
    latest = new(path, options.track, runtime.device)
    reason: str | None = None
    try:
        with (
            lock.hold(),
            one_thread(runtime.device),
            closing(_stages(latest, path, data, options, runtime, clock, keep)) as stages,
        ):
            for record in stages:
                latest = record  # which knows more than the one before
        status = "ok"
    except Refused as error:
        status, reason = "refused", str(error)
    except WireError as error:
        status, reason = "refused", f"the submission broke the wire protocol: {error}"
    except torch.OutOfMemoryError:
        status, reason = "refused", "the predictor leaves the scorer too little of the GPU's memory"
    except EnvironmentBroken as error:
        status, reason = "failed", str(error)
    except OSError as error:
        status, reason = "failed", f"{error.filename or 'the scorer'}: {error.strerror or error}"
    eligible = status == "ok" and not latest.reasons
    seconds = {**clock.seconds, "total": time.monotonic() - started}
    return replace(latest, status=status, reason=reason, eligible=eligible, seconds=seconds)


def _stages(
    record: Record,
    path: Path,
    data: Path | Dataset,
    options: Options,
    runtime: Runtime,
    clock: Clock,
    keep: Callable[[Losses], object],
) -> Generator[Record]:
    """Yield the record whenever more of it is known, so that a refusal keeps what was known by then."""
    limit = rules.ARTIFACT_BYTES if options.track is None else rules.track(options.track).artifact_bytes
    artifact = read(path, limit)
    manifest = artifact.manifest
    track = rules.track(options.track or manifest.track)
    clock.limit = track.eval_seconds
    submission, packed = Submission(manifest.name, manifest.author), Packed(artifact.sha256, artifact.size)
    yield (record := replace(record, track=track.name, form=manifest.form, submission=submission, artifact=packed))
    check_installed(manifest.packages)
    isolation = probe.isolation() if runtime.isolated else None
    described = isolation.description if isolation else "none"
    yield (record := replace(record, isolation=described, fresh_machine=options.fresh_machine))
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    if runtime.isolated:
        check_hidden(dataset.root, manifest.packages)
    text = dataset.development_text() if options.development else dataset.canonical_text()
    record = replace(record, data=Text(dataset.name, text.sha256))
    if options.documents is not None:
        first = CanonicalText(text.documents[: options.documents])
        text = text.spread(options.documents) if options.development else first
    yield (record := replace(record, documents=len(text.documents), bytes=text.bytes))
    if not text.bytes:
        raise EnvironmentBroken(f"{dataset.root}: the text to score is empty")
    yield (record := replace(record, reasons=tuple(reasons(manifest, dataset, text, isolation, options))))
    keep((yield from _evaluate(record, artifact, text, runtime, clock)))


def _evaluate(
    record: Record, artifact: Artifact, text: CanonicalText, runtime: Runtime, clock: Clock
) -> Generator[Record, None, Losses]:
    """The stages in which code or weights of the submission run, on the clock; the last has the score."""
    manifest = artifact.manifest
    encoded = tokenization.encode(artifact, text.documents, runtime, clock.phase("encode"))
    tokenization.check_decoding(artifact, text.documents, encoded, runtime, clock.phase("decode"))
    tokens = sum(map(len, encoded)) + len(encoded)
    count = schedule.count(manifest, len(encoded), tokens)
    with progress("score", tokens) as bar, Predictor(artifact, count, runtime) as predictor:
        with clock.phase("load") as deadline:
            predictor.set_deadline(deadline)
            yield (record := replace(record, plan=predictor.load()))
        with clock.phase("predict") as deadline:
            predictor.set_deadline(deadline)
            if manifest.form == "step":
                nll, steps, bits = step_through(manifest, encoded, count, predictor, bar.update)
                yield (record := replace(record, steps=steps, code=CodeLength(rules.CODE_EVERY, tuple(bits))))
            else:
                nll = windows.predict(manifest, encoded, predictor, bar.update)
    clock.split("predict", predictor.seconds, "scorer")  # what is neither predictor nor wire is the scorer's own work
    if manifest.form == "window":
        with Predictor(artifact, count, runtime) as fresh:
            fresh.set_deadline(time.monotonic() + clock.limit)
            fresh.load()
            yield (record := replace(record, spot_check=windows.spot_check(manifest, encoded, fresh, nll)))
    nats = math.fsum(nll)
    if not math.isfinite(nats):
        raise EnvironmentBroken("a token was not scored, which is a bug in pgolf; please report it")
    scored = replace(record, tokens=len(nll), margin=clock.margin())
    yield replace(scored, nats_per_token=nats / len(nll), bpb=nats / math.log(2) / text.bytes)
    return Losses.of(artifact.sha256, nll, encoded, text)


def reasons(
    manifest: Manifest, dataset: Dataset, text: CanonicalText, isolation: Isolation | None, options: Options
) -> list[str]:
    """Why the score does not count; empty when it does."""
    found = reasons_of_submission(manifest)
    if options.development:
        found.append("the development text, not the validation text")
    if options.documents is not None:
        found.append("only a sample of the documents")
    found += reasons_of_text(dataset, text.bytes)
    if isolation is None:
        return [*found, "no sandbox"]
    return [*found, *isolation.reasons(options.fresh_machine)]


def reasons_of_submission(manifest: Manifest) -> list[str]:
    """Why no score of the artifact counts, on any machine and any text."""
    found: list[str] = []
    if manifest.form != "step":
        found.append("not proven: window form, in which a predictor receives tokens before they are scored")
    if tokenization.is_code(manifest):
        found.append("the tokenizer is code of the submission, which has held the text before it is scored")
    return found


def reasons_of_text(dataset: Dataset, size: int) -> list[str]:
    """Why no score on that many bytes of the dataset's text counts."""
    found: list[str] = []
    if size < rules.ELIGIBLE_TEXT_BYTES:
        found.append(f"the text has {size:,} bytes, {rules.ELIGIBLE_TEXT_BYTES:,} are needed")
    if dataset.from_environment:
        found.append("the text can be rebuilt from what is installed on the machine (demo)")
    return found


def step_through(
    manifest: Manifest, encoded: Sequence[Ids], count: int, predictor: Predictor, done: Callable[[int], object]
) -> tuple[Floats, int, list[float]]:
    """The step form: log-loss in nats (N,), the number of steps, and the bits spent after each `rules.CODE_EVERY`.

    What follows is shown only when the logits are here: `receive` returns a private copy of all of them. The log-loss
    of several steps is taken at once, while the predictor computes.
    """
    targets = Targets.of(manifest, encoded)
    nll = np.full(len(targets.tokens), np.nan)
    bits: list[float] = []
    spent = 0.0
    number = 0
    waiting: list[tuple[Tensor, Index]] = []  # logits, and where the tokens are that they predict
    walk = schedule.steps(manifest, count)
    step = schedule.begin(walk)
    if step is not None:
        predictor.submit(step)
    while step is not None:
        logits = predictor.receive(len(step.lane))
        at = targets.at(step)
        step = schedule.advance(walk, targets.tokens[at])
        if step is not None:
            predictor.submit(step)  # from here on the predictor computes, while this process scores
        waiting.append((logits, at))
        number += 1
        full = len(waiting) * logits.numel() >= _TOGETHER
        if full or step is None or number % rules.CODE_EVERY == 0:
            for logits, at in waiting:
                nll[at] = losses = log_losses(logits, targets.tokens, at)
                spent += float(losses.sum()) / math.log(2)
                done(len(at))
            waiting.clear()
        if number % rules.CODE_EVERY == 0:
            bits.append(round(spent, 2))
    return nll, number, bits
