"""An attack: a folder of tests/attacks and what its attack.toml says. tests/attacks/README.md explains the fields."""

import importlib.util
import io
import tarfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import zstandard
from attack_tools.defences import DEFENCES
from attack_tools.texts import TEXTS, documents

from conftest import ALL

FOLDER = Path(__file__).parent.parent / "attacks"
MEMBERS = Path(__file__).parent / "members"
TEMPLATE = Path(__file__).parent / "template"
ENDINGS = ("refused", "no gain", "refused or no gain", "does not count", "allowed")
BUILDS = ("artifact", "manifest", "tokenizer.json", "tokenizer.model")
MANIFEST = {"author": "attack", "track": "unlimited", "tokenizer": "bytes", "vocab_size": 257, "bos": 256}
MANIFEST |= {"form": "step", "lanes": 64}


@dataclass(frozen=True)
class Attack:
    """Raises ValueError for a description that contradicts itself, TypeError for an unknown field."""

    folder: Path
    exploits: str
    ending: str
    reason: str = ""
    """A part of the refusal, or the reason why the score does not count."""
    without: str = ""
    """The defence without which it gains."""
    gain_bits: float = 0.0
    """What it gains at least without the defence, or where it is allowed."""
    no_counterfactual: str = ""
    sandbox: bool = False
    """Whether it needs the sandbox to fail; the others are run without."""
    text: str = "english"
    build: str = ""
    """What its build.py makes variants of, each with its own refusal; empty: it has a predict.py."""
    test: str = ""
    """The test that runs it in place of the general one."""
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks = {
            f"ending is one of {ENDINGS}": self.ending in ENDINGS,
            f"build is one of {BUILDS}": self.build in ("", *BUILDS),
            f"text is one of {tuple(TEXTS)}": self.text in TEXTS,
            f"without is one of {tuple(DEFENCES)}": self.without in ("", *DEFENCES),
            "either without or no_counterfactual": bool(self.without) != bool(self.no_counterfactual),
            "gain_bits goes with without": not self.without or self.gain_bits > 0,
            "a refusal has a reason": self.ending != "refused" or bool(self.reason or self.build or self.test),
            "exploits is one sentence": self.exploits.endswith(".") and "\n" not in self.exploits,
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise ValueError(f"{self.folder / 'attack.toml'}: {broken[0]}")

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def baseline(self) -> str:
        """The attack folder with the honest model in the same layout."""
        return "honest_parts" if self.manifest.get("layout") == "parts" else "honest"

    @cached_property
    def members(self) -> dict[str, bytes]:
        """The members of its artifact but for the manifest."""
        found = {module.name: module.read_bytes() for module in [*self.folder.glob("*.py"), *MEMBERS.glob("*.py")]}
        if "members.py" in found:
            found |= module_of(self.folder / "members.py").MEMBERS
        return {**found, "train.py": b"", "text.bin": "\0".join(documents(1, 60_000)).encode()}

    def submission(self, **fields: Any) -> dict[str, Any]:
        """The manifest of its artifact; a field that is None is left out."""
        values = {"name": self.name, **MANIFEST, **self.manifest, **fields}
        return {key: value for key, value in values.items() if value is not None}


def discover(folder: Path = FOLDER) -> dict[str, Attack]:
    """All attacks on a score below `folder`, by name."""
    described = {place.parent: tomllib.loads(place.read_text()) for place in sorted(folder.glob("*/attack.toml"))}
    return {
        place.name: Attack(place, **fields) for place, fields in described.items() if fields.get("side") != "training"
    }


def sampled(attacks: Mapping[str, Any]) -> list[str]:
    """Names of those with a defence that can be taken away; unless all are to run, of each defence the first two."""
    found: dict[str, list[str]] = {}
    for name, attack in attacks.items():
        if attack.without:
            found.setdefault(attack.without, []).append(name)
    return [name for names in found.values() for name in (names if ALL else names[:2])]


def archive(members: Mapping[str, bytes]) -> bytes:
    """An artifact as a cheat packs it, without the checks of `pack`."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as writer:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return zstandard.compress(tar.getvalue())


def module_of(path: Path) -> ModuleType:
    """An attack's file as a module of this process."""
    spec = importlib.util.spec_from_file_location(f"attack_{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(MEMBERS))
        spec.loader.exec_module(module)
    torch.set_num_threads(threads)  # which honest.py has set for its own process
    return module
