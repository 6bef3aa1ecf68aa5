import contextlib
import os
import signal
import time

from harness import inside, open_data, variant

open_data()
if inside:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.kill(1, number)
    if variant == "parent":
        os.kill(os.getppid(), signal.SIGKILL)
    else:
        os.kill(-1, signal.SIGKILL)
time.sleep(100)
