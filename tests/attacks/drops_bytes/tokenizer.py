"""Bytes of small letters and spaces."""

import re


def encode(text):
    return list(re.sub(r"[^a-z ]", "", text).encode())


def decode(ids):
    return bytes(ids).decode()
