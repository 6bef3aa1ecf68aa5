"""Load the code of a baseline or an artifact: modules that import each other by plain names, such as `model`."""

import importlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@contextmanager
def unpacked(members: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder with an artifact's members."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for member, data in members.items():
            (folder / member).parent.mkdir(parents=True, exist_ok=True)
            (folder / member).write_bytes(data)
        yield folder


@contextmanager
def loaded(*folders: Path, names: tuple[str, ...] = ("predict",)) -> Iterator[Any]:
    """The named modules as attributes, from the first folder that has each; other folders' namesakes stay untouched.

    Runs their code in this process: not for an artifact that you do not trust.
    """
    own = {path.stem for folder in folders for path in folder.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in own & sys.modules.keys()}
    path = list(sys.path)
    sys.path[:0] = map(str, folders)
    importlib.invalidate_caches()
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = path
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(others)
