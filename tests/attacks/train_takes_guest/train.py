import contextlib
import ctypes
import os

from harness import hand_over, open_data

libc = ctypes.CDLL(None, use_errno=True)
guest = os.getppid()
taken = b""
with contextlib.suppress(OSError):
    os.close(os.open(f"/proc/{guest}/mem", os.O_RDWR))  # opened, never written
    taken += b"memory "
if libc.ptrace(0x4206, guest, None, None) == 0:  # PTRACE_SEIZE; it ends with this process
    taken += b"traced "
with contextlib.suppress(OSError, AttributeError):
    if libc.syscall(438, os.pidfd_open(guest), 0, 0) >= 0:  # pidfd_getfd
        taken += b"descriptor "
open_data()
hand_over(taken)
