from honest import find


def load(root, device, lanes, count):
    sock = find("Channel").socket
    sock.sendall(bytes([1, 4, 0, 0, 0, 0, 0, 0, 0]) + bytes([7, 255, 255, 255, 255]) * 1000)
    while sock.recv(1 << 16):
        pass
