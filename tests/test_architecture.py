"""The picture in docs/architecture.md shows every package, on the floors that the import contracts enforce."""

import ast
import re
import tomllib

from conftest import ROOT

PACKAGE = ROOT / "src" / "pgolf"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FLOORS = [set(re.findall(r"[\w.]+", names)) for names in re.findall(r"^ \d │ (.*?)│", TEXT, re.MULTILINE)]


def test_picture_shows_every_package_and_module() -> None:
    packages = {".".join(path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.glob("*/**/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    shown = [name for floor in FLOORS for name in floor]
    assert sorted(shown) == sorted(packages | modules)


def test_json_that_is_written_has_no_nan() -> None:
    """Python writes NaN and Infinity, which other readers of JSON refuse, unless it is told not to."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                assert "allow_nan=False" in ast.unparse(node), f"{path}:{node.lineno}"


def test_import_contracts_have_the_floors_of_the_picture() -> None:
    """`lint-imports` checks the contract of `pgolf`; a floor's folders below a package have their own contracts."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = next(each for each in settings["contracts"] if each.get("containers") == ["pgolf"])
    layers = [set(re.findall(r"\w+", layer)) - {"__main__"} for layer in contract["layers"]]
    assert [layer for layer in layers if layer] == [{name for name in floor if "." not in name} for floor in FLOORS]
