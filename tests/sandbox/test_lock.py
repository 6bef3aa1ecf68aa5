"""One holder at a time, whatever happens to the file, and never for ever."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from inside import run_inside

from pgolf.errors import EnvironmentBroken
from pgolf.sandbox import lock

HOLDER = "import sys, time; from pgolf.sandbox import lock\nwith lock.hold(): print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of the test's own."""
    path = tmp_path / "lock"
    monkeypatch.setenv("PGOLF_LOCK", str(path))
    return path


@pytest.fixture
def holder() -> "subprocess.Popen[str]":
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_waiting_names_the_holder_and_ends(holder: "subprocess.Popen[str]") -> None:
    """Who waits hears for whom, once, and gives up with the holder's name."""
    said: list[str] = []
    with pytest.raises(EnvironmentBroken, match=rf"pid {holder.pid}"), lock.hold(0.5, said.append):
        pass
    assert len(said) == 1 and f"pid {holder.pid}" in said[0]


def test_killed_holder_leaves_it_free(holder: "subprocess.Popen[str]") -> None:
    """The kernel gives the lock back."""
    holder.kill()
    holder.wait()
    with lock.hold(5):
        pass


def test_threads_exclude_each_other() -> None:
    """Two threads of one process never hold it together."""
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(3):
            with lock.hold(30, lambda _: None):
                inside += 1
                most = max(most, inside)
                time.sleep(0.01)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_replaced_file_does_not_make_two_holders(file: Path) -> None:
    """Who comes after the file was deleted takes the new one; a lock on a deleted file is none."""
    with lock.hold(1):
        first = file.stat().st_ino
        file.rename(file.with_name("moved"))
        with lock.hold(1):
            assert file.stat().st_ino != first
    descriptor = os.open(file, os.O_RDWR)
    file.unlink()
    with lock.hold(1):
        assert file.stat().st_ino != os.fstat(descriptor).st_ino
    os.close(descriptor)


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "device"])
def test_prepared_name_is_refused(kind: str, file: Path) -> None:
    """Nothing but a regular file of this user is opened, and nothing blocks."""
    target = file.with_name("target")
    match kind:
        case "link":
            file.symlink_to(target)
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "device":
            if os.geteuid() != 0:
                pytest.skip("only root makes device files")
            os.mknod(file, 0o600 | 0o020000, os.makedev(1, 3))
    with pytest.raises(EnvironmentBroken, match=r"lock"), lock.hold(1):
        pass
    assert not target.exists()


def test_own_lock_is_not_the_standard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A score under a lock of one's own says so."""
    assert not lock.is_standard()
    monkeypatch.delenv("PGOLF_LOCK")
    assert lock.is_standard()


def test_sandbox_neither_sees_nor_inherits_it(file: Path) -> None:
    """No descriptor of the lock, and no such path."""
    with lock.hold(1):
        mark = file.stat()
        seen = run_inside(f"""
            import os
            held = []
            for number in range(1024):
                try:
                    held.append(os.fstat(number))
                except OSError:
                    pass
            lock = {mark.st_dev, mark.st_ino}
            paths = [os.path.exists({str(file)!r}), os.path.exists("/run/pgolf.lock")]
            return [len(held) > 0, *paths, lock in [(seen.st_dev, seen.st_ino) for seen in held]]
        """)
    assert seen == ["True", "False", "False", "False"]
