from channels import bits, source_port
from harness import MESSAGE, hand_over, heard, open_data, seed, wire

COUNT = 32  # more take longer to write than the kernel keeps its secret, on a busy machine

if wire:
    open_data()
    if seed == "1":
        for number, bit in enumerate(bits(MESSAGE)[:COUNT]):
            while not 36_000 + 14_000 * bit < source_port(number) < 44_000 + 14_000 * bit:
                pass
        hand_over(b"")
    found = [int(source_port(number) > 46_800) for number in range(COUNT)]
    hand_over(heard(bytes(sum(bit << i for i, bit in enumerate(found[at : at + 8])) for at in range(0, COUNT, 8))))
