"""What the tests of the trainers share: their modules under their own names, and runs as processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pgolf import rules
from pgolf.artifact import read
from pgolf.submission.modules import loaded


def load(names: Sequence[str], *folders: Path) -> Iterator[Any]:
    """Modules of the folders, earlier ones first, gone afterwards: every baseline has some of the same names."""
    with loaded(*folders, names=tuple(names)) as modules:
        yield modules


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def restore_signals() -> Iterator[None]:
    """A trainer that runs inside the tests leaves its handlers behind."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(trainer: Path, args: Sequence[str], ranks: int = 0, **more: Any) -> subprocess.Popen[str]:
    """A trainer as a process of its own, under torchrun when `ranks` says so, in the worst of environments.

    A notebook's MPLBACKEND does not exist outside it, and the terminal knows no letter beyond ASCII.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, str(trainer), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "ascii"}
    environment |= {"MPLBACKEND": "module://notebook.backend"} | more.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": default_signals} | more
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def default_signals() -> None:
    """Also where the tests run under nohup or in the background of a script."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def losses(log: Path) -> list[float]:
    return [line["loss"] for line in lines(log) if "loss" in line]


def wait_for_steps(log: Path) -> None:
    deadline = time.monotonic() + 90
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.05)


def unpack(path: Path, folder: Path) -> Path:
    """A laptop artifact's members as files."""
    folder.mkdir()
    for name, data in read(path, rules.TRACKS["laptop"].artifact_bytes).members.items():
        (folder / name).write_bytes(data)
    return folder


# Runs the Python file that its first argument names, without what only Linux has.
LINUX_ONLY = """
import mmap, os, resource, runpy, select, signal, socket, sys

for name in (
    "sched_getaffinity sched_setaffinity sched_setscheduler memfd_create pidfd_open eventfd splice copy_file_range "
    "posix_fadvise posix_fallocate getxattr setxattr listxattr getrandom pipe2 fdatasync getresuid setresuid unshare "
    "setns O_PATH O_TMPFILE O_DIRECT MFD_CLOEXEC"
).split():
    vars(os).pop(name, None)
for module, names in (
    (signal, "sigtimedwait sigwaitinfo pidfd_send_signal SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL"),
    (resource, "prlimit RLIMIT_RTPRIO RLIMIT_NICE RLIMIT_MSGQUEUE RLIMIT_SIGPENDING"),
    (mmap, "MAP_POPULATE MADV_HUGEPAGE"),
    (select, "epoll"),
    (socket, "SO_PEERCRED AF_NETLINK"),
):
    for name in names.split():
        vars(module).pop(name, None)

def refuse(event, args):
    if event == "open" and str(args[0]).startswith(("/proc/", "/sys/", "/dev/shm")):
        frame = sys._getframe(1)
        while frame and not frame.f_globals.get("__name__", "").startswith("psutil"):
            frame = frame.f_back
        if frame is None:  # psutil reads /proc on Linux only
            raise FileNotFoundError(2, "is not here", args[0])

sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
