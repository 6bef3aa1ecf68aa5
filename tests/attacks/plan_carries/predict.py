"""A plan is 32 bits that a decoder is told: this one states more, or changes its mind after it has seen the text."""

from honest import Counts


class Plan(Counts):
    plan = 1 << 32


def load(root, device, lanes, count):
    return Plan(root, lanes)
