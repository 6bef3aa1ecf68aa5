"""`pgolf data demo`: real text from what is installed, without copies."""

import json
import sysconfig
from pathlib import Path

import pytest

from pgolf.cli.main import main
from pgolf.data.build import demo
from pgolf.data.dataset import open_dataset, overlap

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harvest of a moment: a few modules and a small validation text."""
    modules = [
        STDLIB / name for name in ("argparse.py", "asyncio", "decimal.py", "email", "turtle.py", "_pydecimal.py")
    ]
    monkeypatch.setattr(demo, "package_folders", lambda: modules)
    monkeypatch.setattr(demo, "VALIDATION_CHARACTERS", 40_000)


def test_demo_builds_and_is_left_alone_the_second_time(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["vocab_size"] == 1024
    assert summary["overlap"] == 0
    dataset = open_dataset(tmp_path / "demo")
    assert overlap(dataset) == 0
    assert dataset.from_environment
    assert 40_000 <= dataset.canonical_text().bytes < 80_000
    before = (tmp_path / "demo" / "dataset.json").read_bytes()
    assert main(["data", "demo", "--out", str(tmp_path / "demo")]) == 0
    assert "already built" in capsys.readouterr().out
    assert (tmp_path / "demo" / "dataset.json").read_bytes() == before
    index = json.loads(before)
    del index["environment"]  # as one that was built before there was this mark
    (tmp_path / "demo" / "dataset.json").write_text(json.dumps(index))
    assert main(["data", "demo", "--out", str(tmp_path / "demo")]) == 0
    assert open_dataset(tmp_path / "demo").from_environment


def test_the_harvest_is_the_same_every_time(small: None) -> None:
    documents = demo.harvest(workers=2)
    assert documents == demo.harvest(workers=1)
    texts = [text for _, text in documents]
    assert len(set(texts)) == len(texts)
    assert all(400 <= len(text) <= 20_000 for text in texts)
    assert any(name.startswith("topics:") for name, _ in documents)
    assert any(name.startswith("turtle") for name, _ in documents)


def test_docstrings_are_read_without_running_the_code(tmp_path: Path) -> None:
    prose = "It is documented at length, in plain sentences that go on for quite a while. " * 8
    package = tmp_path / "package"
    (package / "tests").mkdir(parents=True)
    (package / "a.py").write_text(
        f'"""Module. {prose}"""\nraise SystemExit\nclass A:\n    """Class. {prose}"""\n    def f(self):\n'
        f'        """Method. {prose}"""\n    def g(self):\n        """Short."""\n'
    )
    (package / "broken.py").write_text(f'"""Broken. {prose}"""\ndef (')
    (package / "tests" / "b.py").write_text(f'"""Test. {prose}"""\n')
    assert [(name, text.split()[0]) for name, text in demo.docstrings(package)] == [
        ("package/a:", "Module."),
        ("package/a:A", "Class."),
        ("package/a:f", "Method."),
    ]


def test_near_copies_are_dropped() -> None:
    words = [f"word{i}" for i in range(400)]
    original = " ".join(words)
    reworded = " ".join(["new", *words[:200], "changed", *words[201:]]).upper()
    half = " ".join([*words[:120], *(f"other{i}" for i in range(280))])
    documents = [("a", original), ("b", original), ("c", reworded), ("d", half), ("e", "quite short")]
    assert [name for name, _ in demo.without_near_copies(documents)] == ["a", "d", "e"]
