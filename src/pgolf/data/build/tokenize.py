"""The dataset's tokenizer: a SentencePiece model, trained here or given, and the tokens of documents.

A model trained here without normalisation is lossless on every text. SentencePiece by itself writes a space as
U+2581 and so decodes a U+2581 of the text to a space; a pair of rules stored in the model keeps the two apart: before
encoding U+2581 becomes an escape sequence that begins with a private-use character, and decoding undoes that.
"""

import bisect
import contextlib
import io
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece as spm

from pgolf.data import sentencepiece_file
from pgolf.data.build.batch import Batch
from pgolf.data.dataset import TOKENIZER_BYTES, VOCAB_SIZE, document_digest, load_tokenizer
from pgolf.data.shards import Tokens
from pgolf.data.transforms import TRANSFORMS, Transform
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import read_regular

NORMALIZATIONS = ("identity", "nmt_nfkc")

PIECE_CHARACTERS = 1 << 12  # of a document at a time in training; SentencePiece 0.2.1 ends at words over 65,535
_ESCAPE = "2581\tF0000 F0001\nF0000\tF0000 F0000\n"
_UNESCAPE = "F0000 F0001\t2581\nF0000 F0000\tF0000\n"


@dataclass(frozen=True)
class Encoded:
    """The tokens of a batch, document by document, without empty documents."""

    tokens: Tokens
    """(N,) all documents, each with its leading BOS."""
    lengths: npt.NDArray[np.int64]
    """(D,) tokens of each document with its BOS."""
    digests: list[bytes]
    """(D,) `document_digest` of each."""
    sizes: npt.NDArray[np.int64]
    """(D,) UTF-8 bytes of each document's text."""
    empty: int
    """Documents left out: nothing but white space, or nothing once normalised."""
    bad: int
    """Documents left out since they have no text (with `skip_bad`)."""
    canonical: list[str]
    """(D,) the text as decoded back; empty unless `encode` was called with `canonical`."""
    changed: int
    """Documents whose canonical text is not the source's, since the tokenizer normalises."""

    def without(self, known: frozenset[bytes]) -> "Encoded":
        """The documents whose digest is not `known`."""
        keep = np.array([digest not in known for digest in self.digests], dtype=bool)
        if keep.all():
            return self
        tokens, canonical = self.tokens[np.repeat(keep, self.lengths)], list(compress(self.canonical, keep))
        kept = replace(self, tokens=tokens, lengths=self.lengths[keep], sizes=self.sizes[keep], canonical=canonical)
        return replace(kept, digests=list(compress(self.digests, keep)))


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens."""

    field: str
    """Where JSON lines and table rows keep their text."""
    model: Path
    transform: str | None
    """Name of the transform before the tokenizer."""
    skip_bad: bool
    """Whether a document that has no text is left out rather than an error."""


def train(texts: Iterable[str], vocab_size: int, normalization: str, transform: str | None = None) -> bytes:
    """A SentencePiece BPE model with byte fallback. Raises UsageError when the text cannot fill the vocabulary.

    Changes the working directory while it runs.
    """
    model = io.BytesIO()
    options: dict[str, Any] = {"normalization_rule_name": normalization}
    # The model stores the names of its rule files; relative ones do not depend on the machine.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if normalization == "identity":
            Path("escape.tsv").write_text(_ESCAPE)
            Path("unescape.tsv").write_text(_UNESCAPE)
            options = {"normalization_rule_tsv": "escape.tsv", "denormalization_rule_tsv": "unescape.tsv"}
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=(piece for text in texts for piece in pieces(_transform(transform).apply(text))),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                split_digits=True,
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                max_sentence_length=1 << 16,  # bytes; longer ones would be skipped, and a piece has fewer
                minloglevel=3,
                **options,
            )
        except RuntimeError as error:
            raise UsageError(_training_failure(str(error), vocab_size)) from None
    return model.getvalue()


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of bounded length. A cut falls before a space, where the trainer splits words, if possible."""
    start = 0
    while start < len(text):
        stop = start + PIECE_CHARACTERS
        if stop < len(text):
            space = text.rfind(" ", start + 1, stop + 1)
            stop = space if space > 0 else stop
        yield text[start:stop]
        start = stop


def check(path: Path) -> None:
    """Raises UsageError when a given model cannot serve as a dataset's tokenizer."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        processor = load_tokenizer(path)
    except EnvironmentBroken as error:
        raise UsageError(str(error)) from None
    if processor.vocab_size() > VOCAB_SIZE:
        raise UsageError(f"{path}: has {processor.vocab_size():,} pieces; tokens are uint16, so {VOCAB_SIZE:,} fit")
    if processor.bos_id() < 0:
        raise UsageError(f"{path}: has no BOS piece, so documents could not be told apart")
    try:
        sentencepiece_file.read(read_regular(path, TOKENIZER_BYTES))
    except ValueError as error:
        raise UsageError(f"{path}: {error}; train one by `pgolf tokenizer train`") from None


def encode(batch: Batch, encoding: Encoding, canonical: bool) -> Encoded:
    """Tokenise a batch.

    With `canonical`, each document's text is what tokenizer and transform decode back, encoded again and proven to
    come back once more. Raises UsageError, naming document and byte, for text that the tokenizer cannot express.
    """
    tokenizer = _tokenizer(encoding.model, encoding.transform)
    documents: list[tuple[array[int], str]] = []
    empty = bad = changed = 0
    for place, source in batch.texts(encoding.field, encoding.skip_bad):
        if source is None:
            bad += 1
            continue
        ids, text = tokenizer.encode(source, place) if source.strip() else array("H"), source
        if ids and canonical:
            ids, text = tokenizer.canonical(ids, place)
        if not ids:
            empty += 1
            continue
        documents.append((ids, text))
        changed += text != source
    tokens = array("H")
    for ids, _ in documents:
        tokens.append(tokenizer.bos)
        tokens.extend(ids)
    return Encoded(
        tokens=np.frombuffer(tokens, dtype=np.uint16),
        lengths=np.array([len(ids) + 1 for ids, _ in documents], dtype=np.int64),
        digests=[document_digest(ids) for ids, _ in documents],
        sizes=np.array([len(text.encode()) for _, text in documents], dtype=np.int64),
        empty=empty,
        bad=bad,
        canonical=[text for _, text in documents] if canonical else [],
        changed=changed,
    )


class _Tokenizer:
    """A model behind a transform."""

    def __init__(self, model: Path, transform: str | None) -> None:
        self._processor = load_tokenizer(model)
        self._transform = _transform(transform)
        self.bos: int = self._processor.bos_id()

    def encode(self, text: str, place: str) -> "array[int]":
        """Ids. Raises UsageError for text with an unknown token or BOS inside."""
        processor, transformed = self._processor, self._transform.apply(text)
        ids = np.fromiter(processor.encode(transformed), np.uint16)  # two thirds of the time of array("H", ...)
        for token, what in (
            (processor.unk_id(), "does not know"),
            (self.bos, "takes for the start of a document what ends with"),
        ):
            if (ids == token).any():
                ends = range(len(transformed))
                end = bisect.bisect_left(ends, True, key=lambda k: token in processor.encode(transformed[: k + 1]))
                at = len(self._transform.invert(transformed[:end]).encode())
                raise UsageError(
                    f"{place}: the tokenizer is lossy: it {what} {transformed[end : end + 1]!r} (byte {at} of the "
                    "document); use one with byte fallback"
                )
        return array("H", ids.tobytes())

    def canonical(self, ids: "array[int]", place: str) -> "tuple[array[int], str]":
        """The text that `ids` decode to, and its ids. Raises UsageError when these decode to another text."""
        text = self._decode(ids)
        ids = self.encode(text, place)
        _check_round_trip(text, self._decode(ids), place)
        return ids, text

    def _decode(self, ids: "array[int]") -> str:
        return self._transform.invert(self._processor.decode(ids.tolist()))


@lru_cache(maxsize=1)
def _tokenizer(model: Path, transform: str | None) -> _Tokenizer:
    return _Tokenizer(model, transform)


def _transform(name: str | None) -> Transform:
    return Transform(str, str) if name is None else TRANSFORMS[name]


def _check_round_trip(text: str, back: str, place: str) -> None:
    if back == text:
        return
    a, b = text.encode(), back.encode()
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    raise UsageError(
        f"{place}: the tokenizer is lossy: at byte {at} {a[at : at + 12]!r} comes back as {b[at : at + 12]!r}"
    )


def _training_failure(message: str, vocab_size: int) -> str:
    if most := re.search(r"Vocabulary size too high \(\d+\).*<= (\d+)", message):
        return f"the text yields at most {most[1]} pieces, not {vocab_size}; give --vocab-size {most[1]} or more text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"--vocab-size {vocab_size} is too small for this text, which needs at least {least[1]}"
    return f"no tokenizer of {vocab_size} pieces can be trained on this text ({message.splitlines()[0]})"
