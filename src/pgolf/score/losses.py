"""Log-loss of each document, in a file beside the record: what two scores of one text are compared by."""

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pgolf.data.dataset import CanonicalText
from pgolf.errors import UsageError
from pgolf.files import read_regular, write_atomically
from pgolf.sandbox.wire import Ids
from pgolf.score.likelihood import Floats

_SUFFIX = ".losses.npz"
UNSOUND = (OSError, ValueError, KeyError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile)
"""What `read_arrays` raises for a file that is none of ours."""

LARGEST = 1 << 26
"""Bytes: ten times what the contest's 50,000 documents take."""
_MOST_NATS, _MOST_SIZE = 1e15, 1 << 32  # of a document


@dataclass(frozen=True)
class Losses:
    """Of one score, in the order of the documents."""

    artifact: str
    """sha256 of the artifact."""
    data: str
    """sha256 of the documents that were scored."""
    nats: Floats
    """(D,) log-loss of each document and of the BOS that ends it."""
    sizes: npt.NDArray[np.int64]
    """(D,) UTF-8 bytes."""
    tokens: tuple[Floats, Sequence[Ids]] | None = None
    """Of a score that was just made, not of a file: log-loss (N,) of each token, and the documents' ids (n,); the
    token after each document is BOS."""

    @property
    def bits(self) -> Floats:
        """(D,) the same log-loss in bits."""
        return self.nats / math.log(2)

    @staticmethod
    def of(artifact: str, nll: Floats, encoded: Sequence[Ids], text: CanonicalText) -> "Losses":
        """From the log-loss (N,) of each token of the encoded documents, BOS after each."""
        ends = np.cumsum([len(ids) + 1 for ids in encoded])
        nats = np.add.reduceat(nll, np.concatenate([[0], ends[:-1]]))
        sizes = np.array([len(document) for document in text.documents], dtype=np.int64)
        return Losses(artifact, text.sha256, nats, sizes, (nll, encoded))


def path(record: Path) -> Path:
    """Where the log-losses are that belong to a record."""
    return record.with_name(record.name.removesuffix(".json").removesuffix(".score") + _SUFFIX)


def encode(losses: Losses) -> bytes:
    """The file."""
    file = io.BytesIO()
    np.savez_compressed(file, **{name: getattr(losses, name) for name in ("artifact", "data", "nats", "sizes")})
    return file.getvalue()


def write(losses: Losses, path: Path) -> None:
    """Write atomically."""
    write_atomically(path, encode(losses))


def read(path: Path) -> Losses:
    """Read what `write` wrote. Raises UsageError for anything else."""
    try:
        file = read_arrays(read_regular(path, LARGEST), LARGEST)
        losses = Losses(str(file["artifact"]), str(file["data"]), file["nats"], file["sizes"])
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; `pgolf score` writes it beside the record") from None
    except UNSOUND as error:
        raise UsageError(f"{path}: not a file of log-losses ({error})") from None
    shapes = losses.nats.shape, losses.sizes.shape
    if shapes != 2 * ((len(losses.nats),),) or losses.nats.dtype != float or losses.sizes.dtype != np.int64:
        raise UsageError(f"{path}: not a file of log-losses (shapes {shapes[0]} and {shapes[1]})")
    sound = (np.abs(losses.nats) <= _MOST_NATS).all() and ((losses.sizes >= 0) & (losses.sizes <= _MOST_SIZE)).all()
    if not sound or not losses.sizes.sum():  # NaN is not sound
        raise UsageError(f"{path}: not a file of log-losses (it has figures that no text has)")
    return losses


def read_arrays(data: bytes, limit: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz file that unpacks to at most `limit` bytes. Raises what `UNSOUND` lists."""
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        if sum(member.file_size for member in members.infolist()) > limit:
            raise ValueError(f"unpacks to more than {limit:,} bytes")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return dict(file)
