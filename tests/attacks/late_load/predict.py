"""Is ready when all of the time is over but a moment, in case loading is not on the clock."""

import time

from honest import Counts


def load(root, device, lanes, count):
    time.sleep(5)
    return Counts(root, lanes)
