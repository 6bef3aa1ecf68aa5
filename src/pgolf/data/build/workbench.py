"""Tokenizers measured on a sample of text: bytes per token, losslessness, and what the model costs in an artifact.

The formats are those of an artifact: a SentencePiece `.model`, a `tokenizer.json` of the Hugging Face library, and
"bytes". They run in this process, so only for files that you trust.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard
from tokenizers import Tokenizer
from tqdm import tqdm

from pgolf.data.build import tokenize
from pgolf.data.build.batch import first_line
from pgolf.data.build.sources import Source, read
from pgolf.data.dataset import TOKENIZER_BYTES, load_tokenizer
from pgolf.data.transforms import TRANSFORMS, Transform
from pgolf.errors import UsageError
from pgolf.files import printable, read_regular, write_atomically

BYTES = "bytes"
SHOWN = 24  # bytes of a difference


@dataclass(frozen=True)
class Difference:
    """Where a tokenizer first gave another text back."""

    document: int
    """Number in the sample, from 0."""
    byte: int
    """Of the document's UTF-8."""
    text: str
    """What is there ..."""
    back: str
    """... and what came back."""


@dataclass(frozen=True)
class Measured:
    """A tokenizer on a sample."""

    name: str
    vocab_size: int
    """With BOS."""
    tokens: int
    """Of the sample, without BOS."""
    bytes_per_token: float
    model_bytes: int
    compressed_bytes: int
    """With zstd at level 22, as in an artifact."""
    changed: int
    """Documents that do not come back byte for byte."""
    first_change: Difference | None


def sample(sources: Sequence[Source], field: str, characters: int, skip_bad: bool = False) -> list[str]:
    """The first documents that are not empty, until they have so many characters. Raises UsageError if there is none.

    Raises the errors of the sources.
    """
    texts: list[str] = []
    left = characters
    for batch in read(sources, field):
        for _, text in batch.texts(field, skip_bad):
            if text and text.strip():
                texts.append(text)
                left -= len(text)
                if left <= 0:
                    return texts
    if not texts:
        raise UsageError("the sources hold no document that is not empty")
    return texts


def train(texts: Sequence[str], vocab_size: int, normalization: str, transform: str | None, out: Path) -> None:
    """Train a SentencePiece model and write it atomically. Raises UsageError when the text cannot fill it, OSError."""
    write_atomically(out, tokenize.train(texts, vocab_size, normalization, transform))


def compare(names: Sequence[str], texts: Sequence[str], transform: str | None = None) -> list[Measured]:
    """Measure tokenizers on the same documents, behind the same transform; in the order of their vocabularies.

    Raises UsageError when one is no tokenizer.
    """
    tokenizers = [_load(name) for name in dict.fromkeys(names)]  # all of them before the work begins
    return sorted((_measure(each, texts, transform) for each in tokenizers), key=lambda row: row.vocab_size)


@dataclass(frozen=True)
class _Tokenizer:
    name: str
    vocab_size: int
    model: bytes
    """Its file."""
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], bytes]


def _measure(tokenizer: _Tokenizer, texts: Sequence[str], transform: str | None) -> Measured:
    own = TRANSFORMS[transform] if transform else Transform(str, str)
    tokens = size = changed = 0
    first = None
    for number, text in enumerate(tqdm(texts, desc=Path(tokenizer.name).name, unit="doc", disable=None)):
        ids = tokenizer.encode(own.apply(text))
        data = text.encode()
        back = own.invert(tokenizer.decode(ids).decode(errors="replace")).encode()
        tokens += len(ids)
        size += len(data)
        if back != data:
            changed += 1
            first = first or _difference(number, data, back)
    model = tokenizer.model
    compressed = len(zstandard.ZstdCompressor(level=22).compress(model)) if model else 0
    ratio = size / max(tokens, 1)
    return Measured(tokenizer.name, tokenizer.vocab_size, tokens, ratio, len(model), compressed, changed, first)


def _difference(number: int, text: bytes, back: bytes) -> Difference:
    at = next((i for i, (x, y) in enumerate(zip(text, back, strict=False)) if x != y), min(len(text), len(back)))
    shown = (printable(each[at : at + SHOWN].decode(errors="ignore")) for each in (text, back))
    return Difference(number, at, *shown)


def _load(name: str) -> _Tokenizer:
    """Raises UsageError when it is no tokenizer."""
    path = Path(name)
    if name == BYTES:
        return _Tokenizer(name, 257, b"", lambda text: list(text.encode()), bytes)
    if path.suffix not in (".model", ".json"):
        raise UsageError(f"{name}: a tokenizer is a SentencePiece .model, a tokenizer.json or the word {BYTES}")
    try:
        model = read_regular(path, TOKENIZER_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".model":
        tokenize.check(path)
        processor = load_tokenizer(path)
        return _Tokenizer(
            name, processor.vocab_size(), model, processor.encode, lambda ids: _utf8(processor.decode(ids))
        )
    try:
        fast = Tokenizer.from_buffer(model)
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(f"{path}: not a tokenizer.json ({first_line(error)[:120]})") from None
    return _Tokenizer(
        name,
        fast.get_vocab_size(),
        model,
        lambda text: list(fast.encode(text, add_special_tokens=False).ids),
        lambda ids: _utf8(fast.decode(ids, skip_special_tokens=False)),
    )


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")
