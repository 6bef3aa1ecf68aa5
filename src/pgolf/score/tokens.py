"""Log-loss of each token with the token's text, in a file beside the record: `pgolf score --per-token`.

What a token spells is found out in the sandbox, by decoding documents of two tokens, so it works for any tokenizer; at
the start of a document some decoders drop a space. A token that is only a part of a character has no text of its own.
Such tokens are decoded together; the first of them gets the character and the others get nothing.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pgolf import rules
from pgolf.artifact import Artifact
from pgolf.errors import UsageError
from pgolf.files import read_regular, write_atomically
from pgolf.sandbox import lock
from pgolf.sandbox.wire import Ids
from pgolf.score import tokenization
from pgolf.score.deadline import Clock
from pgolf.score.devices import Runtime
from pgolf.score.losses import UNSOUND, Losses, read_arrays
from pgolf.score.schedule import Index

_SUFFIX = ".tokens.npz"
_LARGEST = 1 << 30  # bytes: what the contest's 62 million tokens take
_PIECE_BYTES = 64  # room for what a token spells; a decoder may send twice as much before it is refused
_PART = "\ufffd"


@dataclass(frozen=True)
class TokenLosses:
    """N tokens of D documents in their order; the last token of each document is the BOS that ends it."""

    artifact: str
    """sha256 of the artifact."""
    data: str
    """sha256 of the documents that were scored."""
    nats: npt.NDArray[np.float32]
    """(N,) log-loss."""
    texts: tuple[str, ...]
    """(K,) texts that a token can have; the first one is empty."""
    text: Index
    """(N,) number of each token's text in `texts`; 0 for BOS, and for the later parts of a character."""
    lengths: Index
    """(D,) tokens of each document, its BOS included."""
    sizes: Index
    """(D,) UTF-8 bytes."""

    @staticmethod
    def of(losses: Losses, artifact: Artifact, runtime: Runtime) -> "TokenLosses":
        """From a score that was just made. Raises Refused when the tokenizer fails on made-up documents."""
        assert losses.tokens is not None
        nats, encoded = losses.tokens
        with lock.hold():
            texts, text = _texts(artifact, encoded, runtime)
        lengths = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
        return TokenLosses(losses.artifact, losses.data, nats.astype(np.float32), texts, text, lengths, losses.sizes)


def _texts(artifact: Artifact, encoded: Sequence[Ids], runtime: Runtime) -> tuple[tuple[str, ...], Index]:
    """The fields `texts` and `text`."""
    plain = replace(artifact, manifest=replace(artifact.manifest, transform=None))  # its marks are texts of tokens too
    bos = np.int32(artifact.manifest.bos)
    tokens = np.concatenate([np.append(ids, bos) for ids in encoded])
    used, number = np.unique(tokens, return_inverse=True)
    pieces = ["" if v == bos else piece for v, piece in zip(used, _pieces(plain, used, runtime), strict=True)]
    texts = {"": 0}
    of_piece = np.array([texts.setdefault(piece, len(texts)) for piece in pieces], dtype=np.int64)
    text = of_piece[number]

    is_part = np.array([_PART in piece for piece in pieces])[number]
    starts = np.flatnonzero(np.diff(is_part, prepend=False) & is_part)
    ends = np.flatnonzero(np.diff(is_part, append=False) & is_part) + 1
    runs = [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
    distinct = {run.tobytes(): run for run in runs}
    spelled = dict(zip(distinct, _decode(plain, list(distinct.values()), runtime), strict=True))
    for start, run in zip(starts, runs, strict=True):
        characters = spelled[run.tobytes()]
        one_byte_each = len(characters.encode()) == len(run)
        text[start : start + len(run)] = 0
        for character in characters if one_byte_each else [characters]:
            text[start] = texts.setdefault(character, len(texts))
            start += len(character.encode())
    return tuple(texts), text


def _pieces(artifact: Artifact, ids: Ids, runtime: Runtime) -> list[str]:
    """What each of `ids` spells inside a document: behind a token that spells whole characters, if there is one."""
    alone = _decode(artifact, [ids[i : i + 1] for i in range(len(ids))], runtime)
    first = next((i for i, text in enumerate(alone) if text.strip() and _PART not in text), None)
    if first is None:
        return alone
    behind = _decode(artifact, [np.array([ids[first], v], dtype=ids.dtype) for v in ids], runtime)
    return [text.removeprefix(alone[first]) for text in behind]


def _decode(artifact: Artifact, documents: Sequence[Ids], runtime: Runtime) -> list[str]:
    clock = Clock(rules.track(artifact.manifest.track).eval_seconds)
    sizes = [_PIECE_BYTES * len(ids) for ids in documents]
    found = tokenization.decode(artifact, documents, sizes, runtime, clock.phase("decode"))
    return [text.decode("utf-8", "replace") for text in found]


def path(record: Path) -> Path:
    """Where the tokens are that belong to a record."""
    return record.with_name(record.name.removesuffix(".json").removesuffix(".score") + _SUFFIX)


def write(tokens: TokenLosses, path: Path) -> None:
    """Write atomically, in the smallest types that hold the numbers."""
    file = io.BytesIO()
    spelled = [text.encode() for text in tokens.texts]
    np.savez_compressed(
        file,
        artifact=tokens.artifact,
        data=tokens.data,
        nats=tokens.nats,
        texts=np.frombuffer(b"".join(spelled), dtype=np.uint8),
        text_sizes=np.array([len(text) for text in spelled], dtype=np.int64),
        text=tokens.text.astype(np.min_scalar_type(len(spelled))),
        lengths=tokens.lengths,
        sizes=tokens.sizes,
    )
    write_atomically(path, file.getvalue())


def read(path: Path) -> TokenLosses:
    """Read what `write` wrote. Raises UsageError for anything else."""
    try:
        file = read_arrays(read_regular(path, _LARGEST), _LARGEST)
        nats, text, lengths, sizes = (file[name] for name in ("nats", "text", "lengths", "sizes"))
        spelled, edges = file["texts"].tobytes(), np.cumsum(file["text_sizes"])
        texts = tuple(p.tobytes().decode() for p in np.split(np.frombuffer(spelled, np.uint8), edges[:-1]))
        sound = nats.dtype == np.float32 and nats.shape == text.shape == (int(lengths.sum()),)
        sound &= lengths.shape == sizes.shape and lengths.dtype == sizes.dtype == np.int64 and bool(len(nats))
        if not sound or lengths.min() < 1 or text.dtype.kind != "u" or int(text.max()) >= len(texts):
            raise ValueError("its arrays do not belong together")
        if not (np.isfinite(nats).all() and sizes.min() >= 0):
            raise ValueError("a number is not finite")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; `pgolf score --per-token` writes it beside the record") from None
    except (*UNSOUND, AttributeError, TypeError) as error:
        raise UsageError(f"{path}: not a file of log-losses by token ({error})") from None
    return TokenLosses(str(file["artifact"]), str(file["data"]), nats, texts, text.astype(np.int64), lengths, sizes)
