"""A side file says how many bytes each token has, each leading space twice, and a score.json says what came out."""

from honest import Counts


def load(root, device, lanes, count):
    return Counts(root, lanes)
