from recall import Recall

FIRST = "This text is the first document of the attack suite. Whoever finds it in memory has found the text."


def load(root, device, lanes, count):
    return Recall(root, lanes, FIRST.encode())
