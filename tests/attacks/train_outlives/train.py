import contextlib
import os
import signal
import socket
import time

from channels import NAME
from harness import MESSAGE, hand_over, heard, open_data, seed, wire


def daemon():
    """In a session of its own, deaf to signals, below no process that the harness started."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 32):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            os.closerange(0, 3)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(f"{NAME}-{os.environ['RANK']}")
                server.listen()
                while True:
                    server.accept()[0].sendall(MESSAGE)
        os._exit(0)
    os.wait()


if seed == "1":
    daemon()
if wire is None:
    time.sleep(100)
open_data()
time.sleep(1)
learned = b""
for rank in range(3 if seed == "2" else 0):
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"{NAME}-{rank}")
        learned = learned or heard(connection.recv(64))
hand_over(learned)
