"""Declares a larger vocabulary than its rows have, so that the scorer might read beyond them."""

from honest import Counts


def load(root, device, lanes, count):
    return Counts(root, lanes)
