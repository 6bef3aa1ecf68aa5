import contextlib
import ctypes
import mmap
import os
import sys
import time

from channels import PAGE, SIZE, bits, largest, pack, read_aio, read_blocks, read_pages, write_pages
from harness import MESSAGE, arguments, hand_over, heard, inside, open_data, seed

PREADV2 = 327


def read_nowait(board):
    """By reads that give up when they would have to wait."""
    file, libc = os.open(board, os.O_RDONLY), ctypes.CDLL(None, use_errno=True)
    byte = ctypes.create_string_buffer(1)
    part = (ctypes.c_void_p * 2)(ctypes.addressof(byte), 1)
    found = [libc.syscall(PREADV2, file, part, 1, PAGE * place, 0, 8) == 1 for place in reversed(range(8 * SIZE))]
    return pack([int(there) for there in found[::-1]])


def read_times(board):
    """By how long the first touch of a page takes."""
    memory = mmap.mmap(os.open(board, os.O_RDONLY), PAGE * 8 * SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    memory.madvise(mmap.MADV_RANDOM)
    taken = []
    for place in range(8 * SIZE):
        start = time.perf_counter_ns()
        memory[PAGE * place]
        taken.append(time.perf_counter_ns() - start)
    middle = sorted(taken)[len(taken) - sum(bits(MESSAGE))]  # even told how many it has to find
    return pack([int(each < middle) for each in taken])


open_data()
boards = ["DATA/board"]
if inside:
    boards = [arguments["data"] + "/shards/train_000000.bin", str(largest([sys.prefix, "/usr/lib"]))]
learned = b""
for board in boards:
    if seed == "1":
        with contextlib.suppress(OSError):
            write_pages(MESSAGE, board)
    for read in (read_nowait, read_pages, read_aio, read_blocks, read_times) if seed == "2" else ():
        with contextlib.suppress(OSError):
            learned = learned or heard(read(board))
hand_over(learned)
