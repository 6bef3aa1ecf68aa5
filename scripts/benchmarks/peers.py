"""General-purpose compressors, with and without the training text, beside scored artifacts on one validation text.

A compressor that knows the training text: the size of both texts in one file less the size of the training text alone.
"""

import argparse
import json
import lzma
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zstandard

from pgolf import plots
from pgolf.data.dataset import Dataset, load_tokenizer, open_dataset
from pgolf.data.shards import read_documents
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import write_atomically
from pgolf.score import record

WINDOW = 26  # bits: all of both texts of the laptop track


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    trained: bool
    """Whether the training text was known."""
    bpb: float
    seconds: float
    """Of compressing all of it once, or of the record's evaluation clock."""


def zpaq(data: bytes) -> int:
    """Bytes of the archive by its slowest method, in one block; a program of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file, archive = Path(folder) / "text", Path(folder) / "text.zpaq"
        file.write_bytes(data)
        subprocess.run(["zpaq", "add", archive, file, "-m57"], check=True, capture_output=True)
        return archive.stat().st_size


def xz(data: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << WINDOW}]
    return len(lzma.compress(data, filters=filters))


def zstd(data: bytes) -> int:
    parameters = zstandard.ZstdCompressionParameters.from_level(22, window_log=WINDOW, enable_ldm=True)
    return len(zstandard.ZstdCompressor(compression_params=parameters).compress(data))


def brotli_11(data: bytes) -> int:
    import brotli  # a machine without network may lack it

    return len(brotli.compress(data, quality=11, lgwin=24))


COMPRESSORS: Mapping[str, Callable[[bytes], int]] = {
    "zstd -22": zstd,
    "brotli -11": brotli_11,
    "xz -9e": xz,
    "zpaq -m57": zpaq,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("records", nargs="*", metavar="NAME=RECORD", help="a name and a .score.json of the same text")
    parser.add_argument("--data", type=Path, required=True, help="a small one: its texts are taken into memory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json and FILE.png, too")


def bench_peers(args: argparse.Namespace) -> None:
    """Print the table, the best last, and draw it."""
    if not shutil.which("zpaq"):
        raise EnvironmentBroken("zpaq is missing; install the package zpaq of your system")
    dataset = open_dataset(args.data)
    text = dataset.canonical_text()
    rows = [scored(argument, text.sha256) for argument in args.records]
    joined, before = b"\n".join(text.documents), training_text(dataset)
    for name, size in COMPRESSORS.items():
        rows += compressed(name, size, joined, before, text.bytes)
    rows.sort(key=lambda row: -row.bpb)
    print(f"{'':<{width(rows)}}  training text       bpb   seconds")
    for row in rows:
        print(f"{row.name:<{width(rows)}}  {'known' if row.trained else '-':<13}  {row.bpb:8.4f}  {row.seconds:8.1f}")
    if args.out:
        facts = {"data": {"sha256": text.sha256, "bytes": text.bytes}, "rows": [asdict(row) for row in rows]}
        write_atomically(args.out.with_suffix(".json"), (json.dumps(facts, indent=1) + "\n").encode())
        if missing := plot(rows, args.out.with_suffix(".png")):
            print(missing)


def width(rows: list[Row]) -> int:
    return max(len(row.name) for row in rows)


def training_text(dataset: Dataset) -> bytes:
    """The documents of the training shards, decoded."""
    tokenizer = load_tokenizer(dataset.tokenizer)
    documents = (ids.tolist() for ids in read_documents(dataset.train_shards, dataset.vocab_size, dataset.bos))
    return b"\n".join(tokenizer.decode(ids).encode() for ids in documents)


def compressed(name: str, size: Callable[[bytes], int], text: bytes, before: bytes, count: int) -> list[Row]:
    """One compressor without and with the training text `before`; `count`: the bytes that are scored."""
    begun = time.monotonic()
    alone = size(text)
    middle = time.monotonic()
    both = size(before + b"\n" + text)
    end = time.monotonic()
    return [
        Row(name, False, 8 * alone / count, middle - begun),
        Row(name, True, 8 * (both - size(before)) / count, end - middle),
    ]


def scored(argument: str, sha256: str) -> Row:
    """The row of a NAME=RECORD. Raises UsageError for a record of another text."""
    name, _, path = argument.rpartition("=")
    found = record.read_scored(Path(path), "no such record", "is no record of a score")
    if found.data is None or found.data.sha256 != sha256:
        raise UsageError(f"{path}: is not of this text")
    assert found.bpb is not None
    return Row(name or Path(path).name, True, found.bpb, sum(record.phases(found.seconds).values()))


def plot(rows: list[Row], path: Path) -> str | None:
    """Bits per byte over seconds; returns as `plots.draw` does."""

    def fill(axes: Any) -> None:
        for row in rows:
            color = "tab:blue" if row.trained else "tab:gray"
            axes.plot(row.seconds, row.bpb, "o", color=color)
            axes.annotate(row.name, (row.seconds, row.bpb), (6, 3), textcoords="offset points", fontsize=9)
        axes.plot([], [], "o", color="tab:blue", label="knows the training text")
        axes.plot([], [], "o", color="tab:gray", label="does not")
        axes.set_xscale("log")
        axes.margins(x=0.4)  # for the names
        axes.set(xlabel="seconds to compress, or to evaluate", ylabel="bits per byte of the validation text")
        axes.legend(loc="center left")

    return plots.draw(path, (8, 5), fill)
