import struct
import time

from harness import ARTIFACT, hand_over, open_data, variant, wire

open_data()
if variant == "late":
    time.sleep(1.5)
    print("trained in 0.0 s")
    hand_over(b"learned")
print("trained in 0.0 s", flush=True)
wire.sendall(struct.pack("<BI", ARTIFACT, 20))
for _ in range(20):
    wire.sendall(b"x")
    time.sleep(0.1)
wire.recv(1)
