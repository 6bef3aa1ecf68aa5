"""Where documents come from: JSONL, parquet and text files, and hub datasets.

Documents are numbered through all sources in order. By that number an interrupted build finds its place again.
"""

import importlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from pgolf.data.build.batch import Batch, first_line, listed, missing_field
from pgolf.data.dataset import file_digest
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import HIDDEN, LINKED, list_files, open_regular, printable

DOCUMENT_BYTES = 64 * 1024 * 1024  # longest document; a longer one is most likely not one document
BLOCK_BYTES = 1 << 20  # read at a time, and of lines in a batch
ROWS = 256  # of a table in a batch

_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` asks for
_TEXTS = (".txt", ".txt.gz", ".txt.zst")
_EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", *_TEXTS)
_GLOB = re.compile(r"[*?[]")
_UNKNOWN = "of an unknown extension"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_Skipped = list[tuple[Path, str]]
"""Paths that are not read, each with what it is."""


def read(sources: Sequence["Source"], field: str, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Batches that hold documents `start` to `stop` of all sources taken together."""
    position = 0
    for source in sources:
        for batch in source.batches(field):
            count = len(batch.documents)
            low = max(start - position, 0)
            high = count if stop is None else min(stop - position, count)
            position += count
            if low < high:
                yield batch if (low, high) == (0, count) else batch.slice(low, high)
            if stop is not None and position >= stop:
                return


def resolve(
    names: Sequence[str], *, config: str | None, split: str, lines: bool, note: Callable[[str], None] = lambda _: None
) -> list["Source"]:
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
                raise UsageError(f"{name}: unknown extension; sources end in {listed(_EXTENSIONS)}")
            sources.append(FileSource(path, lines))
        elif path.is_symlink() and not path.exists():
            raise UsageError(f"{name}: is a link that leads nowhere")
        elif path.is_dir() or _GLOB.search(name):
            sources += [FileSource(file, lines) for file in _several(name, note)]
        elif path.exists():
            raise UsageError(f"{name}: is not a regular file; a source is read more than once, so put it into one")
        elif _HUB_NAME.fullmatch(name) and not _has_known_extension(path):
            sources.append(_hub_source(name, config, split))
        else:
            raise UsageError(f"{name}: no such file or folder")
    return sources


def _has_known_extension(path: Path) -> bool:
    return path.name.lower().endswith(_EXTENSIONS)


def _several(name: str, note: Callable[[str], None]) -> list[Path]:
    """The source files in a folder or behind a glob. Raises UsageError when there is none."""
    path = Path(name)
    found, skipped = _in_folder(path) if path.is_dir() else _matching(path)
    first = {what: file for file, what in reversed(skipped)}
    counts = [what for _, what in skipped]
    kinds = [
        f"{printable(first[what].name)}{f' and {more} more' if (more := counts.count(what) - 1) else ''} ({what})"
        for what in dict.fromkeys(counts)
    ]
    summary = f"passed over: {', '.join(kinds)}"
    if not found:
        what = "the folder holds" if path.is_dir() else "matches"
        raise UsageError(f"{name}: {what} no {listed(_EXTENSIONS)} file{f' ({summary})' if kinds else ''}")
    if kinds:
        note(f"{printable(name)}: {len(found)} files taken; {summary}")
    return found


def _in_folder(folder: Path) -> tuple[list[Path], _Skipped]:
    listing = list_files(folder)
    unknown = [(path, _UNKNOWN) for path in listing.files if not _has_known_extension(path)]
    return [path for path in listing.files if _has_known_extension(path)], [*listing.passed_over, *unknown]


def _matching(pattern: Path) -> tuple[list[Path], _Skipped]:
    """A link that a glob names is followed, like any other file that is named. Hidden names must be spelled out."""
    found: list[Path] = []
    skipped: _Skipped = []
    try:
        matches = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except (ValueError, NotImplementedError):
        matches = []
    for path in matches:
        if any(part.startswith(".") and part not in pattern.parts for part in path.parts):
            skipped.append((path, HIDDEN))
        elif path.is_file() and _has_known_extension(path):
            found.append(path)
        elif not path.is_dir():
            skipped.append((path, _UNKNOWN if path.is_file() else LINKED if path.is_symlink() else "no file"))
        elif "**" not in pattern.parts:
            skipped.append((path, "a folder"))
    return found, skipped


@dataclass(frozen=True)
class FileSource:
    """One file."""

    path: Path
    lines: bool

    @property
    def size(self) -> int:
        """Bytes to be read."""
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        """What tells this source from any other, for dataset.json."""
        try:
            identity = {"file": self.path.name, "bytes": self.size, "sha256": file_digest(self.path)}
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read ({error.strerror})") from None
        return identity | ({"lines": True} if self._is_text and self.lines else {})

    def batches(self, field: str) -> Iterator[Batch]:
        """All documents, in order."""
        if self.path.suffix.lower() == ".parquet":
            return self._rows(field)
        return self._whole() if self._is_text and not self.lines else self._blocks()

    @property
    def _is_text(self) -> bool:
        return self.path.name.lower().endswith(_TEXTS)

    def _whole(self) -> Iterator[Batch]:
        content = bytearray()
        for data, _ in self._stream():
            content += data
            if len(content) > DOCUMENT_BYTES:
                raise UsageError(
                    f"{self.path}: more than {DOCUMENT_BYTES:,} bytes in one document; with --lines a text file "
                    "holds a document per line"
                )
        yield Batch(str(self.path), "document", 1, [bytes(content)], self.size)

    def _blocks(self) -> Iterator[Batch]:
        """Lines, about a megabyte at a time."""
        number, cost, size = 1, 0, 0
        lines: list[bytes] = []
        begun: list[bytes] = []  # pieces of the line that has not ended yet
        for data, read_bytes in self._stream():
            cost += read_bytes
            size += len(data)
            piece, *more = data.split(b"\n")
            begun.append(piece)
            if more:
                lines += [b"".join(begun), *more[:-1]]
                begun = more[-1:]
                if size >= BLOCK_BYTES:
                    yield self._lines(lines, number, cost)
                    number, cost, size, lines = number + len(lines), 0, len(begun[0]), []
            elif size > DOCUMENT_BYTES + BLOCK_BYTES:
                raise UsageError(
                    f"{self.path}: line {number + len(lines)}: over {DOCUMENT_BYTES:,} bytes is no document"
                )
        if rest := b"".join(begun):
            lines.append(rest)
        if lines:
            yield self._lines(lines, number, cost)

    def _lines(self, lines: list[bytes], number: int, cost: int) -> Batch:
        if self._is_text:
            return Batch(str(self.path), "line", number, [line.removesuffix(b"\r") for line in lines], cost)
        return Batch(str(self.path), "line", number, lines, cost, is_json=True)

    def _stream(self) -> Iterator[tuple[bytes, int]]:
        """Yield (content, bytes of the file read for it)."""
        kind = {".zst": "zstd", ".gz": "gzip"}.get(self.path.suffix.lower())
        step = {"zstd": 1 << 12, "gzip": BLOCK_BYTES // 8}.get(kind or "", BLOCK_BYTES)  # 4 KiB of zstd: up to 128 MiB
        with self._machine_errors(), open_regular(self.path) as file:
            blocks = iter(lambda: file.read(step), b"")
            yield from self._unpacked(blocks, kind) if kind else ((data, len(data)) for data in blocks)

    def _unpacked(self, blocks: Iterator[bytes], kind: str) -> Iterator[tuple[bytes, int]]:
        """The contents of compressed frames that follow each other."""
        frame = None
        try:
            for data in blocks:
                taken = len(data)
                while data:
                    if frame is None or frame.eof:
                        frame = _decompressor(kind)
                    if content := frame.decompress(data):
                        yield content, taken
                        taken = 0
                    data = frame.unused_data
        except (zstandard.ZstdError, zlib.error) as error:
            raise UsageError(f"{self.path}: not a sound {kind} file ({error})") from None
        if frame and not frame.eof:
            raise UsageError(f"{self.path}: the {kind} data ends early; the file is truncated")

    def _rows(self, field: str) -> Iterator[Batch]:
        parquet = _optional("pyarrow.parquet", "parquet files")
        arrow = _optional("pyarrow", "parquet files")
        part = ""
        try:
            with self._machine_errors(), parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                if field not in file.schema_arrow.names:
                    raise UsageError(missing_field(str(self.path), field, file.schema_arrow.names))
                number, rows = 1, max(file.metadata.num_rows, 1)
                for group in range(file.num_row_groups):
                    part = f": row group {group}"
                    for table in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=[field]):
                        column = table.column(0)
                        if column.type in (arrow.string(), arrow.large_string()):  # not always UTF-8
                            column = column.cast(arrow.large_binary())
                        values = column.to_pylist()
                        yield Batch(str(self.path), "row", number, values, self.size * len(values) // rows)
                        number += len(values)
        except MemoryError:
            raise EnvironmentBroken(f"{self.path}{part}: too little memory to read it, or it is damaged") from None
        except (arrow.ArrowException, OSError) as error:  # OSError: what arrow raises for damaged pages
            raise UsageError(f"{self.path}{part}: not a sound parquet file ({first_line(error)})") from None

    @contextmanager
    def _machine_errors(self) -> Iterator[None]:
        """Name the source where the machine is to blame that it cannot be read."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise EnvironmentBroken(f"{self.path}: cannot be read ({error.strerror})") from None


def _decompressor(kind: str) -> Any:
    """What unpacks one frame. For zstd not `stream_reader`, which takes a truncated file for a whole one."""
    if kind == "zstd":
        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


@dataclass(frozen=True)
class HubSource:
    """A split of a hub dataset, streamed by the `datasets` library at a fixed revision."""

    name: str
    config: str | None
    split: str
    revision: str
    size: None = None  # unknown

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
                raise UsageError(missing_field(self.name, field, stream.column_names))
            for table in stream.select_columns([field]).with_format("arrow").iter(batch_size=ROWS):
                values = table.column(field).to_pylist()
                yield Batch(self.name, "row", number, values, 0)
                number += len(values)
        except UsageError:
            raise
        except ValueError as error:  # what `datasets` raises for an unknown config or split
            raise UsageError(f"{self.name}: {first_line(error)}") from None
        except Exception as error:  # anything from DNS to HTTP to arrow, each library with classes of its own
            raise EnvironmentBroken(
                f"{self.name}: reading from the hub failed after row {number - 1} ({first_line(error)}); "
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
            f"{name}: no such file or folder, and the hub cannot be asked for it ({first_line(error)})"
        ) from None
    return HubSource(name, config, split, revision)


Source = FileSource | HubSource


def _optional(module: str, purpose: str) -> Any:
    """A module of the data extra, loaded when needed: it weighs more than the rest of pgolf."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise EnvironmentBroken(
            f"reading {purpose} needs the {module.partition('.')[0]} package; run: pip install 'pgolf[data]'"
        ) from None
