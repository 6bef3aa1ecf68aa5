from honest import Counts


class Plan(Counts):
    plan = 1 << 32


def load(root, device, lanes, count):
    return Plan(root, lanes)
