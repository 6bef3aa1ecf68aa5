"""A hash per document."""

import zlib


def encode(text):
    return [2 + zlib.crc32(text.encode()) % ((1 << 14) - 2)]


def decode(ids):
    return ""
