"""`pgolf new`: a folder whose code trains from there, and that nothing of the user's is overwritten."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ALL, ROOT, UNIFORM, MakeArtifact, write_dataset
from pgolf import artifact, entry
from pgolf.cli.main import main
from pgolf.errors import Refused, UsageError
from pgolf.rules import ARTIFACT_BYTES
from pgolf.submission.new import new, slug

SHAPE = {"dim": 16, "heads": 2, "layers": 2, "context": 64, "batch_tokens": 512, "micro_tokens": 512}
TINY = {"steps": 2, "warmup_steps": 1, "compile": 0} | SHAPE
TEXT = [f"A small text, number {i}: it holds {i * i} and {i + 7} and then some more words." for i in range(200)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "long", TEXT, tokenizer_model)


@pytest.mark.parametrize("baseline", ["golf", "naive"] if ALL else ["golf"])
def test_code_of_a_baseline_trains_from_its_folder(baseline: str, data: Path, tmp_path: Path) -> None:
    """Without the checkout beside it; the artifact has the submission's name and its code."""
    folder = new('A "new" idea', baseline, "laptop", "Zoë", tmp_path / "mine")
    assert entry.read(folder).artifact.file is None
    command = [sys.executable, "code/train.py", "--data", str(data), "--track", "laptop", "--out", "artifact.zst"]
    settings = TINY | ({"prior_bytes": 0, "xsa": 0, "calibration_tokens": 512} if baseline == "golf" else {})
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([*command, *flags], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = artifact.read(folder / "artifact.zst", ARTIFACT_BYTES)
    assert (found.manifest.name, found.manifest.author) == ('A "new" idea', "Zoë")
    sources = artifact.sources(found.members)
    del sources[artifact.MANIFEST]
    assert sources == artifact.code_in(folder / "code")
    assert sources.keys() == artifact.code_in(ROOT / "baselines" / baseline).keys()


def test_code_of_an_artifact_a_folder_and_a_submission(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    path = make_artifact(UNIFORM, {"part/more.py": b"x = 1\n", "weights.bin": b"w"})
    first = new("one", str(path), "laptop", "me", tmp_path / "one")
    second = new("two", str(first), "laptop", "me", tmp_path / "two")
    third = new("three", str(second / "code"), "laptop", "me", tmp_path / "three")
    for folder in (first, second, third):
        names = sorted(p.relative_to(folder / "code").as_posix() for p in (folder / "code").rglob("*") if p.is_file())
        assert names == ["part/more.py", "predict.py", "submission.json", "train.py"]
        assert not any("{" in word for word in re.findall(r"\{[A-Z_]+\}", (folder / "AGENTS.md").read_text()))


def test_what_the_entry_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "Été: 100%", "--from", "naive", "--author", "me", "--track", "main", "--json"]) == 0
    folder = Path(json.loads(capsys.readouterr().out)["folder"])
    assert re.fullmatch(r"submissions/\d{4}-\d\d-\d\d_ete-100", str(folder))
    found = entry.read(folder)
    assert (found.name, found.author, found.track, found.bpb, found.seeds) == ("Été: 100%", "me", "main", None, ())
    assert found.date == folder.name[:10]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for out in sorted(tmp_path.iterdir()):
        with pytest.raises(UsageError, match="exists already"):
            new("x", "naive", "laptop", "me", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize("name", ["", "x" * 101, "a\nb", "\x1b[2J", "\ud800x"])
def test_names_that_no_entry_may_have(tmp_path: Path, name: str) -> None:
    """Nothing is left behind."""
    with pytest.raises(UsageError, match="name"):
        new(name, "naive", "laptop", "me", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train.py").symlink_to("/etc/passwd")
    (tmp_path / "junk.zst").write_bytes(b"junk")
    for source, words in (("empty", "train.py"), ("linked", "link"), ("nothing", "neither")):
        with pytest.raises(UsageError, match=words):
            new("x", str(tmp_path / source), "laptop", "me", tmp_path / "out")
    with pytest.raises(Refused, match="zstd"):
        new("x", str(tmp_path / "junk.zst"), "laptop", "me", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_baselines_need_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgolf.__file__", str(tmp_path / "lib" / "site-packages" / "pgolf" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="checkout"):
        new("x", "golf", "laptop", "me", tmp_path / "out")


def test_slugs() -> None:
    assert slug("  Größe & Tiefe, v2!  ") == "groe-tiefe-v2"
    assert slug("../../etc") == "etc"
    assert len(slug("ab " * 100)) <= 50
    with pytest.raises(UsageError, match="漢字"):
        slug("漢字")


def test_quotes_in_names_stay_text(tmp_path: Path) -> None:
    name = '"""; import os #\\'
    folder = new(name, "golf", "laptop", 'x"', tmp_path / "out")
    tree = ast.parse((folder / "code" / "train.py").read_text())
    assert name in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert (ROOT / "baselines" / "golf" / "train.py").read_text().count("golf baseline") == 1


def test_commands_of_agents_md_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that the page for agents names has a --help."""
    folder = new("x", "naive", "laptop", "me", tmp_path / "out")
    text = (folder / "AGENTS.md").read_text() + (folder / "README.md").read_text()
    for command in sorted(set(re.findall(r"pgolf ([a-z]+)", text))):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0, command
    capsys.readouterr()
