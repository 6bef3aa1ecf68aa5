"""How processes end: with the one that started them."""

import subprocess
import sys

LATE = """
import os, sys, time
from pgolf.machine import end_with_parent
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    end_with_parent(parent)
    print("alive")
"""


def test_a_process_whose_parent_has_ended_already_ends_too() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("", "")
