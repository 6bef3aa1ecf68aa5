"""Where documents come from: JSONL, parquet and text files, and hub datasets.

A source is read in batches of about a megabyte that are not parsed yet, so the process that reads stays ahead of
those that tokenise. Documents are numbered through all sources in order; that number is how a build that was
interrupted finds its place again.
"""

import importlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import zstandard

from pgolf.data.dataset import file_digest
from pgolf.errors import EnvironmentBroken, UsageError

DOCUMENT_BYTES = 64 * 1024 * 1024  # longest document; a longer one is most likely not one document

_BLOCK_BYTES = 1 << 20
_ROWS = 256
_EXTENSIONS = (".jsonl", ".jsonl.zst", ".parquet", ".txt", ".txt.zst")
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
        if isinstance(self.content, bytes):
            for number, line in enumerate(self.content.removesuffix(b"\n").split(b"\n"), self.first):
                place = f"{self.where}: {self.unit} {number}"
                yield place, _json_text(line, field, place)
        else:
            for number, value in enumerate(self.content, self.first):
                place = f"{self.where}: {self.unit} {number}"
                yield place, _text(value, field, place)

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


def resolve(names: Sequence[str], *, config: str | None, split: str, lines: bool) -> list[Source]:
    """The sources that the command line names: files, folders, globs or hub datasets.

    `lines`: a text file holds a document per line; otherwise it is one document. Raises UsageError for a name
    that leads nowhere, EnvironmentBroken when the hub cannot be asked.
    """
    sources: list[Source] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(_EXTENSIONS))
            if not inside:
                raise UsageError(f"{name}: the folder holds no {_listed(_EXTENSIONS)} file")
            sources += [FileSource(p, lines) for p in inside]
        elif path.is_file():
            if not name.endswith(_EXTENSIONS):
                raise UsageError(f"{name}: unknown extension; sources end in {_listed(_EXTENSIONS)}")
            sources.append(FileSource(path, lines))
        elif found := _globbed(path):
            sources += [FileSource(p, lines) for p in found]
        elif _HUB_NAME.fullmatch(name) and not name.endswith(_EXTENSIONS):
            sources.append(_hub_source(name, config, split))
        else:
            raise UsageError(f"{name}: no such file or folder")
    return sources


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
        return identity | ({"lines": True} if self._text and self.lines else {})

    def batches(self, field: str) -> Iterator[Batch]:
        if self.path.suffix == ".parquet":
            return self._rows(field)
        if self._text and not self.lines:
            return self._whole()
        return self._blocks()

    @property
    def _text(self) -> bool:
        return self.path.name.endswith((".txt", ".txt.zst"))

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
        if not self._text:
            return Batch(str(self.path), "line", number, count, block, cost)
        values = [line.removesuffix(b"\r") for line in block.removesuffix(b"\n").split(b"\n")]
        return Batch(str(self.path), "line", number, count, values, cost)

    def _stream(self) -> Iterator[tuple[bytes, int]]:
        """Yield (content, bytes of the file that it took)."""
        with self.path.open("rb") as file:
            if self.path.suffix != ".zst":
                while data := file.read(_BLOCK_BYTES):
                    yield data, len(data)
                return
            # Not stream_reader, which takes the end of a truncated file for the end of the data.
            decompressor = zstandard.ZstdDecompressor().decompressobj()
            try:
                while data := file.read(_BLOCK_BYTES // 8):
                    taken = len(data)
                    while data:
                        if decompressor.eof:
                            decompressor = zstandard.ZstdDecompressor().decompressobj()
                        if content := decompressor.decompress(data):
                            yield content, taken
                            taken = 0
                        data = decompressor.unused_data
            except zstandard.ZstdError as error:
                raise UsageError(f"{self.path}: not a sound zstd file ({error})") from None
            if not decompressor.eof and file.tell():
                raise UsageError(f"{self.path}: the zstd data ends early; the file is truncated")

    def _rows(self, field: str) -> Iterator[Batch]:
        parquet = _optional("pyarrow.parquet", "parquet files")
        arrow = _optional("pyarrow", "parquet files")
        try:
            with parquet.ParquetFile(self.path) as file:
                if field not in file.schema_arrow.names:
                    raise UsageError(_missing(str(self.path), field, file.schema_arrow.names))
                number, rows = 1, max(file.metadata.num_rows, 1)
                for table in file.iter_batches(batch_size=_ROWS, columns=[field]):
                    values = table.column(0).to_pylist()
                    cost = self.size * len(values) // rows
                    yield Batch(str(self.path), "row", number, len(values), values, cost)
                    number += len(values)
        except arrow.ArrowInvalid as error:
            raise UsageError(f"{self.path}: not a sound parquet file ({str(error).splitlines()[0]})") from None


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


def _globbed(pattern: Path) -> list[Path]:
    try:
        found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except (ValueError, NotImplementedError):
        return []
    return [path for path in found if path.is_file() and path.name.endswith(_EXTENSIONS)]


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
