"""The files a sandbox can read: only those that its role needs.

These are the interpreter, the standard library, the packages that the submission declared with what they require, and
the shared libraries that all of these load; a compiler where one is declared. `private_copy` copies it.
"""

import contextlib
import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from pgolf.errors import EnvironmentBroken

ROLE_PACKAGES = {
    "encode": ("numpy", "sentencepiece", "tokenizers"),
    "decode": ("numpy", "sentencepiece", "tokenizers"),
    "predict": ("numpy", "torch"),
    "probe": ("numpy", "torch"),
    "train": ("numpy", "torch", "sentencepiece", "zstandard", "psutil", "packaging", "scipy", "tqdm", "tyro"),
}
OPTIONAL = {"tokenizers"}
_NOT_IMPORTED = {"huggingface-hub"}  # tokenizers requires it to download models
_TESTED = {"numpy", "scipy", "sympy", "networkx", "mpmath"}  # their tests are large, and nothing imports them
_COMPILER_PROGRAMS = ("sh", "g++", "gcc", "c++", "cc", "as", "ld", "which", "openssl")  # torch.compile starts the last
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip"}
_STDLIB_SKIPPED |= {"lib2to3", "__pycache__"}
_COMPILED = f".{sys.implementation.cache_tag}.pyc"


@dataclass(frozen=True)
class Listing:
    """The files that a sandbox can read."""

    files: tuple[Path, ...]
    """Regular files; no part of their paths is a link."""
    links: tuple[tuple[Path, str], ...]
    """Symbolic links on the way to them, and where they point."""
    packages: tuple[Path, ...]
    """Folders for `sys.path`."""
    bytes: int


@cache
def listing(role: str, packages: tuple[str, ...] = (), compiler: bool = False, cuda: bool = False) -> Listing:
    """What `role` reads, with the packages that the submission declared and what they require.

    Raises EnvironmentBroken when a package or the compiler is not here.
    """
    files = _Files()
    _add_interpreter(files)
    folders: dict[Path, None] = {}
    wanted = [*ROLE_PACKAGES.get(role, ()), *packages]
    check_installed(name for name in wanted if canonicalize_name(name) not in OPTIONAL)
    for name in _closure(wanted):
        if folder := _add_package(files, name, compiler):
            folders[folder] = None
    if compiler:
        _add_compiler(files)
    if cuda and (driver := driver_folder()):
        for pattern in ("libcuda.so*", "libnvidia-*.so*", "libcudadebugger.so*"):
            files.add_all(driver.glob(pattern))
    _add_libraries(files)
    return Listing(
        tuple(sorted(files.sizes)), tuple(sorted(files.links.items())), tuple(folders), sum(files.sizes.values())
    )


@cache
def driver_folder() -> Path | None:
    """Where libcuda lies: as this process loaded it, or as the linker finds it."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")  # however the linker finds it: then it is among the maps
    with contextlib.suppress(OSError):
        if loaded := re.search(r" (/.*)/libcuda\.so", Path("/proc/self/maps").read_text()):
            return Path(loaded[1])
        if known := re.search(r"libcuda\.so\.1 .*=> (/.*)/", _run(_tool("ldconfig"), "-p")):
            return Path(known[1])
    return None


class _Files:
    """Files, and each link on the way to one of them."""

    def __init__(self) -> None:
        self.sizes: dict[Path, int] = {}
        self.links: dict[Path, str] = {}
        self._real = {Path("/"): Path("/")}

    def add(self, path: Path) -> None:
        """Add one file, or a link and its target; skip what does not exist."""
        place = self._folder(path.parent) / path.name
        if place in self.sizes or place in self.links:
            return
        if place.is_symlink():
            self.links[place] = str(place.readlink())
            self.add(place.parent / self.links[place])
        elif place.is_file():
            self.sizes[place] = place.stat().st_size

    def add_all(self, paths: Iterable[Path]) -> None:
        """Add several files, and of a Python source the compiled form too, so that the sandbox need not compile it."""
        for path in paths:
            self.add(path)
            if path.suffix == ".py":
                self.add(path.parent / "__pycache__" / (path.stem + _COMPILED))

    def _folder(self, folder: Path) -> Path:
        """The folder without links on the way to it; they are recorded."""
        if folder not in self._real:
            parent = self._folder(folder.parent)
            real = parent.parent if folder.name == ".." else parent / folder.name
            if real.is_symlink():
                self.links[real] = str(real.readlink())
                real = self._folder(parent / self.links[real])
            self._real[folder] = real
        return self._real[folder]


def _tree(folder: Path, skipped: Iterable[str] = ()) -> Iterator[Path]:
    """All files below a folder, but not below folders with one of the names `skipped`."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped]
        yield from (Path(parent, name) for name in names)


def _add_interpreter(files: _Files) -> None:
    names = ("bin/python", "bin/python3", f"bin/python3.{sys.version_info.minor}", "pyvenv.cfg")
    files.add_all([Path(sys.executable), *(Path(sys.prefix, name) for name in names)])
    for key in ("stdlib", "platstdlib"):
        folder = Path(sysconfig.get_path(key, vars={"base": sys.base_prefix, "platbase": sys.base_exec_prefix}))
        files.add_all(_tree(folder, _STDLIB_SKIPPED | {path.name for path in folder.glob("config-*")}))
    files.add_all([Path("/etc/ld.so.cache"), *_tree(Path("/usr/lib/locale/C.utf8"))])


def _closure(declared: Sequence[str]) -> list[str]:
    """The declared packages and all that these require here, by their normalised names."""
    found = dict.fromkeys(canonicalize_name(name) for name in declared)
    waiting = [(name, "") for name in found]
    done = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        for required in _requirements(name):
            child = canonicalize_name(required.name)
            if child in _NOT_IMPORTED or (required.marker and not required.marker.evaluate({"extra": extra})):
                continue
            found[child] = None
            new = {(child, part) for part in ("", *required.extras)} - done
            waiting += new
            done |= new
    return list(found)


def _requirements(name: str) -> Iterator[Requirement]:
    distribution = _distribution(name)
    for line in (distribution and distribution.requires) or ():
        with contextlib.suppress(InvalidRequirement):  # of an old package; what it needs has to be declared
            yield Requirement(line)


def check_installed(names: Iterable[str]) -> None:
    """Raises EnvironmentBroken for a declared package that a sandbox would not find here.

    Found is what has metadata, such as a wheel, and what only sys.path leads to, such as a module of a cluster.
    """
    for name in names:
        if _package_files(canonicalize_name(name))[0] is None:
            fix = f"install it: {sys.executable} -m pip install {name}"
            raise EnvironmentBroken(f"the package {name} is not in this Python environment; {fix}")


def _add_package(files: _Files, name: str, headers: bool) -> Path | None:
    """Add an installed package; returns its folder for sys.path, None if it is not installed."""
    folder, paths = _package_files(name)
    if folder is not None:
        files.add_all(p for p in paths if p.is_relative_to(folder) and _needed(name, p.relative_to(folder), headers))
    return folder


def _package_files(name: str) -> tuple[Path | None, list[Path]]:
    """A package's folder on sys.path and its files: by its own list, or all below where its module is found."""
    module = name.replace("-", "_")
    if distribution := _distribution(name):
        folder = Path(str(distribution.locate_file("")))
        paths = [folder / file for file in distribution.files or ()]
        if any(path.suffix == ".py" or ".so" in path.suffixes for path in paths):  # an editable package lists none
            return folder, paths
        for top in (distribution.read_text("top_level.txt") or module).split():
            with contextlib.suppress(ImportError, ValueError):
                if found := _module_files(importlib.util.find_spec(top)):
                    return found
    return _module_files(importlib.machinery.PathFinder.find_spec(module, _search())) or (None, [])


def _module_files(spec: importlib.machinery.ModuleSpec | None) -> tuple[Path, list[Path]] | None:
    """The same for a module, None for a folder without __init__.py: it may be any folder of that name."""
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    origin = Path(spec.origin)
    if not spec.submodule_search_locations:
        return origin.parent, [origin]
    home = origin.parent
    metadata = home.parent.glob(f"{home.name}-*.dist-info/*")
    return home.parent, [*_tree(home), *_tree(home.with_name(f"{home.name}.libs")), *metadata]


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    return next(iter(importlib.metadata.distributions(name=name, path=_search())), None)


def _search() -> list[str]:
    """Where packages may lie: sys.path without the working directory, which may hold the text."""
    here = Path.cwd()
    return [path for path in sys.path if path and Path(path).exists() and Path(path).resolve() != here]


def _needed(name: str, path: Path, headers: bool) -> bool:
    """Whether a file of a package (relative to sys.path) is read when the package runs."""
    if "__pycache__" in path.parts or ".." in path.parts:
        return False
    if name in _TESTED:
        return "tests" not in path.parts
    if name == "torch" and len(path.parts) > 2:
        if path.parts[1] == "bin":
            return path.name == "torch_shm_manager"  # `import torch` looks for it
        return path.parts[1] not in ("test", "share") and (
            headers or (path.parts[1] != "include" and path.suffix != ".a")
        )
    return True


def _add_compiler(files: _Files) -> None:
    """g++ with the programs that it starts, headers, and the libraries that it links."""
    if not (compiler := shutil.which("g++")):
        raise EnvironmentBroken("the submission declares a compiler, and g++ is not here; apt install g++")
    programs = [shutil.which(name) for name in _COMPILER_PROGRAMS]
    files.add_all(Path(program) for program in programs if program)
    for name in ("cc1plus", "cc1", "collect2"):
        files.add(Path(_run(compiler, f"-print-prog-name={name}").strip()))
    library = Path(_run(compiler, "-print-file-name=libgcc.a").strip()).parent
    files.add_all(path for path in library.iterdir() if re.search(r"\.(o|a|so|spec)$", path.name))
    searched = _run(compiler, "-E", "-x", "c++", "-v", "/dev/null").partition("search starts here:\n")[2]
    others = {"node", *(path.name for path in Path("/usr/include").glob("llvm*"))}  # large, and of other compilers
    for line in (*searched.splitlines(), f" {sysconfig.get_path('include')}"):
        if line.startswith(" "):
            files.add_all(_tree(Path(line.strip()), others))
    system = Path(_run(compiler, "-print-file-name=crt1.o").strip()).parent
    for name in ("c", "m", "mvec", "pthread", "dl", "rt", "util"):
        files.add_all(path for kind in (".so", ".a", "_nonshared.a") for path in system.glob(f"lib{name}{kind}"))
    files.add_all(system.glob("*crt*.o"))


def _add_libraries(files: _Files) -> None:
    """The shared libraries that the files load, wherever they lie, and the dynamic linker."""
    binaries = [path for path in files.sizes if ".so" in path.name or (os.access(path, os.X_OK) and _is_elf(path))]
    printed = _run(_tool("ldd"), *map(str, binaries))
    for library in map(Path, set(re.findall(r"(?:=> |^\t)(/.+) \(0x", printed, re.MULTILINE))):
        files.add(library)
        if library.name.startswith("libmkl_"):  # it loads its kernels by name
            files.add_all(library.parent.glob("libmkl_*.so*"))


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _tool(name: str) -> str:
    """A program that may lie where only root looks."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/bin:/sbin:/usr/sbin") or name


def _run(*command: str) -> str:
    """What a command prints, its messages included, in English."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    ).stdout
