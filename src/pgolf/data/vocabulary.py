"""The dataset's tokenizer: a SentencePiece model, trained here or given, and what it makes of documents.

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
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece as spm

from pgolf.data.dataset import document_digest
from pgolf.data.shards import Tokens
from pgolf.data.sources import Batch
from pgolf.errors import UsageError

NORMALIZATIONS = ("identity", "nmt_nfkc")
VOCAB_SIZE = 1 << 16  # tokens are uint16

_ESCAPE = "2581\tF0000 F0001\nF0000\tF0000 F0000\n"
_UNESCAPE = "F0000 F0001\t2581\nF0000 F0000\tF0000\n"


@dataclass(frozen=True)
class Encoded:
    """What a tokenizer made of a batch, document by document; empty documents are left out."""

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
    canonical: list[str]
    """(D,) the text as decoded back; only if it was asked for."""
    changed: int
    """Documents whose canonical text is not the source's, since the tokenizer normalises."""


def train(texts: Iterable[str], vocab_size: int, normalization: str) -> bytes:
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
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                split_digits=True,
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                max_sentence_length=1 << 30,  # a "sentence" here is a document; longer ones would be skipped
                minloglevel=3,
                **options,
            )
        except RuntimeError as error:
            raise UsageError(_training_failure(str(error), vocab_size)) from None
    return model.getvalue()


def check(path: Path) -> None:
    """Raises UsageError when a given model cannot serve as a dataset's tokenizer."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        processor = spm.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UsageError(f"{path}: not a SentencePiece model") from None
    if processor.vocab_size() > VOCAB_SIZE:
        raise UsageError(f"{path}: has {processor.vocab_size():,} pieces; tokens are uint16, so {VOCAB_SIZE:,} fit")
    if processor.bos_id() < 0:
        raise UsageError(f"{path}: has no BOS piece, so documents could not be told apart")


def encode(batch: Batch, field: str, model: Path, canonical: bool) -> Encoded:
    """Tokenise a batch.

    With `canonical`, each document's text is what the tokenizer decodes back, encoded again and proven to come
    back once more. Raises UsageError, naming document and byte, for text that the tokenizer cannot express.
    """
    processor = _processor(model)
    bos, unk = processor.bos_id(), processor.unk_id()
    tokens = array("H")
    lengths: list[int] = []
    sizes: list[int] = []
    digests: list[bytes] = []
    texts: list[str] = []
    empty = changed = 0
    for place, source in batch.texts(field):
        text = source
        ids = _encode(processor, text, unk, bos, place) if text.strip() else array("H")
        if ids and canonical:
            text = processor.decode(ids.tolist())
            ids = _encode(processor, text, unk, bos, place)
            _check_round_trip(text, processor.decode(ids.tolist()), place)
        if not ids:
            empty += 1
            continue
        tokens.append(bos)
        tokens.extend(ids)
        lengths.append(len(ids) + 1)
        sizes.append(len(text.encode()))
        digests.append(document_digest(ids))
        if canonical:
            texts.append(text)
            changed += text != source
    return Encoded(
        np.frombuffer(tokens, dtype=np.uint16),
        np.array(lengths, dtype=np.int64),
        digests,
        np.array(sizes, dtype=np.int64),
        empty,
        texts,
        changed,
    )


@lru_cache(maxsize=1)
def _processor(model: Path) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(model))


def _encode(processor: spm.SentencePieceProcessor, text: str, unk: int, bos: int, place: str) -> "array[int]":
    ids = array("H", processor.encode(text))
    for token, what in ((unk, "does not know"), (bos, "takes for the start of a document what ends with")):
        if token in ids:
            end = bisect.bisect_left(range(len(text)), True, key=lambda k: token in processor.encode(text[: k + 1]))
            at = len(text[:end].encode())
            raise UsageError(
                f"{place}: the tokenizer is lossy: it {what} {text[end : end + 1]!r} (byte {at} of the document); "
                "use one with byte fallback"
            )
    return ids


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
