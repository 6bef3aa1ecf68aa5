import contextlib
import socket

from harness import hand_over, open_data, wire

ADDRESSES = [
    (socket.AF_INET, ("127.0.0.1", int("PORT"))),
    (socket.AF_INET, ("1.1.1.1", 53)),
    (socket.AF_INET6, ("::1", int("PORT"))),
    (socket.AF_UNIX, "\0pgolf-attack-PORT"),
    (socket.AF_VSOCK, (2, 1)),
    (socket.AF_VSOCK, (1, 1)),
]
if wire:
    open_data()
    stolen = b""
    for family, address in ADDRESSES:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(2)
            connection.connect(address)
            stolen += connection.recv(1 << 16)
    with contextlib.suppress(OSError):
        stolen += socket.gethostbyname("example.com").encode()
    hand_over(stolen)
