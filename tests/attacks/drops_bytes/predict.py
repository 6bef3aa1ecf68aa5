import re

from honest import Counts


class Own(Counts):
    @staticmethod
    def tell(text):
        return re.sub(rb"[^a-z \0]", b"", text)


def load(root, device, lanes, count):
    return Own(root, lanes)
