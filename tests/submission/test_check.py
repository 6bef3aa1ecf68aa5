"""`pgolf check`: what passes, what is named with its place and remedy, and that it judges as the scorer does."""

import base64
import json
import random
import sys
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from types import ModuleType

import pytest

from conftest import UNIFORM, WINDOW, MakeArtifact
from pgolf import files
from pgolf.artifact import read
from pgolf.cli.main import main
from pgolf.errors import EnvironmentBroken
from pgolf.rules import ARTIFACT_BYTES, TRACKS
from pgolf.sandbox import probe
from pgolf.score import record
from pgolf.score.score import Options
from pgolf.submission.check import check

UNSANDBOXED = Options(device="cpu", isolated=False)


def test_a_sound_artifact_passes(dataset: Path, make_artifact: MakeArtifact) -> None:
    path = make_artifact(UNIFORM)
    report = check(path, dataset, UNSANDBOXED, train=False)
    assert report.passes and not report.findings
    assert report.sizes["total"] == path.stat().st_size
    assert report.sizes["left"] == TRACKS["laptop"].artifact_bytes - path.stat().st_size
    assert report.sample is not None and report.sample["bpb"] > 0


def test_a_folder_is_checked_as_what_it_packs_into(dataset: Path, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    folder.mkdir()
    for name, content in read(make_artifact(UNIFORM), ARTIFACT_BYTES).members.items():
        (folder / name).write_bytes(content)
    assert check(folder, dataset, UNSANDBOXED, train=False).passes
    (folder / "submission.json").write_text("{")
    (finding,) = check(folder, dataset, UNSANDBOXED, train=False).findings
    assert (finding.rule, finding.severity) == ("artifact", "error")


@pytest.mark.parametrize(
    ("code", "rule", "severity"),
    [
        ("import pytest\n", "import-undeclared", "error"),
        ("import no_such_module.part\n", "import-missing", "warning"),
        ("import module_without_spec\n", "import-missing", "warning"),
        ("import helper\n", "import-undeclared", "error"),
    ],
)
def test_imports_are_named_with_their_line(
    dataset: Path, make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, code: str, rule: str, severity: str
) -> None:
    monkeypatch.setitem(sys.modules, "module_without_spec", ModuleType("module_without_spec"))  # as compiled ones are
    members = {"helper.py": b"\nimport json\nfrom hypothesis import given\n"}
    path = make_artifact("try:\n    " + code + "except ImportError:\n    pass\n" + UNIFORM, members)
    report = check(path, dataset, UNSANDBOXED, train=False)
    member, line = ("helper.py", 3) if "helper" in code else ("predict.py", 2)
    assert (rule, severity, member, line) in [(f.rule, f.severity, f.file, f.line) for f in report.findings]


def test_what_the_scorer_refuses_is_an_error(dataset: Path, make_artifact: MakeArtifact) -> None:
    report = check(
        make_artifact(UNIFORM.replace("torch.zeros", "torch.nan * torch.ones")), dataset, UNSANDBOXED, train=False
    )
    (finding,) = report.findings
    assert (finding.rule, finding.severity) == ("score", "error") and "NaN" in finding.what


def test_a_lossy_tokenizer_has_its_own_rule(dataset: Path, make_artifact: MakeArtifact) -> None:
    code = b"def encode(text): return list(text.lower().encode())\ndef decode(ids): return bytes(ids).decode()\n"
    path = make_artifact(UNIFORM, {"tokenizer.py": code}, tokenizer="tokenizer.py", vocab_size=257, bos=256)
    (finding,) = check(path, dataset, UNSANDBOXED, train=False).findings
    assert (finding.rule, finding.severity, finding.file) == ("tokenizer", "error", "tokenizer.py"), finding
    assert "lossy" in finding.what


def test_code_that_raises_is_told_from_a_broken_rule(
    dataset: Path, make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the place in the code."""
    path = make_artifact(UNIFORM)
    reasons = {
        "predict: your code raised KeyError: 'x' (part/more.py, line 12)": ("code-raised", "part/more.py", 12),
        "predict: your code raised SyntaxError: invalid syntax": ("code-raised", None, None),
        "the evaluation took longer than its 120 s (ended during predict)": ("too-slow", "predict.py", None),
        "predict: ValueError: logits are torch.int64 (a, line 1) allowed": ("score", None, None),
    }
    for reason, expected in reasons.items():
        result = replace(record.new(path, None, "cpu"), status="refused", reason=reason, seconds={"load": 1.0})
        monkeypatch.setattr("pgolf.submission.check.score", lambda *args, result=result: result)
        (finding,) = check(path, dataset, UNSANDBOXED, train=False).findings
        assert (finding.rule, finding.file, finding.line, finding.what) == (*expected, reason)


def test_verbose_shows_what_raised(
    dataset: Path, make_artifact: MakeArtifact, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_artifact(UNIFORM.replace("return torch.zeros", "return 1 / 0 + torch.zeros"))
    args = ["check", str(path), "--data", str(dataset), "--no-sandbox", "--no-train", "--device", "cpu"]
    assert main([*args, "--verbose", "--json"]) == 1
    seen = capsys.readouterr()
    (finding,) = json.loads(seen.out)["findings"]
    assert (finding["rule"], finding["file"]) == ("code-raised", "predict.py") and finding["line"] == 6
    assert "ZeroDivisionError" in finding["what"] and "Traceback" in seen.err


def test_source_that_is_too_large_or_holds_data(
    dataset: Path, make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = base64.b64encode(random.Random(1).randbytes(180_000))

    def findings(size: int) -> list[tuple[str, str, str | None]]:
        path = make_artifact("import blob\n" + UNIFORM, {"blob.py": b'X = """' + data[:size] + b'"""\n'})
        return [(f.rule, f.severity, f.file) for f in check(path, dataset, UNSANDBOXED, train=False).findings]

    assert findings(100_000) == [("source-noise", "warning", "blob.py")]
    parsed: list[str] = []
    monkeypatch.setattr("pgolf.submission.members._imported", lambda source, name: parsed.append(name))
    assert findings(len(data)) == [("source-bytes", "error", "blob.py")]
    assert parsed == [], "too much to parse in this process"


def test_a_tokenizer_that_holds_more_than_a_vocabulary(
    dataset: Path, make_artifact: MakeArtifact, tokenizer_model: Path
) -> None:
    model = tokenizer_model.read_bytes()
    for extra, expected in ((b"", []), (b"\xc2\x3e\x05learn", ["tokenizer-contents"])):
        path = make_artifact(UNIFORM, {"tokenizer.model": model + extra})
        found = check(path, dataset, UNSANDBOXED, train=False).findings
        assert [(f.rule, f.severity, f.file) for f in found] == [(e, "error", "tokenizer.model") for e in expected]


def test_the_text_is_read_once(dataset: Path, make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(path: Path) -> BufferedReader:
        opened.append(path.name)
        return files.open_regular(path)

    monkeypatch.setattr("pgolf.data.dataset.open_regular", counted)
    assert check(make_artifact(UNIFORM), dataset, UNSANDBOXED, train=False).passes
    assert opened.count("val_documents.jsonl") == 1


def test_a_broken_machine_is_not_a_verdict(
    dataset: Path, make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise EnvironmentBroken("bubblewrap does not work here")

    monkeypatch.setattr(probe, "isolation", broken)
    assert main(["check", str(make_artifact(UNIFORM)), "--data", str(dataset), "--device", "cpu"]) == 3
    seen = capsys.readouterr()
    assert not seen.out and seen.err.count("\n") == 1 and "bubblewrap does not work here" in seen.err


def test_warnings_do_not_fail(dataset: Path, make_artifact: MakeArtifact, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_artifact(WINDOW, {"run.log": b"steps"}, form="window")
    assert (
        main(["check", str(path), "--data", str(dataset), "--no-sandbox", "--no-train", "--device", "cpu", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["passes"]
    assert {f["rule"] for f in report["findings"]} == {"window-form", "member-useless"}


def test_the_command_says_what_is_wrong_and_ends_with_1(
    dataset: Path, make_artifact: MakeArtifact, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_artifact("import pytest\n" + UNIFORM)
    assert main(["check", str(path), "--data", str(dataset), "--no-sandbox", "--no-train", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "error predict.py:1: imports pytest" in out and out.endswith("will be refused\n")
