"""Data in source code is found, and code is not taken for data."""

import base64
import random

from conftest import ROOT
from pgolf.artifact import code_in
from pgolf.noise import noisy
from pgolf.rules import NOISE_RATE

CODE = {path.name: path.read_bytes() for path in sorted((ROOT / "src" / "pgolf").rglob("*.py"))}
NOISE = base64.b64encode(random.Random(1).randbytes(6000))


def test_code_is_no_noise() -> None:
    """Nor are the baselines, alone or together."""
    baselines = {
        f"{folder.name}/{name}": code for folder in ROOT.glob("baselines/*") for name, code in code_in(folder).items()
    }
    assert not list(noisy(CODE)) and not list(noisy(baselines))
    assert not any(list(noisy({name: data})) for name, data in baselines.items())


def test_noise_is_found_in_the_file_that_holds_it() -> None:
    found = dict(noisy(CODE | {"files.py": CODE["files.py"] + b'X = "' + NOISE + b'"\n'}))
    assert list(found) == ["files.py"] and found["files.py"] > NOISE_RATE


def test_noise_in_many_small_files_is_found() -> None:
    parts = {f"part{at:04d}.py": b'X = "' + NOISE[at : at + 500] + b'"' for at in range(0, len(NOISE), 500)}
    assert len(list(noisy(CODE | parts))) > 2


def test_noise_in_the_names_of_empty_files_is_found() -> None:
    coded = base64.b64encode(random.Random(2).randbytes(13_000), altchars=b"-_").decode()
    names = [f"{coded[at : at + 90]}.py" for at in range(0, len(coded), 90)]
    assert len(list(noisy(CODE | dict.fromkeys(names, b"")))) > 2


def test_nothing_is_no_noise() -> None:
    assert not list(noisy({})) and not list(noisy({"a.py": b"", "b.py": b"x = 1"}))
