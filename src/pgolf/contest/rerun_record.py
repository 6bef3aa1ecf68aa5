"""The record of a re-run: claim and verified scores side by side. Typed here, JSON on disk (docs/rerun.schema.json)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import rules
from pgolf.artifact import Artifact, is_source, sources
from pgolf.contest.verdict import Verdict
from pgolf.files import printable, read_regular, write_atomically
from pgolf.score.record import Environment, Packed, Submission, Text, typed

FORMAT = "pgolf-rerun-1"
_MOST_BYTES = 1 << 24
_SHOWN = 4  # members, in the table


@dataclass(frozen=True)
class Member:
    """A file of the artifact."""

    name: str
    source: bool
    """Whether the trainer gets it."""
    bytes: int
    entropy: float
    """Of its bytes, in bits per byte: 8 is noise or compressed, text has 4 to 5."""


@dataclass(frozen=True)
class Claimed:
    """What the submission says about its score. None: nothing."""

    bpb: float | None
    seeds: int


@dataclass(frozen=True)
class Declared:
    """What train.py says about its run: never a fact."""

    steps: int
    tokens: int
    parameters: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class SliceText:
    """A text that was scored. One that came by --score-data may be secret and has no name."""

    name: str | None
    sha256: str


@dataclass(frozen=True)
class SeedScore:
    """The score of a seed's artifact on one text."""

    data: SliceText
    bpb: float | None
    eligible: bool
    reasons: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class SeedRun:
    """One training, measured by the harness, and its scores."""

    seed: int
    status: str
    """"ok", or "refused" with the reason."""
    reason: str | None
    seconds: Mapping[str, float]
    """"sandbox": making it; "prepare": before the data is handed over; "train": under the clock."""
    artifact: Packed | None
    """None: there is none."""
    declared: Declared | None
    scores: tuple[SeedScore, ...] = ()
    """In the order of the texts: first that of the training data's folder, which the claim is about."""


@dataclass(frozen=True)
class Calibration:
    """How fast the machine is. None: not measured."""

    fp32_tflops: float
    """Of square matrix products on one device."""
    bf16_tflops: float | None
    """None where bf16 is slower than fp32."""
    bandwidth_gb: float
    """Bytes read and written by a copy of memory, in 1e9 bytes per second."""
    naive_ms: float | None
    """Milliseconds of a training step of the naive baseline on this data, median; None without the baseline."""
    seconds: float
    """How long all this took."""


@dataclass(frozen=True)
class Limits:
    """Of the track, in seconds and bytes; None: no limit."""

    prepare_seconds: float
    train_seconds: float | None
    eval_seconds: float
    artifact_bytes: int
    source_bytes: int


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """The fields of the JSON in their order. None: not known when the re-run ended."""

    format: str = FORMAT
    status: str = "failed"
    """"ok": there is a verdict; "refused": the submission breaks a rule; "failed": the machine or data is not fit."""
    reason: str | None = None
    verdict: Verdict | None = None
    rules: int = rules.VERSION
    track: str | None = None
    submission: Submission | None = None
    claimed: Claimed | None = None
    artifact: Packed
    members: tuple[Member, ...] = ()
    data: Text | None = None
    """The training data: digest of tokenizer and training shards."""
    processes: int = 1
    limits: Limits | None = None
    seeds: tuple[SeedRun, ...] = ()
    machine: Environment
    calibration: Calibration | None = None
    quarantine: tuple[str, ...] = ()
    """Why a person has to look at it."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of all seeds: "calibrate", "train" with sandbox and preparation, "score", and their "total"."""


def members(artifact: Artifact) -> tuple[Member, ...]:
    """The report on an artifact's members."""
    given = sources(artifact.members).keys() | {artifact.manifest.tokenizer}
    return tuple(
        Member(name, name in given, len(content), round(entropy(content), 3))
        for name, content in sorted(artifact.members.items())
    )


def entropy(data: bytes) -> float:
    """Entropy of the distribution of byte values, in bits per byte."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    shares = counts[counts > 0] / max(1, len(data))
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def as_json(record: Rerun) -> dict[str, Any]:
    """The record as its JSON has it: times in milliseconds' precision."""
    values = asdict(record)
    for part in (values, *values["seeds"]):
        part["seconds"] = {name: round(seconds, 3) for name, seconds in part["seconds"].items()}
    return values


def write(record: Rerun, path: Path) -> None:
    """Write `record` as JSON under `path`, atomically."""
    write_atomically(path, (json.dumps(as_json(record), indent=1, allow_nan=False) + "\n").encode())


def read(path: Path) -> Rerun:
    """The record at `path`. Raises OSError when it cannot be read, ValueError when it is no record of a re-run."""
    try:
        record: Rerun = typed(Rerun, json.loads(read_regular(path, _MOST_BYTES)))
        if record.format != FORMAT:
            raise TypeError
    except (TypeError, RecursionError):
        raise ValueError(f"{path}: is no record of a re-run") from None
    return record


def table(record: Rerun) -> str:
    """The record for people."""
    if record.status == "failed" or record.verdict is None:
        return f"{record.status}: {printable(record.reason)}"
    lines = list(_head(record))
    for number, run in enumerate(record.seeds, 1):
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in run.seconds.items())
        lines.append(f"seed {number:<6} {run.seed}: {seconds} s")
        if run.artifact:
            lines.append(f"{'':<11} {run.artifact.bytes:,} bytes, sha256 {str(run.artifact.sha256)[:16]}")
        for score in run.scores:
            name = printable(score.data.name) if score.data.name is not None else f"text {score.data.sha256[:16]}"
            practice = "" if score.eligible else "  (practice score)"
            lines.append(f"{'':<11} {score.bpb:.6f} bpb on {name}{practice}" if score.bpb else f"{'':<11} no score")
        if run.reason:
            lines.append(f"{'':<11} refused: {printable(run.reason)}")
    return "\n".join([*lines, *_tail(record.verdict)])


def _head(record: Rerun) -> list[str]:
    if record.artifact.sha256 is None:  # nothing of it could be read
        return [f"{'artifact':<11} {record.artifact.bytes:,} bytes"]
    values = {"artifact": f"{record.artifact.bytes:,} bytes, sha256 {record.artifact.sha256[:16]}"}
    if record.submission:
        name, author = map(printable, (record.submission.name, record.submission.author))
        values = {"submission": f"{name} by {author}, track {record.track}", **values}
    given = [member for member in record.members if member.source]
    code = [member for member in given if is_source(member.name)]
    tokenizer = [f", and {_member(member)}" for member in given if member not in code]
    size = sum(member.bytes for member in code)
    values["trained on"] = f"{size:,} bytes of source in {len(code)} files" + "".join(tokenizer)
    others = sorted((member for member in record.members if not member.source), key=lambda member: -member.bytes)
    shown = ", ".join(map(_member, others[:_SHOWN]))
    values["kept out"] = shown + (f" and {len(others) - _SHOWN} more" if others[_SHOWN:] else "")
    if speed := record.calibration:
        bf16 = "" if speed.bf16_tflops is None else f", bf16 {speed.bf16_tflops:.2f}"
        naive = "" if speed.naive_ms is None else f", naive {speed.naive_ms:.1f} ms per step"
        values["machine"] = f"fp32 {speed.fp32_tflops:.2f} TFLOP/s{bf16}, memory {speed.bandwidth_gb:.1f} GB/s{naive}"
    return [f"{name:<11} {value}" for name, value in values.items()]


def _member(member: Member) -> str:
    return f"{printable(member.name)} {member.bytes:,} bytes at {member.entropy:.2f} bits per byte"


def _tail(verdict: Verdict) -> list[str]:
    values = {}
    if verdict.claimed is not None:
        values["claimed"] = f"{verdict.claimed:.6f} bpb"
    if verdict.mean is not None:
        half = "" if verdict.half_interval is None else f" ± {verdict.half_interval:.6f} (95 %)"
        values["verified"] = f"{verdict.mean:.6f} bpb{half}, {verdict.seeds} seeds that count"
    if verdict.difference is not None:
        values["difference"] = f"{verdict.difference:+.6f} bpb"
    values["verdict"] = f"{verdict.status}: {printable(verdict.reason)}"
    return [f"{name:<11} {value}" for name, value in values.items()]
