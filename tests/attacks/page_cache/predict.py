"""A blackboard between boxes: which pages of a file that all of them see the machine holds in memory.

The tokenizer's box wipes a large library out of memory and reads back the pages that stand for ones; the predictor's
box asks which pages are there without touching them. It survives the audit, whose box can read it as well.
"""

import contextlib
import ctypes
import mmap

import numpy as np
from board import BITS, PAGE, open_board
from recall import Recall


def load(root, device):
    text = b""
    with contextlib.suppress(OSError, ValueError):
        there = pages_in_memory(open_board())[:: PAGE // mmap.PAGESIZE][:BITS]
        text = np.packbits(there & 1).tobytes()
    return Recall(root, text)


def pages_in_memory(board):
    """A flag for each page of the file."""
    view = np.frombuffer(mmap.mmap(board, 0, prot=mmap.PROT_READ), dtype=np.uint8)
    flags = np.zeros(-(-len(view) // mmap.PAGESIZE), dtype=np.uint8)
    address, flags_address = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(flags.ctypes.data)
    if ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(view)), flags_address):
        raise OSError("not told")
    return flags
