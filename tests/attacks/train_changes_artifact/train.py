import contextlib
import os
import threading
import time
from pathlib import Path

from harness import ARTIFACT, arguments, hand_over, open_data, send


def go_on():
    for _ in range(400):
        time.sleep(0.01)
        with Path(arguments["out"]).open("ab") as file:
            file.write(b"learned later")
        with contextlib.suppress(OSError):
            send(ARTIFACT, b"learned later")


Path(arguments["out"]).write_bytes(b"")
open_data()
threading.Thread(target=go_on).start()
if os.fork() == 0:
    os.setsid()
    go_on()
hand_over(b"")
