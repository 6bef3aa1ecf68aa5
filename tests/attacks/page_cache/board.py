"""The file that both see."""

import os
import site
from pathlib import Path

PAGE = 4096 * 3
BITS = 8 * 400


def open_board():
    """A large library that neither of the boxes loads."""
    names = ["pyarrow/libarrow.so*", "torch/lib/libtorch_cuda.so", "scipy.libs/libscipy_openblas*"]
    files = [file for folder in site.getsitepackages() for name in names for file in Path(folder).glob(name)]
    board = os.open(max(files, key=lambda file: file.stat().st_size), os.O_RDONLY)
    if os.fstat(board).st_size < PAGE * BITS:
        raise OSError("too small")
    os.posix_fadvise(board, 0, 0, os.POSIX_FADV_RANDOM)
    return board
