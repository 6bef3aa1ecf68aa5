"""Bytes of the normalised text."""

import unicodedata


def encode(text):
    return list(unicodedata.normalize("NFKC", text).encode())


def decode(ids):
    return bytes(ids).decode()
