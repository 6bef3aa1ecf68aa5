"""A demo dataset without network: documentation from the Python installation.

Documents are the long docstrings of the standard library and of the installed packages (parsed, never imported),
Python's help topics, and the packages' own descriptions. Copies and near copies are removed, so that
the validation text does not repeat the training text.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import pydoc_data.topics
import re
import sysconfig
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pgolf.data.build.build import Settings, build, finished
from pgolf.data.build.sources import FileSource
from pgolf.data.dataset import INDEX
from pgolf.errors import EnvironmentBroken
from pgolf.files import read_regular, write_atomically
from pgolf.machine import process_pool

_NAME = "demo"
_CHARACTERS = (400, 20_000)  # of a document
_PACKAGE_CHARACTERS = 600_000  # at most, so that no package dominates
_TOTAL_CHARACTERS = 8_000_000
VALIDATION_CHARACTERS = 300_000  # a laptop model is scored on it in seconds
_SOURCE_BYTES = 1 << 24  # of a module, at most
_SHINGLE_WORDS = 8
_PROSE = 0.75  # minimum share of letters and spaces; tables and code have less
_SKIPPED = {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3", "__pycache__"}

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_Document = tuple[str, str]


def build_demo(out: Path, workers: int, development: int | None = None) -> dict[str, Any]:
    """Build the demo dataset in `out` and return the contents of its dataset.json.

    `development`: as in `Settings`. A finished folder is left as it is.
    """
    index = finished(out)
    if index is not None and index["build"].get("name") == _NAME:
        if not index.get("environment"):  # built before there was this mark
            index["environment"] = True
            write_atomically(out / INDEX, (json.dumps(index, indent=1, allow_nan=False) + "\n").encode())
        return index
    documents = harvest(workers)
    held_out = _held_out(documents)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "installed-documentation.jsonl"
        lines = (json.dumps({"id": name, "text": text}, allow_nan=False) + "\n" for name, text in documents)
        corpus.write_text("".join(lines), encoding="utf-8")
        settings = Settings(_NAME, [FileSource(corpus, lines=False)], held_out, development, from_environment=True)
        return build(settings, out, workers)


def harvest(workers: int) -> list[_Document]:
    """(name, text) of the documents that this installation has, in an order that depends on the texts alone.

    Raises EnvironmentBroken when there are too few to be of use.
    """
    folders = package_folders()
    with process_pool(workers) as pool:
        found = chain.from_iterable(pool.map(docstrings, folders))
        found = chain(_topics(), _descriptions(), found)
        documents = sorted(found, key=lambda document: hashlib.sha256(document[1].encode()).digest())
    kept: list[_Document] = []
    total = 0
    for name, text in without_near_copies(documents):
        kept.append((name, text))
        total += len(text)
        if total >= _TOTAL_CHARACTERS:
            break
    if total < 4 * VALIDATION_CHARACTERS:
        raise EnvironmentBroken(f"only {total:,} characters of documentation are installed, too few for a dataset")
    return kept


def docstrings(folder: Path) -> list[_Document]:
    """The long docstrings of a package or module, without running any of it."""
    found: list[_Document] = []
    total = 0
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
    for path in files:
        relative = path.relative_to(folder.parent)
        if _SKIPPED.intersection(relative.parts):
            continue
        for name, text in _file_docstrings(path):
            if _is_document(text):
                found.append((f"{relative.with_suffix('')}:{name}", text))
                total += len(text)
        if total >= _PACKAGE_CHARACTERS:
            break
    return found


def without_near_copies(documents: Iterable[_Document]) -> Iterator[_Document]:
    """Documents of which less than half was in the documents before.

    Compared are shingles: runs of eight words, in lower case and without punctuation. A fixed eighth of them,
    chosen by hash, stands for all.
    """
    seen: set[int] = set()
    for name, text in documents:
        words = re.findall(r"\w+", text.lower())
        runs = (" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1)))
        hashes = {zlib.crc32(run.encode()) for run in runs}
        sample = {value for value in hashes if value % 8 == 0} or hashes
        if 2 * len(sample & seen) < len(sample):
            yield name, text
        seen |= sample


def _held_out(documents: list[_Document]) -> int:
    """How many of the first documents make the validation text."""
    total = 0
    for count, (_, text) in enumerate(documents):
        if total >= VALIDATION_CHARACTERS:
            return count
        total += len(text)
    return len(documents)


def package_folders() -> list[Path]:
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    return sorted(
        entry
        for root in roots
        for entry in root.iterdir()
        if entry.name not in _SKIPPED and (entry.suffix == ".py" or (entry.is_dir() and entry.suffix == ""))
    )


def _file_docstrings(path: Path) -> Iterator[_Document]:
    try:
        source = read_regular(path, _SOURCE_BYTES).decode()
        if all(len(quoted) < _CHARACTERS[0] for quoted in source.split('"""')[1::2]):
            return  # most files: no need to parse them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in other people's code
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        if isinstance(node, _DOCUMENTED):
            nodes += node.body
            name = "" if isinstance(node, ast.Module) else node.name
            if text := ast.get_docstring(node):
                yield name, text.strip() + "\n"


def _topics() -> Iterator[_Document]:
    for name, text in pydoc_data.topics.topics.items():
        if _is_document(text := text.strip() + "\n"):
            yield f"topics:{name}", text


def _descriptions() -> Iterator[_Document]:
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        text = inspect.cleandoc(metadata.get("Description") or str(metadata.get_payload() or "")) + "\n"  # type: ignore[attr-defined]
        if _is_document(text):
            yield f"description:{metadata['Name']}", text


def _is_document(text: str) -> bool:
    least, most = _CHARACTERS
    if not least <= len(text) <= most:
        return False
    plain = sum(map(str.isalpha, text)) + text.count(" ")
    return plain >= _PROSE * len(text) and not re.search("[\ud800-\udfff]", text)
