"""Token shards: the contest's `.bin` files.

A header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then the tokens as
little-endian uint16. Documents follow each other; each begins with the tokenizer's BOS token.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pgolf.errors import EnvironmentBroken
from pgolf.files import open_regular, write_atomically

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4

Tokens = npt.NDArray[np.uint16]

_SCAN_TOKENS = 1 << 22


@dataclass(frozen=True)
class Shard:
    """A shard of a dataset, as far as it may be used: of the last training shard of a contest folder not all may be."""

    path: Path
    tokens: int
    """How many tokens count; those behind them are the development text's."""

    def read(self, vocab_size: int) -> Tokens:
        """The tokens (N,), memory-mapped. Raises EnvironmentBroken as `read_shard` does, and when there are too few."""
        found = read_shard(self.path, vocab_size)
        if len(found) < self.tokens:
            raise EnvironmentBroken(
                f"{self.path}: offset 8: holds {len(found)} tokens where the dataset has {self.tokens}; build it again"
            )
        return found[: self.tokens]


def header_bytes(count: int) -> bytes:
    """The header of a shard of `count` tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, count
    return header.tobytes()


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write `tokens` (N,) as one shard. It appears under `path` atomically."""
    write_atomically(path, header_bytes(len(tokens)) + tokens.astype("<u2", copy=False).tobytes())


def read_shard(path: Path, vocab_size: int) -> Tokens:
    """The tokens (N,) of a shard, memory-mapped.

    Raises EnvironmentBroken, naming file and byte offset, when the header is wrong, the size does not
    match the header's count, or a token is not below `vocab_size`.
    """
    tokens = _mapped(path)
    for start in range(0, len(tokens), _SCAN_TOKENS):
        chunk = tokens[start : start + _SCAN_TOKENS]
        if int(chunk.max()) >= vocab_size:
            first = start + int(np.argmax(chunk >= vocab_size))
            raise EnvironmentBroken(
                f"{path}: offset {HEADER_BYTES + 2 * first}: token {tokens[first]} is outside the "
                f"vocabulary of {vocab_size}; the shard is damaged or belongs to another tokenizer"
            )
    return tokens


def _mapped(path: Path) -> Tokens:
    try:
        with open_regular(path) as file:
            head = file.read(HEADER_BYTES)
            count = _count(path, head, os.fstat(file.fileno()).st_size)
            return np.memmap(file, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    except FileNotFoundError:
        raise EnvironmentBroken(f"{path}: no such shard") from None
    except OSError as error:
        raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror or error})") from None


def _count(path: Path, head: bytes, size: int) -> int:
    """How many tokens the header promises, checked against the size of the file in bytes."""
    if len(head) < HEADER_BYTES:
        raise EnvironmentBroken(f"{path}: offset {size}: the file ends inside the {HEADER_BYTES}-byte header")
    header = np.frombuffer(head, dtype="<i4")
    for index, (field, expected) in enumerate((("magic number", MAGIC), ("version", VERSION))):
        if header[index] != expected:
            raise EnvironmentBroken(
                f"{path}: offset {4 * index}: {field} is {header[index]}, expected {expected}; "
                "this is not a token shard"
            )
    count = int(header[2])
    expected_size = HEADER_BYTES + 2 * count
    if count < 1 or size != expected_size:
        raise EnvironmentBroken(
            f"{path}: offset 8: the header promises {count} tokens ({expected_size} bytes) "
            f"but the file has {size} bytes; fetch or build it again"
        )
    return count


def first_tokens(shards: Sequence[Shard], vocab_size: int, most: int) -> Tokens:
    """The first tokens (N,) of shards that follow each other, at most `most`; those behind them are not opened.

    Raises EnvironmentBroken as `Shard.read` does.
    """
    parts = [np.zeros(0, np.uint16)]
    for shard in shards:
        if most > 0:
            parts.append(shard.read(vocab_size)[:most])
            most -= len(parts[-1])
    return np.concatenate(parts)


def count_tokens(shards: Sequence[Shard]) -> int:
    """Tokens of all shards together; none is opened."""
    return sum(shard.tokens for shard in shards)


def token_count(path: Path) -> int:
    """Tokens of a shard by the size of its file, which is not opened. Raises EnvironmentBroken when it is missing."""
    try:
        return max(0, path.stat().st_size - HEADER_BYTES) // 2
    except OSError as error:
        raise EnvironmentBroken(f"{error.filename}: cannot be read ({error.strerror})") from None


def read_documents(shards: Iterable[Shard], vocab_size: int, bos: int) -> Iterator[Tokens]:
    """The documents of shards that follow each other; raises what `Shard.read` and `split_documents` do."""
    return split_documents(((shard.path, shard.read(vocab_size)) for shard in shards), bos)


def split_documents(parts: Iterable[tuple[Path, Tokens]], bos: int) -> Iterator[Tokens]:
    """The documents of shards that follow each other, paths and tokens (N,), each without its leading BOS.

    In the contest's export a document may begin in one shard and end in the next. Raises EnvironmentBroken when the
    first shard does not begin with a document.
    """
    begun: Tokens | None = None  # the last document so far, which may go on
    for path, tokens in parts:
        starts = np.flatnonzero(tokens == bos)
        if begun is None and (len(starts) == 0 or starts[0] != 0):
            raise EnvironmentBroken(f"{path}: offset {HEADER_BYTES}: the first token is not BOS ({bos})")
        if begun is not None:
            begun = np.concatenate([begun, tokens[: starts[0] if len(starts) else None]])
        if len(starts):
            if begun is not None:
                yield begun
            for start, end in pairwise(starts):
                yield tokens[start + 1 : end]
            begun = tokens[starts[-1] + 1 :]
    if begun is not None:
        yield begun
