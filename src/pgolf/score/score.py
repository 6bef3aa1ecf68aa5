"""The scorer: `python -m pgolf.score artifact.zst`.

    read artifact -> encode the canonical text -> decode it again -> plan windows -> sum the code length

bpb = total bits that the model needs to code the validation text, divided by the text's UTF-8 bytes. The text,
the byte count, the targets, the softmax, the sum and the clock live in this process; the submission runs in
boxes (`sandbox`) and only ever returns full rows of logits over its vocabulary.
"""

import importlib.metadata
import math
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pgolf import rules
from pgolf.artifact import Artifact, read
from pgolf.data.dataset import CanonicalText, open_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.sandbox.box import check_hidden
from pgolf.sandbox.probe import isolation
from pgolf.sandbox.wire import WireError
from pgolf.score import audit, record, windows
from pgolf.score import tokenization as tokenizer
from pgolf.score.predictors import SLOT_BYTES, Floats, Lane, Question, answers, code_lengths, open_lanes
from pgolf.score.windows import Index, Plan


@dataclass
class Timer:
    """The evaluation clock: seconds per phase, and one deadline for everything the submission does."""

    limit: float
    deadline: float
    """A value of time.monotonic()."""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase. Raises Refused in place of a TimeoutError from a worker's channel."""
        start = time.monotonic()
        try:
            yield
        except TimeoutError:
            raise Refused(f"the evaluation took longer than its {self.limit:g} s (ended during {name})") from None
        finally:
            self.seconds[name] = round(time.monotonic() - start, 3)


def predict(artifact: Artifact, plan: Plan, lanes: Sequence[Lane]) -> Floats:
    """Code length in nats (N,) of every scored token, in order."""
    nll = np.full(len(plan.stream) - 1, np.nan)
    parts = _predict_streaming if artifact.manifest.form == "streaming" else _predict_simple
    with tqdm(total=len(nll), unit="tok", unit_scale=True, desc="score", leave=False, disable=None) as bar:
        for rows, values in parts(artifact, plan, lanes):
            nll[rows] = values
            bar.update(len(rows))
    return nll


def _predict_simple(artifact: Artifact, plan: Plan, lanes: Sequence[Lane]) -> Iterator[tuple[Index, Floats]]:
    """Stream positions and the code lengths of the tokens after them, batch by batch."""
    batches = list(windows.batches(plan.rounds[0], SLOT_BYTES // (4 * artifact.manifest.vocab_size)))
    questions = (
        Question(plan.stream[b.positions()], np.full(len(b.start), b.first, np.int32), b.length - b.first)
        for b in batches
    )
    for number, logits in answers(lanes, questions):
        rows = batches[number].positions()[:, batches[number].first :].reshape(-1)
        yield rows, code_lengths(logits, plan.stream, rows)


def _predict_streaming(artifact: Artifact, plan: Plan, lanes: Sequence[Lane]) -> Iterator[tuple[Index, Floats]]:
    """The same round by round: the next one is shown only when every row of the one before was received."""
    for number, pieces in enumerate(plan.rounds):
        shown = plan.show(number)
        at = int(pieces.start[0])
        for logits in lanes[0].show(number, shown):
            rows = np.arange(at, at + len(logits))
            yield rows, code_lengths(logits, plan.stream, rows)
            at += len(logits)
        if artifact.manifest.adapts:
            lanes[0].update(shown)


def score(
    path: Path,
    data: Path,
    track_name: str | None = None,
    device: str = "auto",
    documents: int | None = None,
    isolated: bool = True,
    audited: bool = True,
    audit_seed: int | None = None,
) -> record.Record:
    """Score the artifact at `path` on the validation text of `data`.

    `documents`: only the first so many. `audit_seed` draws the audited tokens; None: a secret one. Who knows the seed
    knows where a peek would pass, so the score does not count then.
    Returns the record: status "ok", or "refused" (the submission breaks a rule) or "failed" (this machine or the
    data is not fit) with the reason. Raises UsageError when there is nothing to score.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such artifact")
    devices = find_devices(device)
    started = time.monotonic()
    result: record.Record = {
        "status": "failed",
        "reason": None,
        "eligible": False,
        "bpb": None,
        "nats_per_token": None,
        "tokens": None,
        "bytes": None,
        "documents": None,
        "track": track_name,
        "submission": None,
        "artifact": {"sha256": None, "bytes": path.stat().st_size},
        "data": None,
        "isolation": None,
        "seconds": {},
        "environment": record.environment(devices[0]),
        "audit": None,
    }
    try:
        artifact, plan, nll = _score(result, path, data, devices, documents, isolated)
        if audited:
            seed = secrets.randbits(63) if audit_seed is None else audit_seed
            _audit(result, artifact, plan, nll, devices, isolated, seed)
        result["status"] = "ok"
        conclusive = result["audit"] is not None and result["audit"]["conclusive"]
        result["eligible"] = isolated and documents is None and audit_seed is None and conclusive
    except Refused as error:
        result.update(status="refused", reason=str(error), bpb=None, nats_per_token=None)
    except WireError as error:
        reason = f"the submission broke the wire protocol: {error}"
        result.update(status="refused", reason=reason, bpb=None, nats_per_token=None)
    except torch.OutOfMemoryError:
        reason = "the predictor leaves the scorer too little of the GPU's memory"
        result.update(status="refused", reason=reason, bpb=None, nats_per_token=None)
    except EnvironmentBroken as error:
        result.update(status="failed", reason=str(error))
    result["seconds"]["total"] = round(time.monotonic() - started, 3)
    return result


def _score(
    result: record.Record,
    path: Path,
    data: Path,
    devices: Sequence[str],
    sample: int | None,
    isolated: bool,
) -> tuple[Artifact, Plan, Floats]:
    """Fill `result` step by step, so that a refusal keeps what was known by then."""
    limit = rules.ARTIFACT_BYTES if result["track"] is None else rules.track(result["track"]).artifact_bytes
    artifact = read(path, limit)
    manifest = artifact.manifest
    track = rules.track(result["track"] or manifest.track)
    result["track"] = track.name
    result["submission"] = {"name": manifest.name, "author": manifest.author}
    result["artifact"] = {"sha256": artifact.sha256, "bytes": artifact.size}
    _check_packages(manifest.packages)
    result["isolation"] = isolation().description if isolated else "none"
    dataset = open_dataset(data)
    if isolated:
        check_hidden(dataset.root)
    text = dataset.canonical_text()
    result["data"] = {"name": dataset.name, "sha256": text.sha256}
    if sample is not None:
        text = CanonicalText(text.documents[:sample])
    result.update(documents=len(text.documents), bytes=text.bytes)
    if not text.bytes:
        raise EnvironmentBroken(f"{data}: the validation text is empty")

    timer = Timer(track.eval_seconds, time.monotonic() + track.eval_seconds, result["seconds"])
    with timer.phase("encode"):
        encoded = tokenizer.encode(artifact, text.documents, timer.deadline, isolated)
    with timer.phase("decode"):
        tokenizer.check_decoding(artifact, text.documents, encoded, timer.deadline, isolated)
    plan = Plan.make(manifest, encoded)
    with timer.phase("predict"), open_lanes(artifact, plan, devices, timer.deadline, isolated) as lanes:
        nll = predict(artifact, plan, lanes)
    nats = math.fsum(nll)
    if not math.isfinite(nats):
        raise EnvironmentBroken("a token was not scored, which is a bug in pgolf; please report it")
    result.update(tokens=len(nll), nats_per_token=nats / len(nll), bpb=nats / math.log(2) / text.bytes)
    return artifact, plan, nll


def _audit(
    result: record.Record,
    artifact: Artifact,
    plan: Plan,
    nll: Floats,
    devices: Sequence[str],
    isolated: bool,
    seed: int,
) -> None:
    """Audit the code lengths `nll` (N,). Raises Refused when they rest on more than the tokens before."""
    shown = plan.windows()
    tokens = max(rules.AUDIT_TOKENS, int(rules.AUDIT_SHARE * int(shown.length.sum())))
    sample = audit.draw(shown, tokens, np.random.default_rng(seed))
    limit = result["seconds"]["predict"] + rules.AUDIT_SECONDS
    timer = Timer(limit, time.monotonic() + limit, result["seconds"])
    with timer.phase("audit"), open_lanes(artifact, plan, devices, timer.deadline, isolated) as lanes:
        blind = audit.blind(artifact, plan, sample, lanes)
    tolerance = rules.AUDIT_TOLERANCE * min(1.0, result["bytes"] / result["tokens"] / rules.AUDIT_BYTES)
    verdict = audit.verdict(blind - nll[sample.row], sample.weight, tolerance)
    result["audit"] = {"seed": seed, **asdict(verdict)}
    if not verdict.accepted:
        raise Refused(verdict.reason())


def _check_packages(packages: Sequence[str]) -> None:
    for name in packages:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise Refused(f"the submission needs the package {name}, which this environment lacks") from None


def find_devices(device: str) -> list[str]:
    """One entry per worker. Raises UsageError for a device that is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return ["cpu"]
    if not (match := re.fullmatch(r"cuda(?::(\d+))?", device)):
        raise UsageError(f"there is no device {device!r}; use cpu, cuda (all GPUs) or cuda:N")
    count = torch.cuda.device_count()
    index = int(match[1]) if match[1] else 0
    if index >= count:
        raise UsageError(f"device {device} is not here: torch {torch.__version__} sees {count} GPUs")
    return [device] if match[1] else [f"cuda:{i}" for i in range(count)]
