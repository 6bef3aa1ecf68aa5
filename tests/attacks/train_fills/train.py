import os
import sys
import time
from pathlib import Path

from harness import inside, open_data, variant


def disk():
    with Path("/tmp/fills").open("wb") as file:
        while True:
            file.write(bytes(1 << 20))
            file.flush()


def sparse():
    with Path("/tmp/sparse").open("wb") as file:
        file.truncate(1 << 40)  # takes no room
        sys.exit(7)


def memory():
    held = []
    while True:
        held.append(os.urandom(1 << 12) * (1 << 12))


def processes():
    while True:
        if os.fork() == 0:
            time.sleep(100)


def descriptors():
    while True:
        os.pipe()


def output():
    while True:
        print("x" * 10_000)


open_data()
try:
    if inside:
        globals()[variant]()
except OSError as error:
    os._exit(error.errno)
