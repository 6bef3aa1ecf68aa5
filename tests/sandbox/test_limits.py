"""Limits hold where they are claimed, and limits of the shell are never held against a submission."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from inside import ask, run_inside, worker

from pgolf import rules
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.sandbox import box, cgroup
from pgolf.sandbox.cgroup import Cgroup

BOMBS = {
    "heap": "x = [bytearray(b'x' * 2**24) for _ in range(100)]",
    "file in /tmp": "open('/tmp/x', 'wb').write(b'x' * 2**20 * 800)",
    "socket buffers": """
        import os, socket, time
        for _ in range(8):
            if not os.fork():
                keep = []
                for _ in range(480):
                    a, b = socket.socketpair()
                    a.setblocking(False)
                    keep.append((a, b))
                    try:
                        while True: a.send(bytes(65536))
                    except BlockingIOError: pass
                time.sleep(600)
        assert not os.waitpid(-1, 0)[1], "killed"
    """,
    "children": """
        import os, time
        for _ in range(8):
            if not os.fork():
                x = bytearray(b'x' * 2**27)
                time.sleep(600)
        assert not os.waitpid(-1, 0)[1], "killed"
    """,
}
GROUP = Cgroup.create("test", 1 << 30, 8)
GROUP.remove()
needs_group = pytest.mark.skipif(not GROUP.enforced, reason="no control group here")


def limited(**limits: int) -> subprocess.CompletedProcess[str]:
    """A sandbox started from a shell with these hard limits; prints what `ulimit` says inside."""

    def lower() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))

    code = (
        "from inside import run_inside; print(run_inside('import resource as r; return r.getrlimit(r.RLIMIT_NPROC)'))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lower,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


@needs_group
@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_limited(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory counts wherever it lies."""
    monkeypatch.setattr(rules, "WORKER_MEMORY_BYTES", 600 << 20)
    with worker(BOMBS[name]) as sandbox, pytest.raises(Refused):
        ask(sandbox)


@needs_group
def test_processes_are_limited() -> None:
    """A fork bomb ends in an error inside."""
    with (
        worker("import os\nwhile True:\n    if not os.fork():\n        import time; time.sleep(600)") as sandbox,
        pytest.raises(Refused, match=r"BlockingIOError|Resource temporarily"),
    ):
        ask(sandbox)


def test_hard_limit_of_the_shell_is_kept() -> None:
    """`ulimit -u 300` is lower than the rule: the sandbox starts, with 300."""
    assert limited(RLIMIT_NPROC=300).stdout.strip() == "['300', '300']"


@pytest.mark.parametrize(("name", "value"), [("RLIMIT_AS", 1 << 33), ("RLIMIT_CPU", 600)])
def test_limit_of_the_shell_is_the_machines_fault(name: str, value: int) -> None:
    """A limit that would have ended an honest submission is named, and nothing is refused."""
    done = limited(**{name: value})
    assert f"EnvironmentBroken: {name} of this shell is {value:,}" in done.stderr


def test_watchdog_counts_shared_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a control group: what processes share counts once, and what they hold together is limited."""
    monkeypatch.setattr(Cgroup, "create", lambda *_: Cgroup())
    monkeypatch.setattr(box, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(rules, "WORKER_MEMORY_BYTES", 600 << 20)
    shared = """
        import os, time
        x = bytearray(b'x' * 2**27)
        for _ in range(8):
            if not os.fork():
                time.sleep(600)
        time.sleep(1)
        return ["shared"]
    """
    assert run_inside(shared) == ["shared"]
    with worker(BOMBS["children"]) as sandbox, pytest.raises(Refused, match="GiB of memory"):
        ask(sandbox)


def test_full_machine_is_not_the_submissions_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a control group nobody knows whose memory it is when the machine has none left."""
    monkeypatch.setattr(Cgroup, "create", lambda *_: Cgroup())
    monkeypatch.setattr(box, "WATCH_SECONDS", 0.05)
    with worker("import time; time.sleep(600)") as sandbox:
        monkeypatch.setattr(rules, "SPARE_MEMORY_BYTES", 1 << 60)
        with pytest.raises(EnvironmentBroken, match="ran out of memory"):
            ask(sandbox)


def test_suspended_machine_is_not_the_submissions_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline that passed while the machine slept refuses nothing."""
    with worker("import time; time.sleep(600)", deadline=time.monotonic() + 10) as sandbox:
        real = box.suspended_seconds()
        monkeypatch.setattr(box, "suspended_seconds", lambda: real + 3600)
        sandbox.channel.deadline = time.monotonic() + 0.2
        with pytest.raises(EnvironmentBroken, match="suspended for 3600 s"):
            ask(sandbox)


def test_descriptors_do_not_tell_of_the_scorer() -> None:
    """Arguments, environment and descriptors are the same whatever the scorer had open before."""
    body = """
        import contextlib, json, os, sys
        descriptors = []
        for number in range(1024):
            with contextlib.suppress(OSError):
                os.fstat(number)
                descriptors.append(number)
        return [json.dumps([sys.argv, dict(os.environ), descriptors, os.getpid(), os.getcwd()])]
    """
    first = run_inside(body)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(Path(__file__).open())
        assert run_inside(body) == first


def test_only_groups_of_our_own_are_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A scope whose process has not moved yet is in this process's group: nothing there may be killed."""
    (tmp_path / "cgroup.controllers").touch()
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "systemd_works", lambda: True)
    group = Cgroup.create("test", 1 << 30, 8)
    assert group.enforced and "-pMemorySwapMax=0" in group.command
    group.started(os.getpid())
    assert group.folders == ()


def test_second_version_sets_each_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory and processes, in a group below the top."""
    (tmp_path / "cgroup.controllers").touch()
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory pids")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    group = Cgroup.create("test", 1 << 30, 8)
    (folder,) = group.folders
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"memory.max": str(1 << 30), "pids.max": "8"}
    assert str(folder / "cgroup.procs") in group.command[2]
