"""A submission as its author sends it: a folder with an artifact, its claimed score and what the claim rests on.

`submission.json` in it is the entry (docs/submission.schema.json). The artifact holds another file of that name, its
manifest. Everything in the folder is hostile, and what the entry says is a claim: this reads it, compares size and
digest of the artifact with the file, and leaves records to `submission.claims`.
"""

import hashlib
import json
import os
import re
import stat
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from pgolf import rules
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import read_regular, write_atomically

FILE = "submission.json"
FORMAT = "pgolf-entry-1"
DOCS = "docs/participants.md"
ARTIFACT, CODE, RECORDS, LOGS = "artifact.zst", "code", "records", "logs"
SCRATCH = "runs"
"""A folder that belongs to its author, not to the submission; nobody looks into it."""

_NAME, _BLURB, _PATH, _URL = 100, 500, 200, 500  # characters
_DEPTH = 1000  # characters of the longest path that is walked, far below what the system can open
_BPB = 1000.0  # worse than any model
_SEED = 2**63 - 1


@dataclass(frozen=True)
class Packed:
    """The artifact. All None: not trained yet."""

    file: str | None
    """Its place in the folder; None: it lies elsewhere, or nowhere yet."""
    sha256: str | None
    bytes: int | None
    url: str | None = None
    """Where it lies if not in the folder. Nothing is ever fetched from there."""


@dataclass(frozen=True)
class Seed:
    """One training and its score."""

    seed: int
    bpb: float
    record: str
    """Place of the score's record in the folder."""
    log: str | None
    """Place of the training log in the folder."""


@dataclass(frozen=True)
class Entry:
    """The fields of submission.json."""

    format: str
    name: str
    author: str
    track: str
    date: str
    """YYYY-MM-DD."""
    blurb: str
    """What it is, in a line."""
    artifact: Packed
    bpb: float | None
    """The claim: mean over the seeds. None: no claim yet."""
    seeds: tuple[Seed, ...] = ()


def is_entry(folder: Path) -> bool:
    """Whether `folder` is a submission's rather than one to be packed: its submission.json has an entry's format."""
    try:
        values = json.loads(read_regular(folder / FILE, rules.MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and str(values.get("format")).startswith("pgolf-entry-")


def read(folder: Path) -> Entry:
    """The entry of a submission's folder; all that it says about files of the folder is true.

    Raises UsageError when there is no such folder, EnvironmentBroken when it cannot be read, and Refused, naming the
    field or the file, when it breaks the format.
    """
    files = listing(folder)
    if FILE not in files:
        raise Refused(f"{folder}: holds no {FILE}; `pgolf new` makes a submission's folder")
    entry = parse(_read(folder / FILE, rules.MANIFEST_BYTES))
    named = [("artifact.file", entry.artifact.file)]
    for number, each in enumerate(entry.seeds):
        named += [(f"seeds[{number}].record", each.record), (f"seeds[{number}].log", each.log)]
    for field, name in named:
        _require(name is None or name in files, field, name, "a file in the folder")
    if entry.artifact.file is not None:
        _compare(folder / entry.artifact.file, entry.artifact)
    return entry


def artifact_file(folder: Path) -> Path:
    """The artifact in a submission's folder, whose entry is read and checked. Raises what `read` does."""
    packed = read(folder).artifact
    if packed.file is None:
        where = f"lies at {packed.url}; put it into the folder and name it" if packed.url else "is not there yet"
        raise Refused(f"{FILE}: artifact.file is missing: the artifact {where}")
    return folder / packed.file


def write(folder: Path, entry: Entry) -> None:
    """Write the entry's submission.json atomically. Raises Refused for what `parse` would refuse, and OSError."""
    write_atomically(folder / FILE, encode(entry))


def encode(entry: Entry) -> bytes:
    """The entry as JSON. Raises Refused for what `parse` would refuse."""
    values = asdict(entry)
    if entry.artifact.url is None:
        del values["artifact"]["url"]
    data = (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogatepass")
    parse(data)
    return data


def parse(data: bytes) -> Entry:
    """Check every field of a submission.json; an unknown one is refused, since it is most likely a slip."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(f"{FILE} is not JSON ({DOCS})") from None
    _fields(values, Entry, "")
    _require(values["format"] == FORMAT, "format", values["format"], f'"{FORMAT}"')
    for field, most in (("name", _NAME), ("author", _NAME), ("blurb", _BLURB)):
        _require_text(field, values[field], most, least=field != "blurb")
    _require(values["track"] in [*rules.TRACKS], "track", values["track"], f"one of {', '.join(rules.TRACKS)}")
    _require(_is_date(values["date"]), "date", values["date"], "a date such as 2026-05-01")
    _require(values["bpb"] is None or _is_bpb(values["bpb"]), "bpb", values["bpb"], "null or a positive number")
    seeds = values.get("seeds", [])
    _require(
        isinstance(seeds, list) and len(seeds) <= rules.ENTRY_SEEDS,
        "seeds",
        seeds,
        f"a list of at most {rules.ENTRY_SEEDS}",
    )
    found = tuple(_seed(each, f"seeds[{number}].") for number, each in enumerate(seeds))
    numbers = [each.seed for each in found]
    twice = [number for number in numbers if numbers.count(number) > 1]
    _require(not twice, "seeds", twice, "a list without duplicates")
    return Entry(**{**values, "artifact": _packed(values["artifact"]), "seeds": found})


def _packed(values: Any) -> Packed:
    _fields(values, Packed, "artifact.")
    _require_path("artifact.file", values["file"], optional=True)
    digest, size, url = values["sha256"], values["bytes"], values.get("url")
    known = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
    _require(digest is None or known, "artifact.sha256", digest, "null or 64 hexadecimal digits in lower case")
    limit = rules.ARTIFACT_BYTES
    _require(size is None or _is_int(size, 1, limit), "artifact.bytes", size, f"null or a number from 1 to {limit:,}")
    _require((size is None) == (digest is None), "artifact.bytes", size, "given or null together with artifact.sha256")
    _require(values["file"] is None or known, "artifact.sha256", digest, "given, since artifact.file is")
    if url is not None:
        _require_text("artifact.url", url, _URL)
        _require(re.fullmatch(r"https?://\S+", url) is not None, "artifact.url", url, "an http or https address")
    return Packed(**values)


def _seed(values: Any, where: str) -> Seed:
    _fields(values, Seed, where)
    _require(_is_int(values["seed"], 0, _SEED), f"{where}seed", values["seed"], f"a number from 0 to {_SEED}")
    _require(_is_bpb(values["bpb"]), f"{where}bpb", values["bpb"], "a positive number")
    _require_path(f"{where}record", values["record"])
    _require_path(f"{where}log", values["log"], optional=True)
    return Seed(**values)


def _fields(values: Any, kind: Any, where: str) -> None:
    """`values` is an object with the fields of the dataclass `kind`; those with a default may be missing."""
    _require(isinstance(values, dict), where.rstrip(".") or "the file", values, "a JSON object")
    known = {field.name: field.default is MISSING for field in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise Refused(f"{FILE}: unknown field {where + unknown[0]!r:.60}; known are {', '.join(known)}")
    for name, needed in known.items():
        if needed and name not in values:
            raise Refused(f"{FILE}: {where}{name} is missing ({DOCS})")


def _require(holds: bool, field: str, value: Any, rule: str) -> None:
    if not holds:
        raise Refused(f"{FILE}: {field} is {value!r:.60}, but has to be {rule} ({DOCS})")


def _require_text(field: str, value: Any, most: int, least: int = 1) -> None:
    holds = isinstance(value, str) and least <= len(value) <= most and value.isprintable()
    _require(holds, field, value, f"text of {int(least)} to {most} characters, in one line, without control characters")


def _require_path(field: str, value: Any, optional: bool = False) -> None:
    if value is None and optional:
        return
    _require_text(field, value, _PATH)
    holds = "\\" not in value and all(part not in ("", ".", "..") for part in value.split("/"))
    _require(holds, field, value, "a relative file name without '.' and '..'")


def _is_int(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_bpb(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _BPB


def _is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def listing(folder: Path) -> set[str]:
    """Names of the files in a submission's folder, hidden ones too, as many and as large as it may hold.

    Raises what `read` does.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found: set[str] = set()
    total = entries = 0
    waiting = [folder]
    while waiting:
        for path in _scan(waiting.pop()):
            name = path.relative_to(folder).as_posix()
            if name == SCRATCH:
                continue
            status = path.lstat()
            entries += 1
            if entries > rules.ENTRY_FILES:
                raise Refused(
                    f"{folder}: holds more than {rules.ENTRY_FILES} files and folders; send what is asked for"
                )
            if len(name) > _DEPTH:
                raise Refused(f"{folder}: holds a path of more than {_DEPTH:,} characters; use shorter names")
            if stat.S_ISDIR(status.st_mode):
                waiting.append(path)
                continue
            if not stat.S_ISREG(status.st_mode):
                raise Refused(f"{path}: is no regular file; put the file itself in its place")
            total += status.st_size
            if total > rules.ENTRY_BYTES:
                raise Refused(f"{folder}: holds more than {rules.ENTRY_BYTES:,} bytes; leave out what is not asked for")
            found.add(name)
    return found


def _scan(folder: Path) -> list[Path]:
    """What is in a folder, of a hostile one no more than is needed to refuse it."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found.append(Path(entry))
                if len(found) > rules.ENTRY_FILES:
                    break
    except OSError as error:
        raise EnvironmentBroken(f"{folder}: cannot be read ({error.strerror})") from None
    return found


def _compare(path: Path, packed: Packed) -> None:
    data = _read(path, rules.ARTIFACT_BYTES)
    if len(data) != packed.bytes:
        raise Refused(
            f"{FILE}: artifact.bytes is {packed.bytes:,}, but {packed.file} has {len(data):,} bytes ({_MEND})"
        )
    if (digest := hashlib.sha256(data).hexdigest()) != packed.sha256:
        raise Refused(f"{FILE}: artifact.sha256 is {packed.sha256}, but that of {packed.file} is {digest} ({_MEND})")


_MEND = "`pgolf check FOLDER --write` fills them in"


def _read(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise Refused(f"{path}: has {size:,} bytes; the limit is {limit:,}")
        return read_regular(path, limit)
    except OSError as error:
        raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror})") from None
