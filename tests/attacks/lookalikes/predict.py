from honest import Counts


def load(root, device, lanes, count):
    return Counts(root, lanes)
