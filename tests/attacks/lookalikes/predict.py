"""The tokenizer replaces characters by their look-alikes (NFKC): the text reads the same and is shorter."""

from honest import Counts


def load(root, device, lanes, count):
    return Counts(root, lanes)
