from channels import read_ports, write_ports
from harness import MESSAGE, hand_over, heard, open_data, seed, wire

if wire:
    open_data()
    if seed == "1":
        write_ports(MESSAGE, "")
    hand_over(heard(read_ports("")) if seed == "2" else b"")
