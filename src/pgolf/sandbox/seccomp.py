"""A small seccomp filter: system calls that an honest predictor never makes and an exploit often does.

The sandbox stands without it (namespaces hide what these calls could reach); it takes kernel code out of the
reach of hostile code. Classic BPF, as described in seccomp(2).
"""

import platform
import struct

_AUDIT_ARCH_X86_64 = 0xC000003E
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_X32_BIT = 0x40000000

_DENIED = {  # x86-64 numbers
    # Which file pages the machine holds in memory is a blackboard between boxes: these read and wipe it.
    "mincore": 27, "readahead": 187, "fadvise64": 221, "preadv2": 327, "cachestat": 451,
    "ptrace": 101, "syslog": 103, "personality": 135, "pivot_root": 155, "chroot": 161, "acct": 163,
    "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
    "init_module": 175, "delete_module": 176, "quotactl": 179, "lookup_dcookie": 212, "clock_settime": 227,
    "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
    "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430,
    "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip


_SOCKET = 41
_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink; vsock and others reach out of a network namespace


def program() -> bytes | None:
    """The compiled filter, or None on a processor whose call numbers are not listed here."""
    if platform.machine() != "x86_64":
        return None
    denied = sorted(_DENIED.values())
    code = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_JUMP_GREATER_EQUAL, len(denied) + len(_FAMILIES) + 2, 0, _X32_BIT),
        *((_JUMP_EQUAL, len(denied) + len(_FAMILIES) + 1 - i, 0, number) for i, number in enumerate(denied)),
        (_JUMP_EQUAL, 0, len(_FAMILIES) + 2, _SOCKET),
        (_LOAD, 0, 0, 16),  # its first argument, the address family
        *((_JUMP_EQUAL, len(_FAMILIES) - i, 0, family) for i, family in enumerate(_FAMILIES)),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
