"""The record of a score: what the number rests on. Typed here, JSON on disk (docs/record.schema.json)."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

import pgolf
from pgolf import rules
from pgolf.errors import UsageError
from pgolf.files import printable, read_regular, write_atomically
from pgolf.machine import cores

_MOST_BYTES = 1 << 24  # a record of the main track has some 100 kB
_NEXT = "what this machine lacks, and the remedies: pgolf doctor; what a counting score needs: docs/security.md"


@dataclass(frozen=True)
class Submission:
    """Who sent it."""

    name: str
    author: str


@dataclass(frozen=True)
class Packed:
    """The artifact's file."""

    sha256: str | None
    """None: it was not readable as an artifact."""
    bytes: int


@dataclass(frozen=True)
class Text:
    """The validation text."""

    name: str
    sha256: str


@dataclass(frozen=True)
class CodeLength:
    """Cumulative code length of the step form."""

    every: int
    """Steps from one entry of `bits` to the next."""
    bits: tuple[float, ...]


@dataclass(frozen=True)
class SpotCheck:
    """Window form: sampled tokens whose log-loss was recomputed from their prefix alone. Decides nothing."""

    tokens: int
    changed: int
    """How many differ by more than `rules.SPOT_CHECK_NATS`."""
    largest: float
    """Largest difference in nats, recomputed minus scored."""
    token: int
    """Where that one stands among the scored tokens."""


@dataclass(frozen=True)
class Environment:
    """Versions and hardware that may change the last digits of a score."""

    pgolf: str
    python: str
    torch: str
    numpy: str
    sentencepiece: str
    platform: str
    processor: str
    cores: int
    device: str
    devices: int

    @staticmethod
    def of(device: str) -> "Environment":
        """This process's, with a predictor on `device`."""
        return Environment(
            pgolf=pgolf.__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            numpy=importlib.metadata.version("numpy"),
            sentencepiece=importlib.metadata.version("sentencepiece"),
            platform=platform.platform(),
            processor=_processor(),
            cores=cores(),
            device=torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
            devices=torch.cuda.device_count() if device == "cuda" else 1,
        )


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What `pgolf prove` found. None: not known when the proof ended."""

    status: str = "failed"
    reason: str | None = None
    bpb: float | None = None
    """The recorded score, which the proof is about."""
    steps: int | None = None
    of_steps: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    of_bytes: int | None = None
    recorded_bits: float | None = None
    code_bits: int | None = None
    data: Text | None = None
    isolation: str | None = None
    environment: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The fields of the JSON in their order. None: not known when the score ended."""

    status: str = "failed"
    """"ok"; "refused": the submission breaks a rule; "failed": the machine or the data is not fit."""
    reason: str | None = None
    eligible: bool = False
    reasons: tuple[str, ...] = ()
    rules: int
    bpb: float | None = None
    nats_per_token: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    documents: int | None = None
    track: str | None
    submission: Submission | None = None
    form: str | None = None
    artifact: Packed
    data: Text | None = None
    isolation: str | None = None
    fresh_machine: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    margin: float | None = None
    plan: int | None = None
    steps: int | None = None
    code: CodeLength | None = None
    spot_check: SpotCheck | None = None
    environment: Environment
    proof: Proof | None = None
    """Only in the JSON once there is one."""


def new(path: Path, track: str | None, device: str) -> Record:
    """The record of a score that has only begun."""
    packed = Packed(None, path.stat().st_size)
    return Record(rules=rules.VERSION, track=track, artifact=packed, environment=Environment.of(device))


def as_json(record: Record) -> dict[str, Any]:
    """The record as its JSON has it: times in milliseconds' precision, and a proof only where there is one."""
    values = asdict(record)
    if record.margin is not None:
        values["margin"] = round(record.margin, 3)
    if record.proof is None:
        del values["proof"]
    for part in (values, values.get("proof", {})):
        part["seconds"] = {name: round(seconds, 3) for name, seconds in part.get("seconds", {}).items()}
    return values


def write(record: Record, path: Path) -> None:
    """Write `record` as JSON under `path`, atomically."""
    write_atomically(path, (json.dumps(as_json(record), indent=1, allow_nan=False) + "\n").encode())


def read(path: Path) -> Record:
    """The record at `path`. Raises OSError when it cannot be read, ValueError when it is no record."""
    try:
        record: Record = typed(Record, json.loads(read_regular(path, _MOST_BYTES)))
    except (TypeError, RecursionError):
        raise ValueError(f"{path}: is no record of a score") from None
    return record


def read_scored(path: Path, missing: str, other: str) -> Record:
    """The record of a score that was made; UsageError, in the words given, when there is no file or no record."""
    try:
        found = read(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: {missing}") from None
    except (OSError, ValueError):
        raise UsageError(f"{path}: {other}") from None
    if found.bpb is None:
        raise UsageError(f"{path}: the record of a score that was {printable(found.status)}")
    return found


def contradiction(record: Record) -> str | None:
    """Why no score can have written these figures together, by the name of a field; None when they agree.

    `record`: of a finished score. Agreeing figures prove nothing: anybody can write them.
    """
    needed = "bpb", "nats_per_token", "tokens", "bytes", "documents", "data"
    if missing := [name for name in needed if not getattr(record, name)]:
        return f"{missing[0]} is missing"
    if record.artifact.sha256 is None:
        return "artifact.sha256 is missing"
    assert record.bpb and record.nats_per_token and record.tokens and record.bytes and record.documents
    if min(record.bpb, record.nats_per_token, record.tokens, record.bytes, record.documents) < 0:
        return "its bpb, nats_per_token, tokens, bytes or documents is negative"
    bits = record.nats_per_token * record.tokens / math.log(2)
    if not math.isclose(bits / record.bytes, record.bpb, rel_tol=1e-9):
        return "its bpb does not follow from its nats_per_token, tokens and bytes"
    if record.eligible == bool(record.reasons):
        return "it is eligible and has reasons against it" if record.eligible else "it is not eligible without a reason"
    return _contradicting_code(record, bits)


def _contradicting_code(record: Record, bits: float) -> str | None:
    """The same for the field `code`, in a score of that many bits."""
    code, steps = record.code, record.steps or 0
    if (code is not None) != (record.form == "step"):
        return f"its form is {printable(record.form)}, with{'out' * (code is None)} code"
    if code is None:
        return None
    if code.every != rules.CODE_EVERY:
        return f"its code.every is {code.every:,}, not {rules.CODE_EVERY:,}"
    if len(code.bits) != steps // code.every:
        return f"its code.bits has {len(code.bits):,} entries, which are not those of {steps:,} steps"
    cumulative = [0.0, *code.bits]
    most = math.inf if steps % code.every else cumulative[-1] + 1  # after the last entry come further steps, or none
    if cumulative != sorted(cumulative) or not cumulative[-1] - 1 <= bits <= most:
        return "its code.bits are not those of its bpb"
    return None


def typed(kind: Any, value: Any) -> Any:
    """`value`, of JSON, as `kind`: a dataclass, a tuple, a mapping, or a type that JSON has; Any of it.

    Raises TypeError when it is none, and for numbers that no record has: NaN, infinity, integers of more than 64 bits.
    """
    inner, origin = get_args(kind), get_origin(kind)
    if origin is UnionType:
        return None if value is None else typed(inner[0], value)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        return kind(**{name: typed(hint, value.get(name)) for name, hint in get_type_hints(kind).items()})
    if isinstance(value, list) and (origin is tuple or kind is Any):
        items = [typed(inner[0] if inner else Any, item) for item in value]
        return tuple(items) if origin is tuple else items
    if isinstance(value, dict) and (origin is Mapping or kind is Any):
        return {name: typed(inner[1] if inner else Any, item) for name, item in value.items()}
    if not isinstance(value, object if kind is Any else (int, float) if kind is float else origin or kind):
        raise TypeError(f"{value!r:.60} is no {kind}")
    if not (math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or abs(value) < 1 << 63):
        raise TypeError("a number that no record has")
    return value


def phases(seconds: Mapping[str, float]) -> dict[str, float]:
    """The seconds of a record or proof without their "total": of a record, what the evaluation clock charged."""
    return {name: value for name, value in seconds.items() if name != "total"}


def table(record: Record) -> str:
    """The record for people: a short table, or one line when there is no score."""
    if record.status != "ok":
        return f"{record.status}: {record.reason}"
    assert record.track and record.submission and record.data and record.bytes and record.tokens  # a score has them
    limits = rules.track(record.track)
    seconds = phases(record.seconds)
    shown = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    lines = {
        "submission": f"{record.submission.name} by {record.submission.author}, track {limits.name}",
        "artifact": f"{record.artifact.bytes:,} of {limits.artifact_bytes:,} bytes, "
        f"sha256 {str(record.artifact.sha256)[:16]}",
        "text": f"{printable(record.data.name)}: {record.documents:,} documents, {record.bytes:,} bytes",
        "tokens": f"{record.tokens:,} scored, {record.bytes / record.tokens:.3f} bytes per token",
        "seconds": f"{sum(seconds.values()):.1f} of {limits.eval_seconds:g} ({shown})",
        "isolation": record.isolation,
        "loss": f"{record.nats_per_token:.6f} nats per token",
        "score": f"{record.bpb:.6f} bpb" + ("" if record.eligible else "  (practice score)"),
    }
    if check := record.spot_check:
        lines["spot check"] = (
            f"{check.changed:,} of {check.tokens:,} sampled tokens changed without what follows them"
            + (f", most of all token {check.token:,} by {check.largest:+.2g} nats" if check.changed else "")
        )
    text = "\n".join(f"{name:<11} {value}" for name, value in lines.items())
    if record.eligible:
        return text
    return "\n".join([text, "does not count:", *(f"  - {reason}" for reason in record.reasons), _NEXT])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
