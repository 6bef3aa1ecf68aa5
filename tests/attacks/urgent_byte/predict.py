import socket

from honest import Counts, find


class Urgent(Counts):
    def step(self, ids, lane):
        find("Channel").socket.send(b"\7", socket.MSG_OOB)
        return super().step(ids, lane)


def load(root, device, lanes, count):
    return Urgent(root, lanes)
