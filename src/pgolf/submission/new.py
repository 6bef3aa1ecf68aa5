"""Make a submission's folder: code to begin with, an empty entry, a README to fill in, and AGENTS.md."""

import getpass
import json
import os
import re
import unicodedata
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import pgolf
from pgolf import artifact, entry, rules
from pgolf.entry import Entry, Packed
from pgolf.errors import Refused, UsageError
from pgolf.files import create_folder
from pgolf.submission.folder import source_files

BASELINES = "golf", "naive"
_TEMPLATES = Path(__file__).parent / "templates"
_PAGES = "README.md", "AGENTS.md"
_IGNORED = f"{entry.SCRATCH}/\n__pycache__/\n"


def new(name: str, source: str, track: str, author: str | None = None, out: Path | None = None) -> Path:
    """Make the folder and return its path. `source`: a baseline, a folder with train.py, a submission, an artifact.

    `author` None: the login name; `out` None: submissions/<date>_<name>. Raises UsageError when something lies there
    already or `source` is none of these, Refused when an artifact breaks the format.
    """
    today = date.today().isoformat()
    out = out or Path("submissions") / f"{today}_{slug(name)}"
    if os.path.lexists(out):
        raise UsageError(f"{out}: exists already; choose another name or --out")
    author = author or login_name()
    blank = Entry(entry.FORMAT, name, author, track, today, "", Packed(None, None, None), None)
    try:
        encoded = entry.encode(blank)
    except Refused as error:
        raise UsageError(str(error).removeprefix(f"{entry.FILE}: ")) from None
    code = _named(_code(source), source, name, author)
    limits = rules.track(track)
    words = {
        "NAME": name,
        "AUTHOR": author,
        "TRACK": track,
        "SOURCE": f"the baseline {source}" if source in BASELINES else Path(source).name,
        "ARTIFACT_BYTES": f"{limits.artifact_bytes:,}",
        "PREPARE_SECONDS": f"{limits.prepare_seconds:g} s",
        "TRAIN_SECONDS": f"{limits.train_seconds:g} s on {limits.hardware}" if limits.train_seconds else "no limit",
        "EVAL_SECONDS": f"{limits.eval_seconds:g} s",
        "SOURCE_BYTES": f"{limits.source_bytes:,}",
    }
    files = {f"{entry.CODE}/{member}": data for member, data in code.items()}
    files |= {page: _filled((_TEMPLATES / page).read_text(encoding="utf-8"), words) for page in _PAGES}
    files |= {entry.FILE: encoded, ".gitignore": _IGNORED.encode()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with create_folder(out) as made:
        for member, data in files.items():
            (made / member).parent.mkdir(parents=True, exist_ok=True)
            (made / member).write_bytes(data)
        for folder in (entry.SCRATCH, entry.RECORDS, entry.LOGS):
            (made / folder).mkdir()
    return out


def login_name() -> str:
    """The user's login name. Raises UsageError when there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        raise UsageError("--author is missing, and this user has no login name") from None


def slug(name: str) -> str:
    """A name for a folder: lower-case ASCII letters, digits and hyphens. Raises UsageError when nothing is left."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    short = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:50].rstrip("-")
    if not short:
        raise UsageError(f"the name {name!r:.60} has no ASCII letter or digit for the folder's name; give --out")
    return short


def _code(source: str) -> dict[str, bytes]:
    """The source files to begin with, by their names in code/."""
    path = _baseline(source) if source in BASELINES else Path(source)
    if path.is_dir():
        if entry.is_entry(path):
            path /= entry.CODE
        found = source_files(path)
    elif path.is_file():
        members = artifact.read(path, rules.ARTIFACT_BYTES).members
        found = artifact.sources(members)
    else:
        raise UsageError(f"--from {source}: is neither {' nor '.join(BASELINES)}, nor a folder, nor an artifact")
    if "train.py" not in found:
        raise UsageError(f"--from {source}: holds no train.py")
    return found


def _baseline(name: str) -> Path:
    """The folder of a baseline, which an installed pgolf does not have."""
    for root in (Path(pgolf.__file__).parents[2], Path()):
        if (folder := root / "baselines" / name).is_dir():
            return folder
    raise UsageError(
        f"--from {name}: the baselines come with a checkout, not with an installed pgolf; run this in a checkout, or "
        "name a folder or an artifact"
    )


def _named(code: dict[str, bytes], source: str, name: str, author: str) -> dict[str, bytes]:
    """The code, with the submission's name and author for its artifacts in place of a baseline's."""
    quoted = [json.dumps(words, allow_nan=False) for words in (name, author)]
    before, after = f'"{source} baseline"'.encode(), f"{quoted[0]}, author={quoted[1]}".encode()
    if code["train.py"].count(before) != 1:
        return code
    return code | {"train.py": code["train.py"].replace(before, after)}


def _filled(template: str, words: Mapping[str, str]) -> bytes:
    return re.sub(r"\{([A-Z_]+)\}", lambda match: words[match[1]], template).encode()
