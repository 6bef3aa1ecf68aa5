"""What a SentencePiece model file can carry besides a vocabulary.

A re-run hands the tokenizer of an artifact to its trainer before the clock. Whatever else the file held would be
learned in advance, so it may hold only what SentencePiece writes, and what is not the vocabulary counts as source. The
file is a message in the wire format of Protocol Buffers; field numbers: sentencepiece_model.proto of the library.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from pgolf import rules

CHARSMAPS = frozenset(
    {
        # SentencePiece before 0.2.1: nfkc, nmt_nfkc, nfkc_cf, nmt_nfkc_cf
        "557b5397b1133d8abb62f7923e5b53ee496d3e36b9f63fd42625077c33688a14",
        "51d3684747b35ef99cd4802f37cc1ee0c6bec4d060814f774efb1066d3c167f2",
        "b30e4085ba1fad56d2401f4612419b6b3b42c5adc1e04f3aa1806399895d6bdd",
        "6cec34e8016fd0d0a2da28b60b00e36b19a275df83786bf6b494bd033c708f83",
        # 0.2.1
        "52f11028ff8a7df3e009d94a8b6a54d4a8a17132efb4ccc1c9a0a41e432bd91e",
        "79372c41389c2b9b29bc171017ab5400e352debd686b02670a42bec709015074",
        "60833ec11201446659c3549c183b18f024c4007628cc6b3a4e91ae007697b826",
        "22c292c76f503795f30c85d79d30a7f572fff4f49e00392d2d60f4f93e941a1e",
        # 0.2.3
        "7e46d9e08af4b6a37991b04fb8388644c1595a0abcd0f26d6a5d575e2a3663ea",
        "1e2c7b43d3ee9755ceaa2ac335e253d8703604e0249ee1e81156c92b46423844",
        "d8dfef3d6db0eef0742f8b55a73aee7fce6c1e21d26a09b8d3d4b52c42a791cb",
        "2c03512e62f9ed965ec90d85314211b63b5b8aa0395311ea2147eec9ff738907",
    }
)
"""SHA-256 of the standard normalisation rules, 240 kB each, as releases of the library compile them."""

PIECES = 1 << 16  # tokens of shards are uint16

_PIECE, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5  # fields of ModelProto; 4 is data for a self-test
_SETTINGS = {_TRAINER: range(1, 56), _NORMALIZER: range(1, 7), _DENORMALIZER: range(1, 7)}
_CHARSMAP = 2  # field of a normalizer
_TYPES = range(1, 7)  # of pieces
_NORMAL = 1  # the type of a piece that does not say one
_SETTINGS_BYTES = 1 << 19  # walked through at most
_VARINT_BYTES = 10
_UNSOUND = "is not a sound SentencePiece model"


class _Wire(IntEnum):
    """How a value is written."""

    VARINT = 0
    BYTES = 2
    FLOAT = 5


Field = tuple[int, int, int | bytes]
"""Number, wire type and value."""


@dataclass(frozen=True)
class Contents:
    """What a model holds that its author could choose freely."""

    texts: tuple[bytes, ...]
    """Of the pieces."""
    scores: bytes
    """Those that are not what BPE writes: 0 for a special piece, and minus its rank for another; 4 bytes each."""
    other: bytes
    """All but pieces and standard normalisation rules: settings, and rules that are the author's."""

    @property
    def source_bytes(self) -> int:
        """What counts as source: all but a vocabulary of ordinary size."""
        free = min(rules.TOKENIZER_PIECE_BYTES * len(self.texts), rules.TOKENIZER_TEXT_BYTES)
        return max(0, sum(map(len, self.texts)) - free) + len(self.scores) + len(self.other)

    @property
    def text(self) -> bytes:
        """For a look at how dense it is. In alphabetical order, in which vocabularies compress like code."""
        return b"\n".join([*sorted(self.texts), self.scores, self.other])


def read(model: bytes) -> Contents:
    """Raises ValueError for anything that SentencePiece does not write; its message goes on after the file's name."""
    texts: list[bytes] = []
    scores, other = bytearray(), bytearray()
    seen: set[int] = set()
    rank = 0
    for number, wire, value in _fields(model):
        if not isinstance(value, bytes) or wire != _Wire.BYTES or (number != _PIECE and number not in _SETTINGS):
            raise ValueError(f"holds field {number}, which tokenizing does not need")
        if number == _PIECE:
            if len(texts) == PIECES:
                raise ValueError(f"has over {PIECES:,} pieces, and tokens of training shards are uint16")
            text, score, kind = _piece(value, len(texts))
            if score != (-rank if kind == _NORMAL else 0):
                scores += struct.pack("<f", score)
            rank += kind == _NORMAL
            texts.append(text)
        elif number in seen:
            raise ValueError(f"holds field {number} twice")
        else:
            seen.add(number)
            other += _unusual(number, value)
    if len(other) > rules.TOKENIZER_OTHER_BYTES:
        raise ValueError(
            f"holds {len(other):,} bytes besides pieces and standard normalisation rules; the limit is "
            f"{rules.TOKENIZER_OTHER_BYTES:,}"
        )
    return Contents(tuple(texts), bytes(scores), bytes(other))


def _piece(message: bytes, at: int) -> tuple[bytes, float, int]:
    """Text, score and type."""
    text, score, kind = b"", 0.0, _NORMAL
    last = 0
    for number, wire, value in _fields(message):
        match number, wire, value:
            case 1, _Wire.BYTES, bytes():
                text = value
            case 2, _Wire.FLOAT, bytes():
                (score,) = struct.unpack("<f", value)
            case 3, _Wire.VARINT, int() if value in _TYPES:
                kind = value
            case _:
                raise ValueError(f"holds something else in piece {at} than text, score and type")
        if number <= last:
            raise ValueError(f"holds the fields of piece {at} in another order than SentencePiece writes")
        last = number
    return text, score, kind


def _unusual(number: int, message: bytes) -> bytes:
    """Settings without a standard normalisation rule."""
    if len(message) > _SETTINGS_BYTES:
        raise ValueError(f"holds {len(message):,} bytes in its field {number}, more than any normalisation rule has")
    found = message
    for field, wire, value in _fields(message):
        if field not in _SETTINGS[number]:
            raise ValueError(f"holds field {field} in its field {number}, which SentencePiece does not write")
        is_charsmap = number != _TRAINER and (field, wire) == (_CHARSMAP, _Wire.BYTES)
        if is_charsmap and isinstance(value, bytes) and hashlib.sha256(value).hexdigest() in CHARSMAPS:
            found = message.replace(value, b"", 1)
    return found


def _fields(message: bytes) -> Iterator[Field]:
    """The fields of a message. Raises ValueError when it is not sound."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _Wire.VARINT:
            value, at = _varint(message, at)
            yield number, wire, value
            continue
        if wire == _Wire.BYTES:
            size, at = _varint(message, at)
        elif wire == _Wire.FLOAT:
            size = 4
        else:
            raise ValueError(_UNSOUND)
        if at + size > len(message):
            raise ValueError(_UNSOUND)
        yield number, wire, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Value and where it ends. It has to be as short as it can be, since a longer one could carry bits."""
    value = 0
    for length, byte in enumerate(message[at : at + _VARINT_BYTES]):
        value |= (byte & 127) << 7 * length
        if byte < 128:
            if byte or not length:
                return value, at + length + 1
            break
    raise ValueError(_UNSOUND)
