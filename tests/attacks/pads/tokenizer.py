"""A pad after each byte."""


def encode(text):
    return [i for byte in text.encode() for i in (byte, 257)]


def decode(ids):
    return bytes(i for i in ids if i != 257).decode()
