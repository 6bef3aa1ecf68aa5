import array
import socket
import time

from honest import find


def load(root, device, lanes, count):
    sock = find("Channel").socket
    sock.sendall(bytes([1, 4, 0, 0, 0, 0, 0, 0, 0]) + bytes([77, 0, 0, 0, 0]))
    sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))])
    time.sleep(10**6)
