"""What the filter denies is denied, and what a predictor needs is not."""

import errno
import platform

import pytest
from inside import run_inside

from pgolf.sandbox import seccomp

COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
needs_filter = pytest.mark.skipif(COLUMN is None, reason="no filter for this processor")

CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*map(ctypes.c_long, arguments))
    return ctypes.get_errno() if result < 0 else 0
"""


@needs_filter
def test_denied_calls_are_denied() -> None:
    """Each listed call, a memory advice that evicts and each command that locks fails with EPERM."""
    numbers = {name: pair[COLUMN] for name, pair in seccomp.DENIED.items() if pair[COLUMN or 0] is not None}
    calls = [(number, 0, 0, 0, 0, 0, 0) for number in numbers.values()]
    calls += [(seccomp.FCNTL[COLUMN or 0], 0, command, 0) for command in seccomp.LOCKS]
    calls += [(seccomp.MADVISE[COLUMN or 0], 0, 0, advice) for advice in seccomp.EVICTIONS]
    answers = run_inside(CALL + f"return [call(*each) for each in {calls}]")
    assert set(answers) == {str(errno.EPERM)}, dict(zip(calls, answers, strict=True))


@needs_filter
def test_needed_calls_are_not() -> None:
    """Advice on memory, descriptors, sockets between own processes, and files work."""
    assert run_inside("""
        import fcntl, mmap, os, socket, subprocess, sys, tempfile, threading
        memory = mmap.mmap(-1, 1 << 20)
        memory.madvise(mmap.MADV_DONTNEED)
        a, b = socket.socketpair()
        a.send(b"x")
        fcntl.fcntl(a, fcntl.F_GETFL)
        with tempfile.NamedTemporaryFile() as file:
            os.chmod(file.name, 0o700)
        thread = threading.Thread(target=print)
        thread.start()
        child = subprocess.run([sys.executable, "-c", "print(1)"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return [b.recv(1), child.stdout, os.urandom(4) != os.urandom(4), open("/dev/urandom", "rb").read(4) != b"    "]
    """) == ["b'x'", "b'1\\n'", "True", "True"]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_tables_name_each_call_once(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two names share a number, and every jump of the program stays inside it."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    column = {"x86_64": 0, "aarch64": 1}[machine]
    table = {**seccomp.DENIED, **seccomp.PRETENDED}
    numbers = [pair[column] for pair in table.values() if pair[column] is not None]
    assert len(numbers) == len(set(numbers))
    for options in ({}, {"compiler": True}, {"gpu": True}):
        code = seccomp.program(**options)
        assert code is not None and len(code) % 8 == 0 and len(code) // 8 < 4096
        for at in range(0, len(code), 8):
            if code[at] in (0x15, 0x35):
                assert at // 8 + 1 + max(code[at + 2], code[at + 3]) < len(code) // 8


def test_other_processors_have_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number means another call there, so there is no program rather than a wrong one."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert seccomp.program() is None
