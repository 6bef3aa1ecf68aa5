"""A SentencePiece model whose tokens are bytes: id = byte + 4, after padding 0, BOS 1, EOS 2 and unknown 3.

The contest's byte260 shards come with a description of this tokenizer in JSON. As a SentencePiece model it is read by
everything that reads the other variants. Field numbers: sentencepiece_model.proto of the library.
"""

import struct

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0 to 3
BOS = 1

_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6  # ModelProto.SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType


def byte_model() -> bytes:
    """The serialised model. It is lossless: `decode(encode(text)) == text` for every text."""
    kinds = [_UNKNOWN if name == "<unk>" else _CONTROL for name in SPECIAL]
    pieces = [*zip(SPECIAL, kinds, strict=True), *((f"<0x{byte:02X}>", _BYTE) for byte in range(256))]
    model = b"".join(
        _bytes(1, _bytes(1, piece.encode()) + b"\x15" + struct.pack("<f", 0.0) + _int(3, kind))
        for piece, kind in pieces
    )
    trainer = _int(3, _BPE) + _int(4, len(pieces)) + _int(35, 1)  # byte fallback
    trainer += _int(40, 3) + _int(41, BOS) + _int(42, 2) + _int(43, 0)  # ids: unknown, BOS, EOS, padding
    # No dummy prefix, no white space removed, and a space stays one byte rather than the three of U+2581.
    normalizer = _bytes(1, b"identity") + _int(3, 0) + _int(4, 0) + _int(5, 0)
    return model + _bytes(2, trainer) + _bytes(3, normalizer)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
