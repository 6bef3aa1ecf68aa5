"""The bubblewrap command line: what the sandbox is made of, and why it cannot be made on some machines."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pgolf.errors import EnvironmentBroken
from pgolf.sandbox import environment
from pgolf.sandbox.private_copy import Copy

MINIMUM = (0, 8)  # the first with --disable-userns
ARTIFACT = Path("/artifact")
HARNESS = Path("/harness")
EMPTY = HARNESS / "empty"
RANDOM = HARNESS / "random"

_NAMESPACES = (
    *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
    *("--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
)
_OWN_PROC = {"self", "thread-self", "mounts", "net"}  # links to what is the process's own
_DRIVER_PROC = {"driver", "devices", "modules"}  # what the GPU's driver reads
_STREAMS = {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # the kernel's own numbers, in linux/nsfs.h
_FIRST_MOUNT_NAMESPACES = (0xEFFFFFF8, 0xF0000000, 0xF0000001)  # before 6.18 the first that it gave out
_RANDOM_BYTES = 1 << 16
_WITHOUT = "or pass --no-sandbox for a score that is not eligible"


@cache
def program(search: str | None = None) -> str:
    """The absolute path of bwrap. Raises EnvironmentBroken when it is missing or too old."""
    found = shutil.which("bwrap", path=search)
    if found is None:
        raise EnvironmentBroken(f"bubblewrap is not installed: apt install bubblewrap, {_WITHOUT}")
    printed = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    if tuple(map(int, re.findall(r"\d+", printed)[:2])) < MINIMUM:
        raise EnvironmentBroken(
            f"{found}: {printed or 'bwrap of unknown version'} is too old, 0.8 is needed (Debian 12, Ubuntu 24.04, "
            f"or the sources at github.com/containers/bubblewrap), {_WITHOUT}"
        )
    return str(Path(found).absolute())


def command(
    copy: Copy,
    members: Mapping[str, int],
    filter_fd: int | None,
    static: Mapping[str, int],
    variables: Mapping[str, str],
    cuda: bool,
    nodes: Iterable[Path],
    disk_bytes: int,
    network: bool,
) -> list[str]:
    """The command line up to the command that it runs.

    `members` and `static` map the artifact's files and files of /proc to the descriptors that hold their contents.
    """
    line = [program(os.environ.get("PATH")), *_NAMESPACES, "--clearenv"]
    for name, value in variables.items():
        line += ["--setenv", name, value]
    # /tmp first: the Python environment may lie below it.
    proc = "--proc" if cuda else "--tmpfs"  # /proc/self/net counts the packets of the whole machine
    line += ["--size", str(disk_bytes), "--tmpfs", "/tmp", proc, "/proc", *_dev()]
    if network:  # the ranks of a trainer share memory there
        line += ["--size", str(disk_bytes), "--tmpfs", "/dev/shm"]
    for source, place in copy.mounts():
        line += ["--ro-bind", str(source), str(place)]
    line += _proc(copy.root / EMPTY.relative_to("/"), static, cuda)
    if cuda:
        line += ["--ro-bind", "/sys", "/sys"]
        for node in nodes:
            line += ["--dev-bind", str(node), str(node)]
    line += ["--dir", str(ARTIFACT)]
    for name, fd in members.items():
        line += ["--perms", "0444", "--file", str(fd), str(ARTIFACT / name)]
    if filter_fd is not None:
        line += ["--seccomp", str(filter_fd)]
    for path in ("/dev", "/") if cuda else ("/proc", "/dev", "/"):  # the driver writes its threads' names to /proc
        line += ["--remount-ro", path]
    return [*line, "--chdir", str(ARTIFACT), "--"]


def _dev() -> list[str]:
    """A /dev without device files: those are the host's, and their owner could mark or break them."""
    line = ["--tmpfs", "/dev", "--dir", "/dev/shm", "--symlink", "/tmp/null", "/dev/null"]
    line += ["--symlink", str(RANDOM), "/dev/random", "--symlink", str(RANDOM), "/dev/urandom"]
    for name, target in _STREAMS.items():
        line += ["--symlink", f"/proc/self/{target}", f"/dev/{name}"]
    return line


def harness_files(whole: bool) -> dict[Path, bytes]:
    """Further files of the sandbox: the harness's modules (the `whole` package), and those in place of device files."""
    home = Path(__file__).parent.parent
    names = [
        *("__init__.py", "sandbox/__init__.py", "sandbox/wire.py", "sandbox/guest.py"),
        *("data/__init__.py", "data/transforms.py"),
    ]
    if whole:
        names = [str(path.relative_to(home)) for path in home.rglob("*.py")]
    files = {HARNESS / "pgolf" / name: (home / name).read_bytes() for name in names}
    return {**files, EMPTY: b"", RANDOM: os.urandom(_RANDOM_BYTES)}


def _proc(empty: Path, static: Mapping[str, int], cuda: bool) -> list[str]:
    """What /proc has: the static files, beside a GPU also the processes' own folders and what its driver reads."""
    if not cuda:
        return [part for name, fd in static.items() for part in ("--ro-bind-data", str(fd), f"/proc/{name}")]
    line: list[str] = ["--tmpfs", "/proc/1", "--remount-ro", "/proc/1"]  # bubblewrap's own
    if Path("/proc/driver").is_dir():
        line += ["--ro-bind", "/proc/driver", "/proc/driver"]
    for path in sorted(Path("/proc").iterdir()):
        name = path.name
        if name.isdecimal() or name in _OWN_PROC or name in _DRIVER_PROC:
            continue
        if name in static:
            line += ["--ro-bind-data", str(static[name]), str(path)]
        elif path.is_dir():
            line += ["--tmpfs", str(path), "--remount-ro", str(path)]
        else:
            line += ["--ro-bind", str(empty), str(path)]
    return line


def gpu_nodes(device: str) -> list[Path]:
    """The device files of one GPU ("cuda:N") or of all ("cuda"), and those that all of them share."""
    nodes = sorted(path for path in Path("/dev").glob("nvidia*") if not path.is_dir())
    nodes += sorted(Path("/dev/nvidia-caps").glob("*"))
    if device.startswith("cuda:"):
        import torch

        with contextlib.suppress(OSError, AttributeError, RuntimeError, AssertionError):
            card: Any = torch.cuda.get_device_properties(int(device.removeprefix("cuda:")))
            place = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
            about = Path(f"/proc/driver/nvidia/gpus/{place}/information").read_text()
            if minor := re.search(r"Device Minor:\s*(\d+)", about):
                return [n for n in nodes if not re.fullmatch(r"nvidia\d+", n.name) or n.name == f"nvidia{minor[1]}"]
    return nodes


def variables(device: str) -> dict[str, str]:
    """The sandbox's environment variables: nothing of this process's but which GPUs to use."""
    given = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "USER": "nobody"}
    given["PYTHONDONTWRITEBYTECODE"] = "1"
    given["THP_MEM_ALLOC_ENABLE"] = "1"  # torch: large pages for large tensors, where the kernel grants them
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if device.startswith("cuda:"):
        index = int(device.removeprefix("cuda:"))
        listed = visible.split(",")
        given["CUDA_VISIBLE_DEVICES"] = listed[index] if visible and index < len(listed) else str(index)
    elif device != "cuda":
        given["CUDA_VISIBLE_DEVICES"] = ""
    elif visible:
        given["CUDA_VISIBLE_DEVICES"] = visible
    if device.startswith("cuda") and (folder := environment.driver_folder()):
        given["LD_LIBRARY_PATH"] = str(folder)
    return given


def static_proc(memory_bytes: int) -> dict[str, bytes]:
    """Files of /proc that programs read, without counters; the memory is the sandbox's limit."""
    names = ("MemTotal", "MemFree", "MemAvailable")
    memory = "".join(f"{name}: {memory_bytes // 1024} kB\n" for name in names)
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines(keepends=True)
        processors = b"".join(line for line in lines if not line.startswith((b"cpu MHz", b"bogomips")))
        return {"cpuinfo": processors, "meminfo": memory.encode()}
    return {}


def why_not(printed: str) -> str:
    """One sentence for a sandbox that could not be made: what bubblewrap said, the cause, and the remedy."""
    said = next(iter(printed.strip().splitlines()[-1:]), "") or "it said nothing"
    said = "".join(c if c.isprintable() else " " for c in said)[:300]
    return f"bubblewrap cannot make a sandbox here ({said}); {next(_remedies(printed))}, {_WITHOUT}"


def _remedies(printed: str) -> Iterator[str]:
    """Remedies, the likeliest first."""
    if kernel_setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        yield (
            "AppArmor forbids user namespaces to programs without a profile (Ubuntu 24.04): "
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    if kernel_setting("kernel/unprivileged_userns_clone") == "0":
        yield "user namespaces are switched off: sudo sysctl kernel.unprivileged_userns_clone=1"
    if kernel_setting("user/max_user_namespaces") == "0":
        yield "user namespaces are switched off: sudo sysctl user.max_user_namespaces=10000"
    if in_container():
        yield "this is a container, which must be started with --privileged; or score on the machine itself"
    if "Resource temporarily unavailable" in printed:
        yield "this user may start no more processes: raise `ulimit -u`"
    if "No space left" in printed:
        yield "the disk or the memory is full: make room"
    yield "a sandbox needs user namespaces, which `unshare -Ur true` tries"


def in_container() -> bool:
    """Whether this is a container and not a machine, as far as one can tell from inside."""
    if _namespace("pid") != _FIRST_PID_NAMESPACE:
        return True
    marked = "container" in os.environ or any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))
    return marked and _namespace("mnt") not in _FIRST_MOUNT_NAMESPACES  # a machine made of an image is marked, too


def _namespace(kind: str) -> int:
    with contextlib.suppress(OSError):
        return Path("/proc/self/ns", kind).stat().st_ino
    return 0


def kernel_setting(name: str) -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys", name).read_text().strip()
    return ""
