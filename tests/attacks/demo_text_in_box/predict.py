"""The text was made of files that every Python has: it looks the last bytes up in the help topics of its sandbox."""

import inspect
from pydoc_data import topics

from recall import Recall


def load(root, device, lanes, count):
    text = "\0".join(topics.topics.values())
    return Recall(root, lanes, text.encode("ascii", "ignore") + inspect.getsource(inspect).encode())
