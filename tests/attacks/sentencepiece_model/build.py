import struct


def variants(model: bytes) -> dict[str, tuple[bytes, str]]:
    """Name -> (model, what the refusal says)."""
    varint = b"\xff\xff\xff\xff\x07"  # 2 GiB
    charsmap = struct.pack("<I", 1 << 30) + b"\xff" * 1024
    bad_normaliser = b"\x1a" + bytes([0x80 | (len(charsmap) + 3) & 127, (len(charsmap) + 3) >> 7])
    bad_normaliser += b"\x12" + bytes([0x80 | len(charsmap) & 127, len(charsmap) >> 7]) + charsmap
    return {
        "empty": (b"", "encode: "),
        "noise": (bytes(range(256)) * 64, "encode: "),
        "cut off": (model[: len(model) // 2], "encode: "),
        "piece of 2 GiB": (b"\x0a" + varint + model, "encode: "),
        "no pieces": (b"\x12\x00", "encode: "),
        "deep groups": (b"\x0b" * 100_000, "encode: "),
        "damaged normaliser": (model + bad_normaliser, "encode: "),
        "one piece twice": (b"\x0a\x08\x0a\x01a\x15\0\0\0\0" * 2 + model, "encode: "),
    }
