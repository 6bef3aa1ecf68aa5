"""A sandbox reads fresh files, as few as its role needs, and finds all that it declared."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from inside import ask, run_inside, worker

from pgolf.errors import EnvironmentBroken
from pgolf.sandbox import environment, place, private_copy

SEEN = """
import os
found = []
for folder, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if os.path.join(folder, f) not in ("/proc", "/dev/fd")]
    for name in files:
        try:
            status = os.lstat(os.path.join(folder, name))
        except FileNotFoundError:
            continue
        found.append(f"{status.st_dev}:{status.st_ino} {os.path.join(folder, name)}")
return found
"""


def numbers(lines: list[str]) -> dict[str, str]:
    """Path to device and inode."""
    return {path: number for number, _, path in (line.partition(" ") for line in lines)}


def test_two_sandboxes_share_no_inode() -> None:
    """No file of one is a file of the next, nor of the host: what is marked on it goes with it."""
    with worker(SEEN) as one, worker(SEEN) as other:  # together, since numbers are given out again
        assert one.group.folders != other.group.folders or not one.group.enforced
        assert one.group.enforced == other.group.enforced
        first, second = numbers(ask(one)), numbers(ask(other))
    assert len(first) > 1000
    assert not set(first.values()) & set(second.values())
    host = set()
    for path in second:
        if Path(path).exists():
            status = os.lstat(path)
            host.add(f"{status.st_dev}:{status.st_ino}")
    assert host and not host & set(second.values())


def test_nothing_of_the_machine_can_be_marked() -> None:
    """No device file, nothing writable but /tmp."""
    seen = run_inside("""
        import os, stat
        marks = []
        for folder, folders, files in os.walk("/"):
            folders[:] = [f for f in folders if os.path.join(folder, f) not in ("/proc", "/tmp", "/dev/fd")]
            for name in (*files, "."):
                path = os.path.join(folder, name)
                if stat.S_ISCHR(os.lstat(path).st_mode) or stat.S_ISBLK(os.lstat(path).st_mode):
                    marks.append(path)
                try:
                    os.utime(path, follow_symlinks=False)
                    marks.append(path)
                except OSError:
                    pass
        for descriptor in (0, 1):
            if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                marks.append(f"descriptor {descriptor}")
        return marks
    """)
    assert seen == [""]


def test_proc_tells_of_nothing() -> None:
    """Two static files, no process and no counter: /proc/self/net would count the packets of the whole machine."""
    seen = run_inside("""
        import os
        cpus = open("/proc/cpuinfo").read()
        memory = {line.split()[1] for line in open("/proc/meminfo")}
        return [sorted(os.listdir("/proc")), "processor" in cpus, "MHz" in cpus, memory]
    """)
    kilobytes = place.limits("probe").memory_bytes // 1024
    assert seen == ["['cpuinfo', 'meminfo']", "True", "False", f"{{'{kilobytes}'}}"]


def test_roles_read_only_what_they_need() -> None:
    """encode and decode get no torch, nobody gets test suites or a compiler that was not declared."""
    for role, torch in (("encode", False), ("decode", False), ("predict", True)):
        files = environment.listing(role).files
        assert any("/torch/" in str(path) for path in files) == torch
        assert not [path for path in files if path.name == "g++" or "/torch/test/" in str(path)]
        assert not [path for path in files if "/pgolf/" in str(path) or "/numpy/tests/" in str(path)]
        assert environment.listing(role).bytes < (1 << 30 if torch else 1 << 28)


def test_declared_packages_come_with_what_they_require() -> None:
    """By distribution name, without regard to case; the requirements of requirements too."""
    folders = {path.parts[-2] for path in environment.listing("encode", ("Jinja2",)).files}
    assert {"jinja2", "markupsafe"} <= folders


def test_missing_package_is_the_machines_fault() -> None:
    """It is named with the command that installs it."""
    with pytest.raises(EnvironmentBroken, match=r"no-such-package is not .* pip install no-such-package"):
        worker("", packages=["no-such-package"])


def test_scorer_and_sandbox_agree_on_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel, a module without metadata that only sys.path leads to, and a name of neither."""
    (tmp_path / "only_a_module.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    environment.check_installed(["NumPy", "only-a-module"])
    assert tmp_path / "only_a_module.py" in environment.listing("encode", ("only-a-module",)).files
    with pytest.raises(EnvironmentBroken, match=r"no-such-package is not .* pip install no-such-package"):
        environment.check_installed(["numpy", "no-such-package"])


def test_a_wheel_of_versioned_libraries_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of CUDA are: no Python in it, and all names end in a version."""
    library, info = tmp_path / "vendor" / "lib" / "libvendor.so.9", tmp_path / "vendor_libraries-1.dist-info"
    for folder in (library.parent, info):
        folder.mkdir(parents=True)
    library.touch()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor-libraries\nVersion: 1\n")
    (info / "RECORD").write_text("vendor/lib/libvendor.so.9,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert library in environment.listing("encode", ("vendor-libraries",)).files


@pytest.mark.parametrize("init", [True, False])
def test_a_folder_is_not_a_package(init: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, and folders that only have the name of a declared package, stay outside."""
    folder = tmp_path / ("here" if init else "elsewhere")
    (folder / "data_of_mine").mkdir(parents=True)
    (folder / "data_of_mine" / "text").write_text("what is scored")
    if init:
        (folder / "data_of_mine" / "__init__.py").touch()
        monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(EnvironmentBroken, match="data-of-mine is not"):
        worker("", packages=["data-of-mine"])


def test_packages_over_pythonpath_are_found(tmp_path: Path) -> None:
    """Packages that lie where PYTHONPATH leads (pip --target, modules of a cluster) are there inside."""
    package = tmp_path / "elsewhere" / "faraway"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("here = 'found'\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from inside import run_inside; "
        "print(run_inside('import faraway; return [faraway.here]', packages=['faraway']))"
    )
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "['found']", done.stderr


def test_copy_is_removed_even_of_a_killed_scorer() -> None:
    """On leaving, on an exception, and by the next one where the scorer had no time to."""
    wanted = environment.Listing((Path(sys.executable).resolve(),), (), (), 1)
    with private_copy.private_copy(wanted) as made:
        copies = made.root.parent
        assert (made.root.stat().st_mode & 0o777) == 0o700
    assert not made.root.exists()
    with pytest.raises(KeyError), private_copy.private_copy(wanted) as made:
        raise KeyError
    assert not made.root.exists()
    code = (
        "import os, sys; from pathlib import Path; from pgolf.sandbox.environment import Listing\n"
        "from pgolf.sandbox.private_copy import private_copy\n"
        "with private_copy(Listing((Path(sys.executable).resolve(),), (), (), 1)) as made:\n"
        "    print(made.root, flush=True); os.kill(os.getpid(), 9)"
    )
    left = Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
    assert left.parent == copies and left.exists()
    with private_copy.private_copy(wanted):
        assert not left.exists()


def test_copy_is_removed_while_a_thread_fills_it() -> None:
    """A signal can end the copying before all of its threads have ended."""
    wanted = environment.Listing((Path(sys.executable).resolve(),), (), (), 1)

    def fill(folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            for n in range(100_000):
                (folder / str(n)).touch()

    with private_copy.private_copy(wanted) as made:
        thread = threading.Thread(target=fill, args=(made.root,))
        thread.start()
        while not (made.root / "5000").exists():
            time.sleep(0.001)
    thread.join()
    assert not list(made.root.parent.glob(f"{made.root.name}*"))


def test_full_disk_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the copy: one sentence with the remedy, and nothing is left."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = set(private_copy.base(1).glob("pgolf-copy-*"))
    monkeypatch.setattr(private_copy.os, "sendfile", full)
    with pytest.raises(EnvironmentBroken, match=r"No space left on device.*TMPDIR"):
        worker("")
    assert set(private_copy.base(1).glob("pgolf-copy-*")) == before


def test_copy_goes_to_a_disk_where_memory_has_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small or missing /dev/shm costs time, not the score."""
    monkeypatch.setattr(private_copy, "available_memory", lambda: 0)
    monkeypatch.setattr(private_copy.tempfile, "tempdir", str(tmp_path))
    with worker("return [1]") as sandbox:
        assert sandbox.copied is not None and sandbox.copied.root.parent == tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_declared_compiler_compiles() -> None:
    """g++ makes a shared library with OpenMP and Python's headers, and the sandbox loads it."""
    assert run_inside(
        """
        import ctypes, subprocess, sysconfig
        open("/tmp/a.cpp", "w").write(
            "#include <Python.h>\\n#include <omp.h>\\n#include <vector>\\n"
            'extern "C" int f() { std::vector<int> v(3); return v.size(); }'
        )
        include = sysconfig.get_path("include")
        subprocess.run(["g++", "-O2", "-fopenmp", "-shared", "-fPIC", "-I" + include, "/tmp/a.cpp", "-o", "/tmp/a.so"],
            check=True)
        return [ctypes.CDLL("/tmp/a.so").f()]
        """,
        compiler=True,
    ) == ["3"]
