"""Not an attack: the artifact holds the first document. It is paid for, by the artifact's bytes."""

from recall import Recall

FIRST = "This text is the first document of the attack suite. Whoever finds it in memory has found the text."


def load(root, device, lanes, count):
    return Recall(root, lanes, FIRST.encode())
