"""Score other predictor code on trained weights: an idea in seconds, where a training takes minutes.

An artifact is packed again with other code and other fields of its manifest, and scored as `pgolf score` does, but on
documents spread over the development text. The artifact as it is has been scored on them once; what it lost on each is
kept, so that a difference is paired by document.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import artifact, rules
from pgolf.artifact import MANIFEST
from pgolf.data.dataset import Dataset, open_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import printable
from pgolf.score import losses
from pgolf.score.devices import find_device
from pgolf.score.losses import Losses
from pgolf.score.record import Record, phases
from pgolf.score.score import Options, score
from pgolf.stats import paired_difference
from pgolf.submission.folder import source_files

DOCUMENTS = 64
KEPT = Path("runs/try")
"""Where the log-losses of unchanged artifacts are kept."""


@dataclass(frozen=True)
class Attempt:
    """The score of an artifact with changes, and of the same one without."""

    record: Record
    losses: Losses
    base: Losses | None
    """Of the unchanged artifact; None: nothing was changed, or it has no score."""
    no_base: str | None
    """Why the unchanged artifact has no score."""
    bytes: int
    """Of the unchanged artifact."""
    changed_bytes: int | None
    """Of the changed one; None: more than its track allows."""


def attempt(
    path: Path,
    code: Path | None,
    changes: Mapping[str, Any],
    data: Path,
    options: Options,
    note: Callable[[str], object] = lambda sentence: None,
) -> Attempt:
    """Score the artifact at `path` with the code in `code` and the `changes` to its manifest.

    `options` say how; the text is the development text of `data`. `note` gets a sentence before what takes long. Raises
    Refused or EnvironmentBroken as a score ends, and UsageError for changes that cannot be.
    """
    found = artifact.read(path, rules.ARTIFACT_BYTES)
    members = _changed(found.members, code, changes)
    options = replace(options, development=True)
    dataset = open_dataset(data)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "artifact.zst"
        size = _pack(members, file)
        record, scored = _score(file, dataset, options)
    base, fault = None, None
    if members != found.members:
        name = f"{found.sha256[:16]}-{scored.data[:16]}-{find_device(options.device).replace(':', '')}.npz"
        base = _kept(KEPT / name, found.sha256, scored.data)
        if base is None:
            note("scoring the unchanged artifact too, once for these documents")
            try:
                base = _score(path, dataset, options)[1]
            except Refused as error:
                fault = str(error)
            else:
                KEPT.mkdir(parents=True, exist_ok=True)
                losses.write(base, KEPT / name)
    return Attempt(record, scored, base, fault, found.size, size)


def _changed(members: Mapping[str, bytes], code: Path | None, changes: Mapping[str, Any]) -> dict[str, bytes]:
    """The members with the source files of the folder `code` in place of those of the same names."""
    changed = dict(members)
    if code is not None:
        given = {name: data for name, data in source_files(code).items() if name != MANIFEST}
        if not given:
            raise UsageError(f"{code}: holds no source file to try")
        changed |= given
    before = json.loads(members[MANIFEST])
    if (fields := before | dict(changes)) != before:
        manifest = json.dumps(fields, indent=1, allow_nan=False).encode()
        try:
            artifact.parse_manifest(manifest)
        except Refused as error:
            raise UsageError(f"--set: {error}") from None
        changed[MANIFEST] = manifest
    return changed


def _pack(members: Mapping[str, bytes], path: Path) -> int | None:
    """Pack to be scored; returns the bytes, or None if they are too many.

    Weights often fill the limit, and a trainer would make room for more code. Here the trainer's own code does.
    """
    try:
        return artifact.pack(members, path, rules.ARTIFACT_BYTES)
    except Refused:
        artifact.pack({**members, "train.py": b""}, path, rules.ARTIFACT_BYTES)
        return None


def _score(path: Path, data: Dataset, options: Options) -> tuple[Record, Losses]:
    kept: list[Losses] = []
    record = score(path, data, options, kept.append)
    if record.status != "ok":
        raise (Refused if record.status == "refused" else EnvironmentBroken)(str(record.reason))
    return record, kept[0]


def _kept(path: Path, sha256: str, text: str) -> Losses | None:
    """What an earlier attempt kept of this artifact and this text, if it did."""
    try:
        found = losses.read(path)
    except UsageError:
        return None
    return found if (found.artifact, found.data) == (sha256, text) else None


def quarters(scored: Losses) -> list[float]:
    """Bits per byte of each quarter of the text, by where the middle of a document lies; NaN where none does."""
    middles = scored.sizes.cumsum() - scored.sizes / 2
    at = np.minimum(4 * middles // scored.sizes.sum(), 3).astype(np.int64)
    sizes = np.bincount(at, scored.sizes, 4)
    bits = np.bincount(at, scored.bits, 4)
    return [float(b / s) if s else math.nan for b, s in zip(bits, sizes, strict=True)]


def _difference(result: Attempt) -> tuple[float, float]:
    """Changed minus unchanged in bits per byte, and the half-width of its 95 % interval."""
    assert result.base is not None
    return paired_difference(result.base.bits, result.losses.bits, result.losses.sizes)


def as_json(result: Attempt) -> dict[str, Any]:
    """For programs."""
    record = result.record
    values: dict[str, Any] = {
        "bpb": record.bpb,
        "quarters": quarters(result.losses),
        "documents": record.documents,
        "text_bytes": record.bytes,
        "steps": record.steps,
        "seconds": {name: round(value, 3) for name, value in phases(record.seconds).items()},
        "artifact_bytes": result.bytes,
        "changed_bytes": result.changed_bytes,
        "unchanged": None,
        "no_unchanged": result.no_base,
        "difference": None,
        "half_interval": None,
    }
    if result.base is not None:
        values["unchanged"] = {"bpb": _bpb(result.base), "quarters": quarters(result.base)}
        values["difference"], values["half_interval"] = _difference(result)
    return {key: _finite(value) for key, value in values.items()}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bpb(scored: Losses) -> float:
    return float(scored.bits.sum()) / int(scored.sizes.sum())


def table(result: Attempt) -> str:
    """For people."""
    record, seconds = result.record, phases(result.record.seconds)
    assert record.data
    shown = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    changed = "too many" if result.changed_bytes is None else f"{result.changed_bytes:,}"
    scored = [_bpb(result.losses), *quarters(result.losses)]
    lines = [
        f"text         {printable(record.data.name)}, development text: {record.documents:,} documents, "
        f"{record.bytes:,} bytes",
        f"artifact     {result.bytes:,} bytes, with the changes {changed}",
        f"seconds      {sum(seconds.values()):.1f} ({shown})",
        "bpb                all   1st quarter   2nd quarter   3rd quarter   4th quarter",
    ]
    if result.base is None:
        lines.append(_row("score", scored))
    else:
        before = [_bpb(result.base), *quarters(result.base)]
        difference, half = _difference(result)
        rows = {"unchanged": before, "changed": scored}
        lines += [_row(name, values) for name, values in rows.items()]
        lines.append(_row("difference", [b - a for a, b in zip(before, scored, strict=True)], "+"))
        interval = "" if math.isnan(half) else f" ± {half:.4f} (95 %, over documents)"
        lines.append(f"changed - unchanged: {difference:+.4f} bpb{interval}")
    if result.no_base:
        lines.append(f"no comparison, since the unchanged artifact has no score: {result.no_base}")
    return "\n".join(lines)


def _row(name: str, values: list[float], sign: str = "") -> str:
    return f"{name:<12}{values[0]:{sign}10.4f}" + "".join(f"{value:{sign}14.4f}" for value in values[1:])
