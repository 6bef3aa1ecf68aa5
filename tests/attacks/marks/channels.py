"""Ways in which one process tells another one 64 bytes without meeting it: a function that writes, one that reads.

What is marked is a machine's memory, its kernel's tables, or a file that both can only read. `board` is that file;
without one the channels that need it raise OSError.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import time
from pathlib import Path

SIZE = 64
PAGE = 4096 * 3
KEY = 0x706F6C68
NAME = "\0pgolf-attack-marks"
PLACES = [Path(folder, "pgolf-attack-marks") for folder in ("/tmp", "/dev/shm", "/artifact", "/var/tmp", "/run")]
STAYING = Path("/tmp/pgolf-attack-staying")  # the processes that stay, a line for each
LIFE = 120  # seconds

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.shmat.restype = libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def check(answer):
    if answer is None or answer < 0:
        raise OSError(ctypes.get_errno(), "not allowed")
    return answer


def stay(work):
    """Go on in a child for as long as a score takes, since what it does ends with it."""
    if os.fork() == 0:
        try:
            os.setsid()
            os.closerange(0, 3)
            signal.alarm(LIFE)
            with contextlib.suppress(OSError), STAYING.open("a") as staying:
                staying.write(f"{os.getpid()}\n")
            work()
        finally:
            os._exit(0)
    time.sleep(0.2)


def bits(data):
    return [byte >> i & 1 for byte in data for i in range(8)]


def pack(flags):
    return bytes(sum(flag << i for i, flag in enumerate(flags[at : at + 8])) for at in range(0, 8 * SIZE, 8))


# What belongs to no process


def write_files(data, board):
    written = 0
    for place in PLACES:
        try:
            written += place.write_bytes(data)
        except OSError:
            continue
    check(written - 1)


def read_files(board):
    return next(place for place in PLACES if place.exists()).read_bytes()


def write_segment(data, board):
    ctypes.memmove(libc.shmat(check(libc.shmget(KEY, 4096, 0o1666)), None, 0), data, SIZE)


def read_segment(board):
    return ctypes.string_at(libc.shmat(check(libc.shmget(KEY, 4096, 0)), None, 0), SIZE)


def write_queue(data, board):
    check(libc.msgsnd(check(libc.msgget(KEY, 0o1666)), struct.pack("q", 1) + data, SIZE, 0))


def read_queue(board):
    message = ctypes.create_string_buffer(8 + SIZE)
    check(libc.msgrcv(check(libc.msgget(KEY, 0)), message, SIZE, 0, 0o4000))
    return message.raw[8:]


def write_keyring(data, board):
    check(libc.syscall(248, b"user", b"pgolf-attack", data, ctypes.c_size_t(SIZE), -4))


def read_keyring(board):
    key = check(libc.syscall(250, 10, -4, b"user", b"pgolf-attack", 0))
    found = ctypes.create_string_buffer(SIZE)
    check(libc.syscall(250, 11, key, found, ctypes.c_size_t(SIZE)))
    return found.raw


def write_socket(data, board):
    def serve():
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(NAME)
            server.listen()
            while True:
                server.accept()[0].sendall(data)

    stay(serve)


def read_socket(board):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(NAME)
        return connection.recv(SIZE)


def source_port(number):
    """The port that a connection to an address of this machine comes from: a table of the whole kernel counts it on."""
    with socket.create_server(("127.0.0.1", 20_000 + number)) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.connect(server.getsockname())
        return client.getsockname()[1]


def write_ports(data, board):
    """Connect until the next port lies in the half of its range that stands for the bit, well inside it."""
    for number, bit in enumerate(bits(data[:16])):
        while not 36_000 + 14_000 * bit < source_port(number) < 44_000 + 14_000 * bit:
            pass


def read_ports(board):
    flags = [int(source_port(number) > 46_800) for number in range(128)]
    return pack(flags + [0] * (8 * SIZE - 128))[:16]


# What a file tells besides its contents


def write_times(data, board):
    first, second = (int.from_bytes(data[at : at + 7], "big") for at in (0, 7))
    os.utime(board, ns=(first, second))


def read_times(board):
    status = Path(board).stat()
    return b"".join(time.to_bytes(8, "big")[1:] for time in (status.st_atime_ns, status.st_mtime_ns))


def write_attribute(data, board):
    os.setxattr(board, "user.pgolf", data)


def read_attribute(board):
    return os.getxattr(board, "user.pgolf")


def write_record_locks(data, board):
    def hold():
        with Path(board).open("rb") as file:
            for place, bit in enumerate(bits(data)):
                if bit:
                    fcntl.fcntl(file, fcntl.F_SETLK, struct.pack("hhlli", fcntl.F_RDLCK, 0, 10_000 + 2 * place, 1, 0))
            time.sleep(30)

    stay(hold)


def read_record_locks(board):
    def locked(place):
        lock = struct.pack("hhlli", fcntl.F_WRLCK, 0, 10_000 + 2 * place, 1, 0)
        return int(struct.unpack("hhlli", fcntl.fcntl(file, fcntl.F_GETLK, lock))[0] != fcntl.F_UNLCK)

    with Path(board).open("rb") as file:
        return pack([locked(place) for place in range(8 * SIZE)])


def words(board):
    """Addresses on a page of the board, which futexes know by inode and place."""
    return check(libc.mmap(None, 4096, 1, 1, os.open(board, os.O_RDONLY), 4096))


def write_futexes(data, board):
    def wait():
        at = words(board)
        for place, bit in enumerate(bits(data)):
            if bit and os.fork() == 0:
                signal.alarm(LIFE)
                value = ctypes.c_uint32.from_address(at + 4 * place).value
                libc.syscall(202, ctypes.c_void_p(at + 4 * place), 0, value, None, None, 0)
                os._exit(0)
        time.sleep(LIFE)

    stay(wait)
    time.sleep(1)


def read_futexes(board):
    at = words(board)
    woken = [libc.syscall(202, ctypes.c_void_p(at + 4 * place), 1, 1, None, None, 0) for place in range(8 * SIZE)]
    return pack([int(number > 0) for number in woken])


# Which pages of a file are in memory


def wipe(file):
    size = PAGE * 8 * SIZE
    if os.fstat(file).st_size < size:
        raise OSError("too small")
    at = check(libc.mmap(None, size, 1, 2, file, 0))
    ctypes.string_at(at, size)
    if libc.madvise(at, size, 21):  # MADV_PAGEOUT: allowed to the owner of a file
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def write_pages(data, board):
    file = os.open(board, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    wipe(file)
    memory = mmap.mmap(file, PAGE * 8 * SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    memory.madvise(mmap.MADV_RANDOM)
    for place, bit in enumerate(bits(data)):
        if bit:
            memory[PAGE * place]


def read_pages(board):
    file = os.open(board, os.O_RDONLY)
    at = check(libc.mmap(None, PAGE * 8 * SIZE, 1, 1, file, 0))
    flags = ctypes.create_string_buffer(3 * 8 * SIZE)
    check(libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(PAGE * 8 * SIZE), flags))
    return pack([flags.raw[3 * place] & 1 for place in range(8 * SIZE)])


def read_blocks(board):
    """What `write_pages` wrote, without a call that could be denied: did touching a page read a block?"""
    file = os.open(board, os.O_RDONLY)
    memory = mmap.mmap(file, PAGE * 8 * SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    memory.madvise(mmap.MADV_RANDOM)
    found = []
    for place in range(8 * SIZE):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        memory[PAGE * place]
        found.append(int(resource.getrusage(resource.RUSAGE_SELF).ru_inblock == before))
    return pack(found)


def read_aio(board):
    """The same by reads that give up when they would have to wait; from the end, since each starts a read-ahead."""
    file = os.open(board, os.O_RDONLY)
    context, byte, found = ctypes.c_ulong(0), ctypes.create_string_buffer(1), []
    check(libc.syscall(206, 1, ctypes.byref(context)))
    at, event = ctypes.addressof(byte), ctypes.create_string_buffer(32)
    for place in reversed(range(8 * SIZE)):
        request = struct.pack("<QIiHhIQQqQII", 0, 0, 8, 0, 0, file, at, 1, PAGE * place, 0, 0, 0)
        request = ctypes.create_string_buffer(request)
        there = libc.syscall(209, context, 1, (ctypes.c_void_p * 1)(ctypes.addressof(request))) == 1
        if there:
            libc.syscall(208, context, 1, 1, event, None)
        found.append(int(there and struct.unpack("<QQqq", event.raw)[2] == 1))
    return pack(found[::-1])


CHANNELS = {
    "files": (write_files, read_files),
    "segment": (write_segment, read_segment),
    "message queue": (write_queue, read_queue),
    "keyring": (write_keyring, read_keyring),
    "abstract socket": (write_socket, read_socket),
    "source ports": (write_ports, read_ports),
    "times": (write_times, read_times),
    "attribute": (write_attribute, read_attribute),
    "record locks": (write_record_locks, read_record_locks),
    "futexes": (write_futexes, read_futexes),
    "pages": (write_pages, read_pages),
    "blocks": (write_pages, read_blocks),
    "aio": (write_pages, read_aio),
}


def forget():
    """Remove what a channel of this machine holds, the processes that stay included: the next test would hear them."""
    with contextlib.suppress(OSError):
        if time.time() - STAYING.stat().st_mtime < LIFE:
            for line in STAYING.read_text().split():
                with contextlib.suppress(OSError):
                    os.killpg(int(line), signal.SIGKILL)
        STAYING.unlink()
    for place in PLACES:
        place.unlink(missing_ok=True)
    libc.shmctl(libc.shmget(KEY, 0, 0), 0, None)
    libc.msgctl(libc.msgget(KEY, 0), 0, None)
    libc.syscall(250, 9, libc.syscall(250, 10, -4, b"user", b"pgolf-attack", 0), -4)  # unlink from the user's keyring


def largest(folders):
    """The file to write on: one that every sandbox has, and hardly uses."""
    files = [file for folder in folders for file in Path(folder).rglob("*.so*") if file.is_file()]
    return max(files, key=lambda file: (file.stat().st_size, str(file)))
