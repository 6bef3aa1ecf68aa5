"""Writing token shards, a document at a time, so that an interrupted build can go on."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pgolf.data.dataset import file_digest
from pgolf.data.shards import HEADER_BYTES, Tokens, header_bytes
from pgolf.errors import EnvironmentBroken
from pgolf.files import check_replaceable, create

STATE = "build.json"
"""File in the dataset folder that says how far a build came."""

Json = dict[str, Any]


class ShardWriter:
    """Appends documents to shards. The unfinished shard ends in `.part` and has no header yet."""

    def __init__(self, root: Path, prefix: str, limit: int, done: list[Json], part_tokens: int) -> None:
        """Go on after the shards `done` and the first `part_tokens` tokens of the unfinished one."""
        self.done = done
        self._root = root
        self.prefix = prefix
        self._limit = limit
        self._tokens = 0
        self._file: BinaryIO | None = None
        if part_tokens:
            self._reopen(part_tokens)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, tokens: Tokens, lengths: npt.NDArray[np.int64]) -> None:
        """Append documents: tokens (N,), and how many of them each document has (D,).

        A shard is full when the next document does not fit; a document is never split.
        """
        ends = np.cumsum(lengths)
        first = start = 0
        while first < len(ends):
            fit = int(np.searchsorted(ends, start + self._limit - self._tokens, side="right"))
            if fit == first and not self._tokens:
                fit += 1
            if fit > first:
                stop = int(ends[fit - 1])
                self._append(tokens[start:stop])
                first, start = fit, stop
            if first < len(ends):
                self.close_shard()

    def flush(self) -> int:
        """Bring everything to the disk; returns the tokens in the unfinished shard."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._tokens

    def close_shard(self) -> None:
        """Give the unfinished shard, if there is one, its header and its name."""
        if self._file is None:
            return
        path, part = self._paths()
        self._file.seek(0)
        self._file.write(header_bytes(self._tokens))
        self.flush()
        self._file.close()
        digest = file_digest(part)
        part.replace(path)
        self.done.append({"file": path.name, "sha256": digest, "tokens": self._tokens})
        self._file, self._tokens = None, 0

    def _append(self, tokens: Tokens) -> None:
        if self._file is None:
            self._file = create(self._paths()[1])
            self._file.write(header_bytes(0))
        self._file.write(tokens.astype("<u2", copy=False).tobytes())
        self._tokens += len(tokens)

    def _reopen(self, tokens: int) -> None:
        path, part = self._paths()
        if not part.is_file() and path.is_file():
            path.replace(part)  # it was finished after the last checkpoint: drop what came later
        check_replaceable(part)  # the file is appended to, so no link is followed
        size = HEADER_BYTES + 2 * tokens
        if not part.is_file() or part.stat().st_size < size:
            raise EnvironmentBroken(f"{part}: shorter than {STATE} says; delete the folder and build again")
        self._file = part.open("r+b")
        self._file.truncate(size)
        self._file.seek(size)
        self._tokens = tokens

    def _paths(self) -> tuple[Path, Path]:
        path = self._root / f"{self.prefix}_{len(self.done):06d}.bin"
        return path, path.with_name(path.name + ".part")
