"""Where documents come from: JSONL, parquet and text files, and hub datasets.

A source is read in batches of about a megabyte that are not parsed yet, so the process that reads stays ahead of
those that tokenise. Documents are numbered through all sources in order; that number is how a build that was
interrupted finds its place again.
"""

import importlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import zstandard

from pgolf.data.dataset import file_digest
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import HIDDEN, LINKED, list_files, open_regular, printable

DOCUMENT_BYTES = 64 * 1024 * 1024  # longest document; a longer one is most likely not one document

_BLOCK_BYTES = 1 << 20
_ROWS = 256
_ZSTD_BYTES = 1 << 12  # compressed, at a time: they grow to at most 128 MiB
_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` asks for
_TEXTS = (".txt", ".txt.gz", ".txt.zst")
_EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", *_TEXTS)
_GLOB = re.compile(r"[*?[]")
_UNKNOWN = "of an unknown extension"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Batch:
    """Neighbouring documents of one source."""

    where: str
    """File or hub name, for messages."""
    unit: str
    """What a document is there: "line", "row" or "document"."""
    first: int
    """Number of the first document in its source, from 1."""
    count: int
    content: bytes | list[Any]
    """`count` lines of JSON, each ended by a line break except perhaps the last; or `count` values."""
    cost: int
    """Bytes that were read for it (0 where that is unknown)."""

    def texts(self, field: str) -> Iterator[tuple[str, str]]:
        """Yield (place, text) of each document. Raises UsageError, with its place, for one that has no text."""
        for place, document in self._documents():
            yield place, self._parse(document, field, place)

    def sound_texts(self, field: str, skip_bad: bool) -> Iterator[tuple[str, str | None]]:
        """As `texts`, but with `skip_bad` the text of a document that has none is None."""
        for place, document in self._documents():
            try:
                yield place, self._parse(document, field, place)
            except UsageError:
                if not skip_bad:
                    raise
                yield place, None

    def _documents(self) -> Iterator[tuple[str, Any]]:
        content = self.content
        if isinstance(content, bytes):
            content = content.removesuffix(b"\n").split(b"\n")
        for number, document in enumerate(content, self.first):
            yield f"{self.where}: {self.unit} {number}", document

    def _parse(self, document: Any, field: str, place: str) -> str:
        return (_json_text if isinstance(self.content, bytes) else _text)(document, field, place)

    def slice(self, start: int, stop: int) -> "Batch":
        """Documents `start` to `stop` of the batch."""
        if isinstance(self.content, bytes):
            tail = self.content.split(b"\n", start)[start]
            lines = tail.split(b"\n", stop - start)[: stop - start]
            content: bytes | list[Any] = b"\n".join(lines) + b"\n"
        else:
            content = self.content[start:stop]
        return replace(self, first=self.first + start, count=stop - start, content=content)


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def size(self) -> int | None:
        """Bytes to be read; None where that is unknown."""

    def identity(self) -> dict[str, Any]:
        """What tells this source from any other, for dataset.json."""

    def batches(self, field: str) -> Iterator[Batch]:
        """All documents, in order."""


def resolve(
    names: Sequence[str], *, config: str | None, split: str, lines: bool, note: Callable[[str], None] = lambda _: None
) -> list[Source]:
    """The sources that the command line names: files, folders, globs or hub datasets.

    `lines`: a text file holds a document per line; otherwise it is one document. `note` gets a sentence for each name
    of which something is passed over. Raises UsageError for a name that leads nowhere, EnvironmentBroken when the hub
    cannot be asked.
    """
    sources: list[Source] = []
    for name in names:
        path = Path(name)
        if path.is_file():
            if not _has_known_extension(path):
                raise UsageError(f"{name}: unknown extension; sources end in {_listed(_EXTENSIONS)}")
            sources.append(FileSource(path, lines))
        elif path.is_symlink() and not path.exists():
            raise UsageError(f"{name}: is a link that leads nowhere")
        elif path.is_dir() or _GLOB.search(name):
            found, passed_over = _in_folder(path) if path.is_dir() else _matching(path)
            if not found:
                what = "the folder holds" if path.is_dir() else "matches"
                raise UsageError(f"{name}: {what} no {_listed(_EXTENSIONS)} file{_summary(passed_over, ' (', ')')}")
            if passed_over:
                note(f"{printable(name)}: {len(found)} files taken{_summary(passed_over)}")
            sources += [FileSource(p, lines) for p in found]
        elif path.exists():
            raise UsageError(f"{name}: is not a regular file; a source is read more than once, so put it into one")
        elif _HUB_NAME.fullmatch(name) and not _has_known_extension(path):
            sources.append(_hub_source(name, config, split))
        else:
            raise UsageError(f"{name}: no such file or folder")
    return sources


def _in_folder(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The source files in a folder, and what is passed over, each with what it is."""
    listing = list_files(folder)
    found = [path for path in listing.files if _has_known_extension(path)]
    others = [(path, _UNKNOWN) for path in listing.files if not _has_known_extension(path)]
    return found, [*listing.passed_over, *others]


def _matching(pattern: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The source files that a glob names, and what is passed over, each with what it is.

    A link that it names is followed, like any other file that is named. Hidden names must be spelled out.
    """
    found: list[Path] = []
    passed_over: list[tuple[Path, str]] = []
    for path in sorted(_globbed(pattern)):
        if any(part.startswith(".") and part not in pattern.parts for part in path.parts):
            passed_over.append((path, HIDDEN))
        elif path.is_file() and _has_known_extension(path):
            found.append(path)
        elif not path.is_dir():
            passed_over.append((path, _UNKNOWN if path.is_file() else LINKED if path.is_symlink() else "no file"))
        elif "**" not in pattern.parts:
            passed_over.append((path, "a folder"))
    return found, passed_over


def _globbed(pattern: Path) -> list[Path]:
    try:
        return list(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except (ValueError, NotImplementedError):
        return []


def _summary(passed_over: Sequence[tuple[Path, str]], before: str = "; ", after: str = "") -> str:
    """Such as "; passed over: b.jsonl and 1 more (a link), .git (hidden)", or nothing."""
    first: dict[str, Path] = {}
    for path, what in passed_over:
        first.setdefault(what, path)
    counts = Counter(what for _, what in passed_over)
    more = {what: f" and {count - 1} more" if count > 1 else "" for what, count in counts.items()}
    kinds = [f"{printable(path.name)}{more[what]} ({what})" for what, path in first.items()]
    return f"{before}passed over: {', '.join(kinds)}{after}" if kinds else ""


def _has_known_extension(path: Path) -> bool:
    return path.name.lower().endswith(_EXTENSIONS)


def read(sources: Sequence[Source], field: str, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Batches that hold documents `start` to `stop` of all sources taken together."""
    position = 0
    for source in sources:
        for batch in source.batches(field):
            low = max(start - position, 0)
            high = batch.count if stop is None else min(stop - position, batch.count)
            position += batch.count
            if low < high:
                yield batch if (low, high) == (0, batch.count) else batch.slice(low, high)
            if stop is not None and position >= stop:
                return


@dataclass(frozen=True)
class FileSource:
    """One file."""

    path: Path
    lines: bool

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        try:
            identity = {"file": self.path.name, "bytes": self.size, "sha256": file_digest(self.path)}
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read ({error.strerror})") from None
        return identity | ({"lines": True} if self._is_text and self.lines else {})

    def batches(self, field: str) -> Iterator[Batch]:
        if self._suffix == ".parquet":
            return self._rows(field)
        if self._is_text and not self.lines:
            return self._whole()
        return self._blocks()

    @property
    def _suffix(self) -> str:
        return self.path.suffix.lower()

    @property
    def _is_text(self) -> bool:
        return self.path.name.lower().endswith(_TEXTS)

    def _whole(self) -> Iterator[Batch]:
        pieces: list[bytes] = []
        size = 0
        for data, _ in self._stream():
            pieces.append(data)
            size += len(data)
            if size > DOCUMENT_BYTES:
                raise UsageError(
                    f"{self.path}: more than {DOCUMENT_BYTES:,} bytes in one document; with --lines a text file "
                    "holds a document per line"
                )
        yield Batch(str(self.path), "document", 1, 1, [b"".join(pieces)], self.size)

    def _blocks(self) -> Iterator[Batch]:
        """Lines, about a megabyte at a time."""
        number, cost = 1, 0
        pieces: list[bytes] = []
        size = 0
        for data, read_bytes in self._stream():
            cost += read_bytes
            head, found, tail = data.rpartition(b"\n")
            pieces.append(head + found or tail)
            size += len(pieces[-1])
            if found and size >= _BLOCK_BYTES:
                batch = self._lines(b"".join(pieces), number, cost)
                yield batch
                number, cost = number + batch.count, 0
                pieces, size = [tail], len(tail)
            elif found:
                pieces.append(tail)
                size += len(tail)
            elif size > DOCUMENT_BYTES + _BLOCK_BYTES:
                line = number + sum(piece.count(b"\n") for piece in pieces)
                raise UsageError(f"{self.path}: line {line}: over {DOCUMENT_BYTES:,} bytes is no document")
        if rest := b"".join(pieces):
            yield self._lines(rest, number, cost)

    def _lines(self, block: bytes, number: int, cost: int) -> Batch:
        count = block.count(b"\n") + (not block.endswith(b"\n"))
        if not self._is_text:
            return Batch(str(self.path), "line", number, count, block, cost)
        values = [line.removesuffix(b"\r") for line in block.removesuffix(b"\n").split(b"\n")]
        return Batch(str(self.path), "line", number, count, values, cost)

    def _stream(self) -> Iterator[tuple[bytes, int]]:
        """Yield (content, bytes of the file that it took)."""
        with self._machine_errors(), open_regular(self.path) as file:
            if self._suffix == ".zst":
                yield from self._unpacked(file, _ZSTD_BYTES, _zstd, "zstd")
            elif self._suffix == ".gz":
                yield from self._unpacked(file, _BLOCK_BYTES // 8, _gzip, "gzip")
            else:
                while data := file.read(_BLOCK_BYTES):
                    yield data, len(data)

    def _unpacked(
        self, file: BufferedReader, step: int, decompressor: Callable[[], Any], kind: str
    ) -> Iterator[tuple[bytes, int]]:
        """The same for a file of compressed frames; `decompressor` takes one, as zlib's `decompressobj` does."""
        frame = decompressor()
        try:
            while data := file.read(step):
                taken = len(data)
                while data:
                    if frame.eof:
                        frame = decompressor()
                    if content := frame.decompress(data):
                        yield content, taken
                        taken = 0
                    data = frame.unused_data
        except (zstandard.ZstdError, zlib.error) as error:
            raise UsageError(f"{self.path}: not a sound {kind} file ({error})") from None
        if not frame.eof and file.tell():
            raise UsageError(f"{self.path}: the {kind} data ends early; the file is truncated")

    def _rows(self, field: str) -> Iterator[Batch]:
        parquet = _optional("pyarrow.parquet", "parquet files")
        arrow = _optional("pyarrow", "parquet files")
        part = ""
        try:
            with self._machine_errors(), parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                if field not in file.schema_arrow.names:
                    raise UsageError(_missing(str(self.path), field, file.schema_arrow.names))
                number, rows = 1, max(file.metadata.num_rows, 1)
                for group in range(file.num_row_groups):
                    part = f": row group {group}"
                    for table in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[field]):
                        values = _values(table.column(0), arrow)
                        cost = self.size * len(values) // rows
                        yield Batch(str(self.path), "row", number, len(values), values, cost)
                        number += len(values)
        except MemoryError:
            raise EnvironmentBroken(f"{self.path}{part}: too little memory to read it, or it is damaged") from None
        except (arrow.ArrowException, OSError) as error:  # OSError: what arrow raises for damaged pages
            raise UsageError(f"{self.path}{part}: not a sound parquet file ({_first_line(error)})") from None

    @contextmanager
    def _machine_errors(self) -> Iterator[None]:
        """Says which source could not be read, where the machine is to blame."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise EnvironmentBroken(f"{self.path}: cannot be read ({error.strerror})") from None


def _zstd() -> Any:
    # Not stream_reader, which takes the end of a truncated file for the end of the data.
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()


def _gzip() -> Any:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def _values(column: Any, arrow: Any) -> list[Any]:
    """A column's values; strings as bytes, since a file can hold some that are not UTF-8."""
    if column.type in (arrow.string(), arrow.large_string()):
        column = column.cast(arrow.large_binary())
    values: list[Any] = column.to_pylist()
    return values


@dataclass(frozen=True)
class HubSource:
    """A split of a hub dataset, streamed by the `datasets` library at a fixed revision."""

    name: str
    config: str | None
    split: str
    revision: str
    size: None = None

    def identity(self) -> dict[str, Any]:
        return {"hub": self.name, "config": self.config, "split": self.split, "revision": self.revision}

    def batches(self, field: str) -> Iterator[Batch]:
        datasets = _optional("datasets", "hub datasets")
        number = 1
        try:
            stream = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
            if stream.column_names and field not in stream.column_names:
                raise UsageError(_missing(self.name, field, stream.column_names))
            for table in stream.select_columns([field]).with_format("arrow").iter(batch_size=_ROWS):
                values = table.column(field).to_pylist()
                yield Batch(self.name, "row", number, len(values), values, 0)
                number += len(values)
        except UsageError:
            raise
        except ValueError as error:  # what `datasets` raises for an unknown config or split
            raise UsageError(f"{self.name}: {_first_line(error)}") from None
        except Exception as error:  # anything from DNS to HTTP to arrow, each library with classes of its own
            raise EnvironmentBroken(
                f"{self.name}: reading from the hub failed after row {number - 1} ({_first_line(error)}); "
                "run the same command again to continue"
            ) from None


def _hub_source(name: str, config: str | None, split: str) -> HubSource:
    _optional("datasets", "hub datasets")
    hub = _optional("huggingface_hub", "hub datasets")
    try:
        revision = hub.HfApi().dataset_info(name).sha
    except hub.errors.RepositoryNotFoundError:
        raise UsageError(f"{name}: no such file or folder, and the hub has no dataset of this name") from None
    except Exception as error:  # no network, no DNS, a proxy: each HTTP library with classes of its own
        raise EnvironmentBroken(
            f"{name}: no such file or folder, and the hub cannot be asked for it ({_first_line(error)})"
        ) from None
    return HubSource(name, config, split, revision)


def _optional(module: str, purpose: str) -> Any:
    """A module of the data extra, loaded when needed: it weighs more than the rest of pgolf."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise EnvironmentBroken(
            f"reading {purpose} needs the {module.partition('.')[0]} package; run: pip install 'pgolf[data]'"
        ) from None


def _json_text(line: bytes, field: str, place: str) -> str:
    if not line.strip():
        return ""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: byte {error.start} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not valid JSON ({_first_line(error)}); each line must be one JSON object") from None
    if not isinstance(value, dict):
        raise UsageError(f"{place}: not a JSON object; each line must be one, such as {{{json.dumps(field)}: ...}}")
    if field not in value:
        raise UsageError(_missing(place, field, list(value)))
    return _text(value[field], field, place)


def _text(value: Any, field: str, place: str) -> str:
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: byte {error.start} is not UTF-8") from None
    if not isinstance(text, str):
        what = "null" if value is None else type(value).__name__
        raise UsageError(f"{place}: field {field!r} holds {what}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{place}: character {error.start} is half of a surrogate pair, which UTF-8 cannot express"
        ) from None
    return text


def _missing(place: str, field: str, fields: Sequence[str]) -> str:
    return f"{place}: no field {field!r} among {_listed(fields) or 'none'}; name one of them with --field"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:12])) + (", ..." if len(names) > 12 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
