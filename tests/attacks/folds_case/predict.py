from honest import Counts


class Own(Counts):
    @staticmethod
    def tell(text):
        return text.lower()


def load(root, device, lanes, count):
    return Own(root, lanes)
