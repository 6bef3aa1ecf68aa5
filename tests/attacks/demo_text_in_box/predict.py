import inspect
from pydoc_data import topics

from recall import Recall


def load(root, device, lanes, count):
    text = "\0".join(topics.topics.values())
    return Recall(root, lanes, text.encode("ascii", "ignore") + inspect.getsource(inspect).encode())
