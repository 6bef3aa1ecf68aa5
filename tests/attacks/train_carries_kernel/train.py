import contextlib
import sys

from channels import CHANNELS, largest
from harness import MESSAGE, hand_over, heard, inside, open_data, seed

BOARD = largest([sys.prefix, "/usr/lib"]) if inside else "/nowhere"
SLOW = {"source ports", "pages", "blocks", "aio", "files"}  # folders of their own

open_data()
learned = b""
for name, (write, read) in CHANNELS.items():
    if name not in SLOW:
        with contextlib.suppress(OSError, StopIteration, ValueError):
            if seed == "1":
                write(MESSAGE, BOARD)
            else:
                learned = learned or heard(read(BOARD))
hand_over(learned)
