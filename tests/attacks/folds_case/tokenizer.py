"""Bytes of the text in small letters."""


def encode(text):
    return list(text.lower().encode())


def decode(ids):
    return bytes(ids).decode()
