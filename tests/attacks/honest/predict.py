"""Not an attack: the model that the attacks are compared with."""

from honest import Counts


def load(root, device):
    return Counts(root)
