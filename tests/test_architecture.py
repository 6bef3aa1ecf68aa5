"""The picture in docs/architecture.md names every package of `src/pgolf`, and imports go down it."""

import ast
import re
import tomllib
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "src" / "pgolf"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FLOORS = {
    name: int(floor)
    for floor, names in re.findall(r"^ (\d) │ (.*?)│", TEXT, re.MULTILINE)
    for name in re.findall(r"[\w.]+", names)
}
PACKAGES = {".".join(path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.glob("*/**/__init__.py")}
GROUND = min(FLOORS.values())


def room_of(module: str) -> str:
    """The name in the picture that a module below `pgolf.` belongs to: the longest that begins its name."""
    return max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len, default="")


def imports(path: Path) -> set[str]:
    """The modules of pgolf that a module imports anywhere in it, without `pgolf.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("pgolf.") for name in found if name.startswith("pgolf.")}


def test_picture_names_all_packages_and_modules() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert FLOORS.keys() == PACKAGES | modules


def test_imports_go_down_the_picture() -> None:
    """Of every module but the entry points (`__main__`), each of which starts the command line."""
    wrong = []
    for path in PACKAGE.glob("**/[!_]*.py"):
        room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        for imported in map(room_of, imports(path)):
            if imported not in ("", room) and FLOORS[imported] >= FLOORS[room] > GROUND:
                wrong.append(f"{path.relative_to(PACKAGE)} (floor {FLOORS[room]}) imports {imported}")
    assert not wrong


def test_import_contracts_name_every_package() -> None:
    """Each package of the picture stands in one of the contracts that CI checks, if there are any."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"].get("importlinter")
    if settings is not None:
        assert {room_of(name) for name in re.findall(r"pgolf\.([\w.]+)", str(settings))} >= PACKAGES
