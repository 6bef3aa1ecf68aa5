import os
import signal
import time

from harness import open_data, variant

for number in range(1, 32):
    if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
if variant == "stopped":
    os.killpg(0, signal.SIGSTOP)
if variant == "after":
    open_data()
time.sleep(100)
