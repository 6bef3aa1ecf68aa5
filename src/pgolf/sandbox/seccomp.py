"""A small seccomp filter: system calls that an honest predictor never makes and an exploit often does.

The sandbox is sound without it (its files are private, namespaces hide the rest); the filter reduces the kernel code
that hostile code can reach. Classic BPF, as described in seccomp(2).
"""

import platform
import struct

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _EPERM, _SUCCEED, _KILL = 0x7FFF0000, 0x00050001, 0x00050000, 0x80000000
_X32_BIT = 0x40000000
_NUMBER, _ARCH = 0, 4  # offsets in seccomp_data; the low half of argument n lies at 16 + 8 n

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH

DENIED = {  # numbers on x86-64 and aarch64; None: there is no such call
    # Which file pages the machine holds in memory: these read it and change it.
    "mincore": (27, 232), "readahead": (187, 213), "fadvise64": (221, 223), "preadv2": (327, 286),
    "cachestat": (451, 451), "process_madvise": (440, 440),
    "io_setup": (206, 0), "io_destroy": (207, 1), "io_submit": (209, 2), "io_cancel": (210, 3),
    "io_getevents": (208, 4), "io_pgetevents": (333, 292),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # Who else opens or locks a file.
    "flock": (73, 32), "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "inotify_rm_watch": (255, 28), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    # Memory and messages that belong to no process.
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    # Other processes, and the kernel.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282),
    "syslog": (103, 116), "personality": (135, 92), "acct": (163, 89), "reboot": (169, 142),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "lookup_dcookie": (212, 18), "swapon": (167, 224),
    "swapoff": (168, 225), "sethostname": (170, 161), "setdomainname": (171, 162),
    # Namespaces and mounts.
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41), "mount": (165, 40),
    "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "statmount": (457, 457), "listmount": (458, 458), "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
}  # fmt: skip

_COMPILING = {"flock"}  # torch's compile cache locks its files
_GPU = {"memfd_create", "sendmsg", "sendmmsg"}  # the driver
_NETWORK = {"sendmsg", "sendmmsg"}  # collectives

PRETENDED = {  # seem to succeed with a GPU: its device files are the host's, and could carry marks
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip

_SOCKET, _GETSOCKOPT, FCNTL, MADVISE = (41, 198), (55, 209), (72, 25), (28, 233)
# Only unix, beside a GPU netlink too. Vsock and others reach out of a network namespace, and the port that a TCP
# connection comes from, loopback included, is counted on in a table that all namespaces share: kilobits in seconds.
_FAMILIES, _GPU_FAMILIES = (1,), (1, 16)
_NETWORK_FAMILIES = (1, 2, 10, 16)  # the ranks of a trainer, which is not near the text
# SO_COOKIE, SO_NETNS_COOKIE, SO_PEERPIDFD: numbers that the whole machine counts, and nobody else uses
_COOKIES = (57, 71, 77)
LOCKS = (5, 6, 7, 36, 37, 38, 1024, 1026)  # F_GETLK, F_SETLK, F_SETLKW, the same for OFD locks, F_SETLEASE, F_NOTIFY
EVICTIONS = (20, 21)  # MADV_COLD, MADV_PAGEOUT

_Code = list[tuple[int, int, int, int]]


def program(compiler: bool = False, gpu: bool = False, network: bool = False) -> bytes | None:
    """The compiled filter for a sandbox that may compile, holds a GPU, or has a loopback device to use.

    None on a processor whose call numbers are not listed here.
    """
    if platform.machine() not in _ARCHITECTURES:
        return None
    column, arch = _ARCHITECTURES[platform.machine()]
    code: _Code = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _EPERM),
    ]
    allowed = (_COMPILING if compiler else set()) | (_GPU if gpu else set()) | (_NETWORK if network else set())
    families = _NETWORK_FAMILIES if network else _GPU_FAMILIES if gpu else _FAMILIES
    answers = dict.fromkeys(DENIED.keys() - allowed, _EPERM) | (dict.fromkeys(PRETENDED, _SUCCEED) if gpu else {})
    for name, answer in sorted(answers.items()):
        if (number := {**DENIED, **PRETENDED}[name][column]) is not None:
            code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]
    code += _by_argument(_SOCKET[column], 0, families, _ALLOW, _EPERM)
    code += _by_argument(_GETSOCKOPT[column], 2, _COOKIES, _EPERM, _ALLOW)
    if not compiler:
        code += _by_argument(FCNTL[column], 1, LOCKS, _EPERM, _ALLOW)
    code += _by_argument(MADVISE[column], 2, EVICTIONS, _EPERM, _ALLOW)
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _by_argument(number: int, argument: int, values: tuple[int, ...], if_listed: int, otherwise: int) -> _Code:
    """Decide about call `number` by whether its argument is one of `values`."""
    tests = [(_JUMP_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    body = [(_LOAD, 0, 0, 16 + 8 * argument), *tests, (_RETURN, 0, 0, otherwise), (_RETURN, 0, 0, if_listed)]
    return [(_JUMP_EQUAL, 0, len(body), number), *body]
