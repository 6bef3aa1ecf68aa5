"""The scorer: `python -m pgolf.score artifact.zst`.

    read artifact -> encode the canonical text -> decode it again -> step through it -> sum the code length

bpb = total bits that the model needs to code the validation text, divided by the text's UTF-8 bytes. The text,
the byte count, the targets, the softmax, the sum and the clock live in this process; the submission runs in
a sandbox and only ever returns logits over its whole vocabulary, before it is shown what follows.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pgolf import rules
from pgolf.artifact import Artifact, Manifest, read
from pgolf.data.dataset import CanonicalText, Dataset, open_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.sandbox import lock, probe
from pgolf.sandbox.box import check_hidden
from pgolf.sandbox.environment import check_installed
from pgolf.sandbox.probe import Isolation
from pgolf.sandbox.wire import Ids, WireError
from pgolf.score import record, schedule, tokenization, windows
from pgolf.score.deadline import Clock
from pgolf.score.devices import find_device, one_thread
from pgolf.score.likelihood import Floats, log_losses
from pgolf.score.predictors import Predictor
from pgolf.score.schedule import Targets


@dataclass(frozen=True)
class Options:
    """How to score."""

    track: str | None = None
    """None: the artifact's own."""
    device: str = "auto"
    documents: int | None = None
    """Score only the first N documents."""
    isolated: bool = True
    fresh_machine: bool = False
    """The operator states that nothing else runs, or ran, on this machine."""


def score(path: Path, data: Path, options: Options = Options()) -> record.Record:
    """Score the artifact at `path` on the validation text of `data`.

    Returns the record: status "ok", or "refused" (the submission breaks a rule) or "failed" (this machine or the
    data is not fit) with the reason. Raises UsageError when there is nothing to score.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such artifact")
    device = find_device(options.device)
    started = time.monotonic()
    result = record.new(path, options.track, device)
    try:
        with lock.hold(), one_thread(device):
            _score(result, path, data, options, device)
        result["status"] = "ok"
        result["eligible"] = not result["reasons"]
    except Refused as error:
        result.update(status="refused", reason=str(error))
    except WireError as error:
        result.update(status="refused", reason=f"the submission broke the wire protocol: {error}")
    except torch.OutOfMemoryError:
        result.update(status="refused", reason="the predictor leaves the scorer too little of the GPU's memory")
    except EnvironmentBroken as error:
        result["reason"] = str(error)
    except OSError as error:
        result["reason"] = f"{error.filename or 'the scorer'}: {error.strerror or error}"
    result["seconds"]["total"] = round(time.monotonic() - started, 3)
    return result


def _score(result: record.Record, path: Path, data: Path, options: Options, device: str) -> None:
    """Fill `result` step by step, so that a refusal keeps what was known by then."""
    limit = rules.ARTIFACT_BYTES if options.track is None else rules.track(options.track).artifact_bytes
    artifact = read(path, limit)
    manifest = artifact.manifest
    track = rules.track(options.track or manifest.track)
    result["track"] = track.name
    result["form"] = manifest.form
    result["submission"] = {"name": manifest.name, "author": manifest.author}
    result["artifact"] = {"sha256": artifact.sha256, "bytes": artifact.size}
    check_installed(manifest.packages)
    isolation = probe.isolation() if options.isolated else None
    result["isolation"] = isolation.description if isolation else "none"
    result["fresh_machine"] = options.fresh_machine
    dataset = open_dataset(data)
    if options.isolated:
        check_hidden(dataset.root)
    text = dataset.canonical_text()
    result["data"] = {"name": dataset.name, "sha256": text.sha256}
    if options.documents is not None:
        text = CanonicalText(text.documents[: options.documents])
    result.update(documents=len(text.documents), bytes=text.bytes)
    if not text.bytes:
        raise EnvironmentBroken(f"{data}: the validation text is empty")
    result["reasons"] = reasons(manifest, dataset, text, isolation, options)

    clock = Clock(track.eval_seconds, result["seconds"])
    encoded = tokenization.encode(artifact, text.documents, options.isolated, clock.phase("encode"))
    tokenization.check_decoding(artifact, text.documents, encoded, options.isolated, clock.phase("decode"))
    nll = _predict(result, artifact, encoded, clock, device, options.isolated)
    nats = math.fsum(nll)
    if not math.isfinite(nats):
        raise EnvironmentBroken("a token was not scored, which is a bug in pgolf; please report it")
    result.update(tokens=len(nll), margin=clock.margin())
    result.update(nats_per_token=nats / len(nll), bpb=nats / math.log(2) / text.bytes)  # last: a refusal has no score


def reasons(
    manifest: Manifest, dataset: Dataset, text: CanonicalText, isolation: Isolation | None, options: Options
) -> list[str]:
    """Why the score does not count; empty when it does."""
    found: list[str] = []
    if manifest.form != "step":
        found.append("not proven: window form, in which a predictor receives tokens before they are scored")
    if tokenization.is_code(manifest):
        found.append("the tokenizer is code of the submission, which has held the text before it is scored")
    if options.documents is not None:
        found.append("only a sample of the documents")
    if text.bytes < rules.ELIGIBLE_TEXT_BYTES:
        found.append(f"the text has {text.bytes:,} bytes, {rules.ELIGIBLE_TEXT_BYTES:,} are needed")
    if dataset.from_environment:
        found.append("the text can be rebuilt from what is installed on the machine (demo)")
    if isolation is None:
        return [*found, "no sandbox"]
    return [*found, *isolation.reasons(options.fresh_machine)]


def _predict(
    result: record.Record, artifact: Artifact, encoded: Sequence[Ids], clock: Clock, device: str, isolated: bool
) -> Floats:
    """Log-loss in nats (N,) of every token, by the form of the artifact."""
    manifest = artifact.manifest
    tokens = sum(map(len, encoded)) + len(encoded)
    count = schedule.count(manifest, len(encoded), tokens)
    with (
        progress("score", tokens) as bar,
        Predictor(artifact, count, device, isolated) as predictor,
    ):
        with clock.phase("load") as deadline:
            predictor.set_deadline(deadline)
            result["plan"] = predictor.load()
        with clock.phase("predict") as deadline:
            predictor.set_deadline(deadline)
            if manifest.form == "step":
                nll, result["steps"], bits = step_through(manifest, encoded, count, predictor, bar.update)
                result["code"] = {"every": rules.CODE_EVERY, "bits": bits}
            else:
                nll = windows.predict(manifest, encoded, predictor, bar.update)
    # Where the time went: waiting for the predictor, the wire, and the rest is the scorer's own work.
    seconds = clock.seconds.pop("predict")
    clock.seconds |= {**predictor.seconds, "scorer": seconds - sum(predictor.seconds.values())}
    if manifest.form == "window":
        with Predictor(artifact, count, device, isolated) as fresh:
            fresh.set_deadline(time.monotonic() + clock.limit)
            fresh.load()
            result["spot_check"] = asdict(windows.spot_check(manifest, encoded, fresh, nll))
    return nll


def step_through(
    manifest: Manifest, encoded: Sequence[Ids], count: int, predictor: Predictor, done: Callable[[int], object]
) -> tuple[Floats, int, list[float]]:
    """The step form: log-loss in nats (N,), the number of steps, and the bits spent after each `rules.CODE_EVERY`.

    What follows is shown only when the logits are here: `receive` returns a private copy of all of them.
    """
    targets = Targets.of(manifest, encoded)
    nll = np.full(len(targets.tokens), np.nan)
    bits: list[float] = []
    spent = 0.0
    number = 0
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
        nll[at] = losses = log_losses(logits, targets.tokens, at)
        spent += float(losses.sum()) / math.log(2)
        number += 1
        if number % rules.CODE_EVERY == 0:
            bits.append(round(spent, 2))
        done(len(at))
    return nll, number, bits


def progress(name: str, tokens: int) -> "tqdm[None]":
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(total=tokens, unit="tok", unit_scale=True, desc=name, leave=False, disable=None)
