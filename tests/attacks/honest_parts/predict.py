from honest import Counts


def load(root, device, lanes=1, count=0):
    return Counts(root, lanes)
