"""The artifact: one zstd frame holding one POSIX (ustar) tar. Everything in it is hostile.

The reader is strict and complete: every byte of the file belongs to a member, to its padding or to the end
mark, and anything else is refused in one sentence that names the member and the rule. Nothing is written to
disk, and no code of the artifact runs here.
"""

import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import zstandard

from pgolf import rules
from pgolf.data.transforms import TRANSFORMS
from pgolf.errors import Refused, UsageError
from pgolf.files import open_regular, write_atomically

MANIFEST = "submission.json"
REQUIRED = (MANIFEST, "predict.py", "train.py")
RETIRED_FORMS = ("simple", "streaming")
DOCS = "docs/artifact.md"
LEVEL = 22  # of zstd
CODE_ENDINGS = (".py", ".cpp", ".cu", ".h")
TOKENIZER_ENDINGS = (".model", ".json", ".py")

_BLOCK = 512
_SOURCE_NAME = 100  # characters
_CHUNK = 1024  # one chunk of compressed input grows to at most 32 MiB, so the cap is checked in time


@dataclass(frozen=True)
class Training:
    """What train.py says about the run that made the artifact: declared, and checked only by running it again."""

    arguments: tuple[str, ...] = ()
    """Its command line, without files, track and seed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Manifest:
    """What `submission.json` declares. The scorer takes nothing from it on trust but names."""

    name: str
    author: str
    track: str
    vocab_size: int
    bos: int
    """Id of the token that begins each document and, as the next one's first token, ends it."""
    tokenizer: str
    """Member name of a SentencePiece model (.model), of a tokenizer.json (.json) or of a Python module (.py), or
    "bytes" (ids 0..255 are the bytes)."""
    form: str
    """"step": one token at a time in each lane, the form whose scores count; "window": whole windows, for practice."""
    transform: str | None = None
    """Name of one of the harness's reversible transforms, applied before the tokenizer."""
    lanes: int = 0
    """Step form: how many documents or parts are scored beside each other."""
    layout: str = "documents"
    """Step form: "documents": a lane takes the next document when one has ended; "parts": equal parts of the text."""
    context: int = 0
    """Window form: longest window in tokens."""
    window: str = "packed"
    """Window form: "packed": windows over the concatenated documents; "document": each document from its own start."""
    stride: int | None = None
    """Window form: how many new tokens each window scores; None: `context`, windows do not overlap."""
    packages: tuple[str, ...] = ()
    """Python packages that the submission imports beyond the standard library."""
    pgolf: str | None = None
    """Version of pgolf whose `pgolf.train` the artifact's train.py imports."""
    compiler: bool = False
    """Whether the sandbox is to have a C++ compiler (torch.compile on a CPU needs one)."""
    training: Training | None = None


@dataclass(frozen=True)
class Artifact:
    """A checked artifact, in memory."""

    sha256: str
    size: int
    """Bytes on disk."""
    manifest: Manifest
    members: Mapping[str, bytes]


def pack(members: Mapping[str, bytes], path: Path, limit: int) -> int:
    """Write `members` as an artifact and return its size in bytes; same members, same bytes.

    The result is read back before it takes its name. Raises Refused when it is over `limit` bytes or would be
    refused by `read`; nothing is left at `path` then.
    """
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in sorted(members.items()):
            try:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            except ValueError:
                raise Refused(f"{name}: this member name does not fit a POSIX tar; shorten it") from None
    raw = tar.getvalue()
    parameters = zstandard.ZstdCompressionParameters.from_level(LEVEL, source_size=len(raw), write_checksum=True)
    data = zstandard.ZstdCompressor(compression_params=parameters).compress(raw)
    parse(data, limit)
    write_atomically(path, data)
    return len(data)


def read(path: Path, limit: int) -> Artifact:
    """Read and check the artifact at `path`.

    Raises UsageError when there is no such file, Refused when it breaks a rule.
    """
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UsageError(f"{path}: no such artifact") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if size > limit or len(data) > limit:
        raise Refused(f"the artifact has {max(size, len(data)):,} bytes; the limit is {limit:,}")
    return parse(data, limit)


def parse(data: bytes, limit: int) -> Artifact:
    """Check the bytes of an artifact (see `read`)."""
    if len(data) > limit:
        raise Refused(f"the artifact has {len(data):,} bytes; the limit is {limit:,}")
    members = dict(tar_members(_decompress(data)))
    for name in REQUIRED:
        if name not in members:
            raise Refused(f"{name} is missing from the artifact")
    manifest = parse_manifest(members[MANIFEST])
    if len(data) > (own := rules.track(manifest.track).artifact_bytes):
        raise Refused(f"the artifact has {len(data):,} bytes; the limit of track {manifest.track} is {own:,}")
    if manifest.tokenizer != "bytes" and manifest.tokenizer not in members:
        raise Refused(f"{MANIFEST} names the tokenizer {manifest.tokenizer!r}, which is not in the artifact")
    return Artifact(hashlib.sha256(data).hexdigest(), len(data), manifest, members)


def _decompress(data: bytes) -> bytes:
    """Exactly one zstd frame, its output and its window bounded."""
    frame = zstandard.ZstdDecompressor(max_window_size=rules.ZSTD_WINDOW_BYTES).decompressobj()
    parts: list[bytes] = []
    total = offset = 0
    try:
        while offset < len(data) and not frame.eof:
            parts.append(frame.decompress(data[offset : offset + _CHUNK]))
            offset += _CHUNK
            total += len(parts[-1])
            if total > rules.UNPACKED_BYTES:
                raise Refused(f"the artifact unpacks to more than {rules.UNPACKED_BYTES:,} bytes")
    except zstandard.ZstdError as error:
        raise Refused(f"the artifact is not a sound zstd frame ({error})") from None
    if not frame.eof:
        raise Refused("the artifact is truncated: its zstd frame does not end")
    if frame.unused_data or offset < len(data):
        raise Refused("the artifact has bytes after the end of its zstd frame")
    return b"".join(parts)


def tar_members(tar: bytes) -> Iterator[tuple[str, bytes]]:
    """The regular files of a tar, each name checked."""
    seen: dict[str, bool] = {}  # name -> is it a folder
    offset = 0
    while tar[offset : offset + _BLOCK].strip(b"\0"):
        name, size, is_folder = _tar_header(tar[offset : offset + _BLOCK], offset)
        if len(seen) >= rules.MEMBERS:
            raise Refused(f"{name}: the artifact has more than {rules.MEMBERS} members")
        if name in seen:
            raise Refused(f"{name}: the artifact holds this member twice")
        parents = ["/".join(name.split("/")[:depth]) for depth in range(1, name.count("/") + 1)]
        if any(seen.get(parent) is False for parent in parents):
            raise Refused(f"{name}: one of its folders is a file of the artifact")
        if not is_folder and any(other.startswith(name + "/") for other in seen):
            raise Refused(f"{name}: is a folder of the artifact and a file")
        seen[name] = is_folder
        start, end = offset + _BLOCK, offset + _BLOCK + size
        offset = end + -size % _BLOCK
        if offset > len(tar):
            raise Refused(f"{name}: the tar ends inside this member")
        if tar[end:offset].strip(b"\0"):
            raise Refused(f"{name}: bytes are hidden in the padding after this member")
        if not is_folder:
            yield name, tar[start:end]
    if len(tar) - offset < 2 * _BLOCK or len(tar) % _BLOCK:
        raise Refused("the tar ends without its end mark of two zero blocks")
    if tar[offset:].strip(b"\0"):
        raise Refused("bytes are hidden after the tar's end mark")


def _tar_header(header: bytes, offset: int) -> tuple[str, int, bool]:
    """Name, size in bytes, and whether it is a folder, of one ustar header."""
    where = f"the tar header at byte {offset}"
    if len(header) < _BLOCK:
        raise Refused(f"{where} is cut off")
    if header[257:265] != b"ustar\x0000":
        raise Refused(f"{where} is not POSIX ustar; pack with `pgolf pack` or `tar --format=ustar`")
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _octal(header[148:156], where) != checksum:
        raise Refused(f"{where} has a wrong checksum")
    parts = [header[345:500], header[:100]]
    raw = b"/".join(part.split(b"\0", 1)[0] for part in parts if part[0])
    kind = header[156:157]
    if kind not in (b"0", b"\0", b"5"):
        raise Refused(
            f"{raw.decode(errors='replace')!r}: only regular files and folders may be in an artifact, "
            f"not tar type {kind!r}"
        )
    name = _member_name(raw, where)
    size = _octal(header[124:136], name)
    if kind == b"5" and size:
        raise Refused(f"{name}: a folder with contents of its own")
    return name, size, kind == b"5"


def _octal(field: bytes, where: str) -> int:
    if not (match := re.fullmatch(rb" *([0-7]+)[ \0]*", field)):
        raise Refused(f"{where}: a number of the tar header is not octal")
    return int(match[1], 8)


def _member_name(raw: bytes, where: str) -> str:
    """A relative path without tricks; a folder's closing slash is dropped."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"{where}: the member name {raw!r} is not UTF-8") from None
    if not name.isprintable() or "\\" in name:
        raise Refused(f"{name!r}: control characters and backslashes are not allowed in member names")
    name = name.removesuffix("/")
    if name.startswith("/"):
        raise Refused(f"{name}: absolute paths are not allowed")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise Refused(f"{name!r}: empty, '.' and '..' path parts are not allowed")
    if is_code(name) and not re.fullmatch(rf"[\w./-]{{1,{_SOURCE_NAME}}}", name, re.ASCII):  # a trainer gets it
        raise Refused(
            f"{name!r:.120}: the name of a source file may have {_SOURCE_NAME} characters: letters, digits, '_', '-', "
            "'.' and '/'"
        )
    return name


def parse_manifest(data: bytes) -> Manifest:
    """Check every field of `submission.json`; an unknown one is refused, since it is most likely a slip."""
    if len(data) > rules.MANIFEST_BYTES:
        raise Refused(f"{MANIFEST} has {len(data):,} bytes; the limit is {rules.MANIFEST_BYTES:,}")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(f"{MANIFEST} is not JSON") from None
    if not isinstance(values, dict):
        raise Refused(f"{MANIFEST} is not a JSON object")
    values = {key: value for key, value in values.items() if value is not None}
    form = values.get("form", "simple")
    if form in RETIRED_FORMS:
        raise Refused(
            f"{MANIFEST}: the form {form!r} is retired; train it again with this pgolf, or repack it ({DOCS})"
        )
    _require("form", values, form in ("step", "window"))
    known = {field.name for field in fields(Manifest)}
    if unknown := sorted(set(values) - known):
        raise Refused(f"{MANIFEST}: unknown field {unknown[0]!r:.60}; known are {', '.join(sorted(known))}")
    for key in ("context", "window", "stride") if form == "step" else ("lanes", "layout"):
        if key in values:
            raise Refused(f"{MANIFEST}: {key} has no meaning in the {form} form; leave it out")
    for key in ("name", "author", "track", "tokenizer"):
        value = values.get(key)
        _require(key, values, isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable())
    _require("track", values, values["track"] in rules.TRACKS)
    _require("tokenizer", values, values["tokenizer"].endswith(TOKENIZER_ENDINGS) or values["tokenizer"] == "bytes")
    _require("transform", values, values.get("transform") in (None, *TRANSFORMS))
    _require("vocab_size", values, _is_int(values.get("vocab_size"), 2, rules.VOCAB_SIZE))
    _require("bos", values, _is_int(values.get("bos"), 0, values["vocab_size"] - 1))
    if values["tokenizer"] == "bytes":
        _require("bos", values, values["bos"] >= 256)
    _require(
        "pgolf", values, isinstance(v := values.get("pgolf", "-"), str) and bool(re.fullmatch(r"[\w.+-]{1,100}", v))
    )
    _require("compiler", values, isinstance(values.get("compiler", False), bool))
    packages = values.get("packages", [])
    _require("packages", values, isinstance(packages, list) and len(packages) <= 100)
    _require("packages", values, all(isinstance(p, str) and re.fullmatch(r"[\w.-]{1,100}", p) for p in packages))
    (_check_step_form if form == "step" else _check_window_form)(values)
    values["training"] = _training(values)
    return Manifest(**{**values, "packages": tuple(packages)})


def _training(values: dict[str, Any]) -> Training | None:
    """The field `training`, checked."""
    given = values.get("training")
    if given is None:
        return None
    _require("training", values, isinstance(given, dict) and set(given) <= {f.name for f in fields(Training)})
    arguments, settings = given.get("arguments", []), given.get("settings", {})
    counts = {name: given.get(name, 0) for name in ("steps", "tokens", "parameters")}
    _require("training", values, isinstance(arguments, list) and isinstance(settings, dict))
    _require("training", values, all(_is_text(t) for t in [*arguments, *settings]))
    _require("training", values, all(_is_text(v) or _is_number(v) or v is None for v in settings.values()))
    _require("training", values, all(_is_int(count, 0, 1 << 62) for count in counts.values()))
    return Training(tuple(arguments), settings, **counts)


def _check_step_form(values: dict[str, Any]) -> None:
    _require("lanes", values, _is_int(values.get("lanes"), 1, rules.LANES))
    _require("layout", values, values.get("layout", "documents") in ("documents", "parts"))
    if values["vocab_size"] * values["lanes"] > rules.LOGITS:
        raise Refused(f"{MANIFEST}: vocab_size times lanes is over {rules.LOGITS:,}")


def _check_window_form(values: dict[str, Any]) -> None:
    _require("context", values, _is_int(values.get("context"), 1, rules.CONTEXT))
    if values["vocab_size"] * values["context"] > rules.LOGITS:
        raise Refused(f"{MANIFEST}: vocab_size times context is over {rules.LOGITS:,}")
    _require("stride", values, _is_int(values.get("stride", 1), 1, values["context"]))
    _require("window", values, values.get("window", "packed") in ("packed", "document"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200 and value.isprintable()


def _is_number(value: Any) -> bool:
    return (isinstance(value, int) and abs(value) < 1 << 63) or (isinstance(value, float) and math.isfinite(value))


def _is_int(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _require(key: str, values: dict[str, Any], holds: bool) -> None:
    if not holds:
        shown = f"{values[key]!r:.60}" if key in values else "missing"
        raise Refused(f"{MANIFEST}: {key} is {shown}, which the format does not allow ({DOCS})")


def is_code(name: str) -> bool:
    """Whether a file of that name is code."""
    return name.endswith(CODE_ENDINGS)


def is_source(name: str) -> bool:
    """Whether train.py needs a member of that name to train again: code and manifest, never weights or other blobs."""
    return is_code(name) or name == MANIFEST


def sources(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """The members that a trainer gets."""
    return {name: data for name, data in members.items() if is_source(name)}


def code_in(folder: Path) -> dict[str, bytes]:
    """The code that lies in a folder, without what editors hide there."""
    paths = (path for path in folder.glob("[!.]*") if is_code(path.name) and path.is_file())
    return {path.name: path.read_bytes() for path in paths}


def source_bytes(sources: Mapping[str, bytes]) -> int:
    """Their size with that of their names, which train.py can read as well."""
    return sum(len(name.encode()) + len(data) for name, data in sources.items())
