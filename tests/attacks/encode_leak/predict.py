import contextlib
import ctypes
import socket

from leak import KEY, NAME, PLACES, SIZE
from recall import Recall


def load(root, device, lanes, count):
    stolen = b""
    for place in PLACES:
        with contextlib.suppress(OSError):
            stolen = stolen or place.read_bytes()
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(NAME)
        stolen = stolen or connection.recv(SIZE)
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    if (segment := libc.shmget(KEY, SIZE, 0)) >= 0:
        stolen = stolen or ctypes.string_at(libc.shmat(segment, None, 0), SIZE)
    return Recall(root, lanes, stolen)
