"""What an entry claims against the evidence in its folder: records, logs, code. And the claim, filled in from them."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pgolf import entry, rules
from pgolf.artifact import Artifact, is_code
from pgolf.entry import Entry, Packed, Seed
from pgolf.errors import Refused, UsageError
from pgolf.files import open_regular, printable, read_regular
from pgolf.score import losses, record
from pgolf.score.record import Record
from pgolf.submission.findings import ERROR, WARNING, Finding

ENOUGH_SEEDS = 3
_ROUNDING = 5e-5  # bpb: a claim may be rounded to four digits
_LARGEST = 1 << 53  # of a record's figures
_WORDS = 300  # characters that a finding takes from a record
_LINE_BYTES = 1 << 16  # of a log's first line
_FILL = "`pgolf check FOLDER --write` fills it in from the records"
_AGAIN = "score that artifact again with this pgolf"


def fill(folder: Path) -> Entry:
    """Put the artifact's size and digest and the records' scores into submission.json.

    A record's file name ends with its seed: records/1.score.json; its log is logs/1.jsonl. Raises Refused, naming the
    file, for a record that is none, and what `entry.read` does.
    """
    files = entry.listing(folder)
    if entry.FILE not in files:
        raise UsageError(f"{folder}: holds no {entry.FILE}; `pgolf new` makes a submission's folder")
    old = entry.parse(read_regular(folder / entry.FILE, rules.MANIFEST_BYTES))
    seeds = tuple(_seeds(folder, files))
    filled = replace(
        old,
        artifact=_packed(folder, files, old.artifact),
        seeds=seeds,
        bpb=round(fmean(seed.bpb for seed in seeds), 6) if seeds else None,
    )
    entry.write(folder, filled)
    return entry.read(folder)


def _packed(folder: Path, files: set[str], old: Packed) -> Packed:
    name = entry.ARTIFACT if entry.ARTIFACT in files else old.file
    if name is None or name not in files:
        return replace(old, file=None)  # it lies elsewhere, or is not trained yet
    try:
        data = read_regular(folder / name, rules.ARTIFACT_BYTES)
    except OSError as error:
        raise Refused(f"{name}: {error.strerror}") from None
    return Packed(name, hashlib.sha256(data).hexdigest(), len(data))


def _seeds(folder: Path, files: set[str]) -> Iterator[Seed]:
    found: dict[int, str] = {}
    for name in sorted(files):
        if match := re.fullmatch(rf"{entry.RECORDS}/((?:[^/]*\D)?(\d{{1,18}}))(?:\.score)?\.json", name):
            seed = int(match[2])
            if seed in found:
                raise Refused(f"{name} and {found[seed]} are both of seed {seed}; leave one")
            found[seed] = name
            result = _record(folder / name)
            if isinstance(result, str):
                raise Refused(f"{name}: {result}; score again, or leave it out")
            if result.bpb is None or result.status != "ok":
                raise Refused(
                    f"{name}: is not of a finished score ({result.status[:20]}); score again, or leave it out"
                )
            log = f"{entry.LOGS}/{match[1]}.jsonl"
            yield Seed(seed, result.bpb, name, log if log in files else None)


def findings(folder: Path, found: Entry, packed: Artifact | None, text: str) -> Iterator[Finding]:
    """What does not fit together. `packed`: the artifact where it is in the folder; `text`: digest of the data's."""
    yield from _incomplete(folder, found)
    if packed is not None:
        yield from _artifact(folder, found, packed)
    records: list[tuple[Seed, Record]] = []
    for seed in found.seeds:
        result = _record(folder / seed.record)
        if isinstance(result, str):
            yield Finding("record", ERROR, seed.record, None, result, "score again; change no record by hand")
            continue
        records.append((seed, result))
        yield from _one(folder, found, seed, result)
        yield from _log(folder, seed)
    yield from _all(found, records, text)


def _incomplete(folder: Path, found: Entry) -> Iterator[Finding]:
    if found.artifact.sha256 is None:
        what, remedy = "there is no artifact yet", "train one (AGENTS.md), put it there as artifact.zst; " + _FILL
        yield Finding("artifact-missing", ERROR, entry.FILE, None, what, remedy)
    elif found.artifact.file is None:
        what = "the artifact lies elsewhere, so nothing of it is checked"
        yield Finding("artifact-elsewhere", WARNING, entry.FILE, None, what, "check it by its own path")
    if not found.blurb:
        what = "the blurb is empty"
        yield Finding("blurb-missing", WARNING, entry.FILE, None, what, "say in a line what is new about it")
    if not (folder / "README.md").is_file():
        what = "README.md is missing"
        yield Finding("readme-missing", WARNING, None, None, what, "describe the idea and what it is worth")
    if not found.seeds:
        severity = WARNING if found.bpb is None else ERROR
        what = "claims no score yet" if found.bpb is None else f"claims {found.bpb:.4f} bpb without a record"
        yield Finding("record-missing", severity, entry.FILE, None, what, f"put records into {entry.RECORDS}/; {_FILL}")
    elif len(found.seeds) < ENOUGH_SEEDS:
        what = f"{len(found.seeds)} of at least {ENOUGH_SEEDS} seeds"
        yield Finding("few-seeds", WARNING, entry.FILE, None, what, "train and score further seeds")


def _artifact(folder: Path, found: Entry, packed: Artifact) -> Iterator[Finding]:
    manifest, file = packed.manifest, found.artifact.file
    if manifest.track != found.track:
        what = f"the artifact is of track {manifest.track}, the entry of track {found.track}"
        yield Finding("track-differs", ERROR, file, None, what, "train with --track, or mend the entry")
    for field in ("name", "author"):
        inside, outside = getattr(manifest, field), getattr(found, field)
        if inside != outside:
            what = f"{field} is {inside!r} in the artifact and {outside!r} in the entry"
            yield Finding("name-differs", WARNING, entry.FILE, None, what, "write the same name into both")
    own = {name: data for name, data in packed.members.items() if is_code(name)}
    code = folder / entry.CODE
    for name in sorted(own):
        try:
            same = read_regular(code / name, rules.UNPACKED_BYTES) == own[name]
        except OSError:
            same = False
        if not same:
            what = f"{printable(name)} is not what the artifact holds, which is what counts"
            yield Finding(
                "code-differs", WARNING, f"{entry.CODE}/{name}", None, what, "train again, or restore the file"
            )


def _one(folder: Path, found: Entry, seed: Seed, result: Record) -> Iterator[Finding]:
    """A record by itself, and against the entry."""

    def finding(rule: str, what: str, remedy: str, severity: str = ERROR) -> Finding:
        return Finding(rule, severity, seed.record, None, what[:_WORDS], remedy)

    if result.status != "ok" or result.bpb is None:
        yield finding("record-unfinished", f"its status is {result.status}: {result.reason}", "mend that, score again")
        return
    if fault := _edited(result, folder / seed.record):
        yield finding("record-edited", f"{fault}, so it was not written by a score", _AGAIN)
    if result.rules != rules.VERSION:
        what = f"is of rules version {result.rules}, this is version {rules.VERSION}: such scores are not compared"
        yield finding("record-rules", what, _AGAIN)
    if result.track != found.track:
        yield finding("record-track", f"is of track {result.track}, the entry of track {found.track}", _AGAIN)
    if not result.eligible:
        first, more = result.reasons[:1] or ("no reason given",), len(result.reasons) - 1
        what = f"does not count: {first[0]}" + (f", and {more} more" if more > 0 else "")
        yield finding("record-practice", what, "see `pgolf doctor`, and docs/security.md", WARNING)
    if abs(result.bpb - seed.bpb) > _ROUNDING:
        what = f"says {result.bpb:.6f} bpb, the entry {seed.bpb:.6f} for seed {seed.seed}"
        yield finding("claim-differs", what, _FILL)


def _edited(result: Record, path: Path) -> str | None:
    """Why the figures of a record cannot have been written together; None when they agree."""
    if fault := record.contradiction(result):
        return fault
    if losses.path(path).is_file():
        try:
            each = losses.read(losses.path(path))
        except UsageError as error:
            return str(error)
        if each.artifact != result.artifact.sha256:
            return "the losses beside it are of another artifact"
        if not math.isclose(float(each.bits.sum()), (result.bpb or 0) * (result.bytes or 0), rel_tol=1e-6):
            return "the losses beside it have another sum"
    return None


def _log(folder: Path, seed: Seed) -> Iterator[Finding]:
    if seed.log is None:
        what = f"seed {seed.seed} has no training log"
        yield Finding("log-missing", WARNING, seed.record, None, what, f"put it into {entry.LOGS}/; {_FILL}")
        return
    said = _first_line(folder / seed.log).get("seed", seed.seed)
    if said != seed.seed:
        what = f"is of seed {printable(said)[:40]}, the entry says {seed.seed}"
        yield Finding("log-differs", ERROR, seed.log, 1, what, "name record and log by the seed of the training")


def _all(found: Entry, records: list[tuple[Seed, Record]], text: str) -> Iterator[Finding]:
    """The records together."""
    claimed = found.bpb
    if found.seeds and claimed is not None:
        mean = fmean(seed.bpb for seed in found.seeds)
        if abs(mean - claimed) > _ROUNDING:
            what = f"claims {claimed:.6f} bpb, the mean of its seeds is {mean:.6f}"
            yield Finding("claim-mean", ERROR, entry.FILE, None, what, _FILL)
    if found.seeds and claimed is None:
        yield Finding("claim-missing", WARNING, entry.FILE, None, "has records, but claims no score", _FILL)
    digests = [str(result.artifact.sha256) for _, result in records]
    if digests and found.artifact.sha256 and found.artifact.sha256 not in digests:
        what = "none of the records is of the artifact"
        yield Finding("record-artifact", ERROR, entry.FILE, None, what, "score the artifact; its record is one of them")
    first: dict[str, Seed] = {}
    for (seed, _), digest in zip(records, digests, strict=True):
        if digest in first:
            what = f"is of the same artifact as {first[digest].record}: equal artifacts count once"
            yield Finding("record-twice", ERROR, seed.record, None, what, "train each seed and score what it gives")
        first.setdefault(digest, seed)
    texts = {result.data.sha256: seed.record for seed, result in records if result.data}
    if len(texts) > 1:
        what = f"are of different texts: {' and '.join(sorted(texts.values())[:2])}"
        yield Finding("record-texts", ERROR, entry.FILE, None, what, "score all seeds on one text")
    elif texts and text not in texts:
        what = "the records are of another text than the data that this check has"
        yield Finding("record-data", WARNING, entry.FILE, None, what, "check with --data of the text that was scored")


def _record(path: Path) -> Record | str:
    """The record, or what is wrong with it."""
    try:
        result = record.read(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError:
        return "is no record of a score by this version"
    figures = result.bpb, result.nats_per_token, result.tokens, result.bytes
    if any(figure is not None and not 0 <= figure <= _LARGEST for figure in figures):
        return "has figures that no score has"
    return result


def _first_line(path: Path) -> dict[str, Any]:
    """What the first line of a training log says; empty when it says nothing."""
    try:
        with open_regular(path) as file:
            values = json.loads(file.readline(_LINE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
