"""What a process of a run asks of the machine."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from pgolf.train.ranks import Ranks
Ranks().join()
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(4 << 20) for _ in range(4)]  # of 16 MiB
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_used_again_on_a_cpu() -> None:
    """After some rounds (aligned blocks shift at first) the kernel has no more pages to provide."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)}
    output = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    faults = [int(line) for line in output.stdout.split()]
    assert max(faults[-4:]) < faults[0] / 8
