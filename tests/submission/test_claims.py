"""A submission's claim against its evidence: what --write fills in, and every way in which the two can differ."""

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import sentencepiece as spm

from conftest import CAUSAL, artifact_bytes
from pgolf import artifact, entry
from pgolf.cli.main import main
from pgolf.data.dataset import open_dataset
from pgolf.errors import Refused
from pgolf.rules import ARTIFACT_BYTES
from pgolf.score import losses, record
from pgolf.score.losses import Losses
from pgolf.score.score import Options, score
from pgolf.submission import claims
from pgolf.submission.check import check
from pgolf.submission.new import new

UNSANDBOXED = Options(device="cpu", isolated=False)
PRACTICE = {"record-practice"}  # the text of the tests is small


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path, dataset: Path) -> Path:
    """A sound submission of three seeds, filled in by --write."""
    root = tmp_path_factory.mktemp("made")
    vocab = spm.SentencePieceProcessor(model_file=str(tokenizer_model)).vocab_size()
    packed = root / "0.zst"
    for seed in (3, 2, 1):
        source = CAUSAL.replace("manual_seed(7)", f"manual_seed({seed})")
        packed.write_bytes(artifact_bytes(root, source, vocab, tokenizer_model, {}, {"author": "me"}))
        if seed == 3:
            folder = new("test", str(packed), "laptop", "me", root / "submission")
        kept: list[Losses] = []
        place = folder / "records" / f"{seed}.score.json"
        record.write(score(packed, dataset, UNSANDBOXED, kept.append), place)
        losses.write(kept[0], losses.path(place))
        (folder / "logs" / f"{seed}.jsonl").write_text(json.dumps({"seed": seed}) + "\n")
    (folder / "artifact.zst").write_bytes(packed.read_bytes())
    for name, content in artifact.read(packed, ARTIFACT_BYTES).members.items():
        if artifact.is_code(name):
            (folder / "code" / name).write_bytes(content)
    values = json.loads((folder / entry.FILE).read_text())
    (folder / entry.FILE).write_text(json.dumps(values | {"blurb": "a test"}))
    claims.fill(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return copytree(made, tmp_path / "submission")


def rules_of(folder: Path, data: Path) -> set[str]:
    """The rules that `claims.findings` names; each finding is fit to be shown."""
    found = entry.read(folder)
    packed = artifact.read(folder / found.artifact.file, ARTIFACT_BYTES) if found.artifact.file else None
    findings = list(claims.findings(folder, found, packed, open_dataset(data).canonical_text().sha256))
    for finding in findings:
        assert 0 < len(finding.what) < 500 and finding.remedy and finding.severity in ("error", "warning")
        assert finding.file is None or (folder / finding.file).exists() or finding.rule == "code-differs"
    return {finding.rule for finding in findings}


def test_a_filled_in_submission_passes(folder: Path, dataset: Path) -> None:
    found = entry.read(folder)
    assert [seed.seed for seed in found.seeds] == [1, 2, 3]
    assert found.bpb == pytest.approx(math.fsum(seed.bpb for seed in found.seeds) / 3, abs=1e-6)
    assert found.artifact.bytes == (folder / "artifact.zst").stat().st_size
    report = check(folder, dataset, UNSANDBOXED, train=False)
    assert report.passes and {finding.rule for finding in report.findings} == PRACTICE
    assert report.sizes["total"] == found.artifact.bytes
    before = (folder / entry.FILE).read_bytes()
    claims.fill(folder)
    assert (folder / entry.FILE).read_bytes() == before


def change(**changes: Any) -> Callable[[Path], None]:
    """A change of fields in submission.json."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / entry.FILE).read_text())
        (folder / entry.FILE).write_text(json.dumps(values | changes))

    return edit


def change_seed(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / entry.FILE).read_text())
        values["seeds"][0] |= changes
        (folder / entry.FILE).write_text(json.dumps(values))

    return edit


def change_record(**changes: Any) -> Callable[[Path], None]:
    """A change of fields of the first record, by hand."""

    def edit(folder: Path) -> None:
        path = folder / "records" / "1.score.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def same_artifact_twice(folder: Path) -> None:
    for ending in (".score.json", ".losses.npz"):
        (folder / "records" / f"2{ending}").write_bytes((folder / "records" / f"1{ending}").read_bytes())
    claims.fill(folder)


def drop_own_record(folder: Path) -> None:
    remove("records/1.score.json")(folder)
    claims.fill(folder)


def swap_losses(folder: Path) -> None:
    (folder / "records" / "1.losses.npz").write_bytes((folder / "records" / "2.losses.npz").read_bytes())


def bomb(folder: Path) -> None:
    """Losses of 128 MB in some kilobytes."""
    with zipfile.ZipFile(folder / "records" / "1.losses.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("nats.npy", bytes(1 << 27))


def other_text_of_one(folder: Path) -> None:
    change_record(data={"name": "other", "sha256": "ab" * 32})(folder)


def other_text_of_all(folder: Path) -> None:
    for path in (folder / "records").glob("*.score.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": {"name": "x", "sha256": "ab" * 32}}))


def better_by_hand(folder: Path) -> None:
    change_record(bpb=0.5)(folder)
    claims.fill(folder)


CASES: list[tuple[Callable[[Path], None], set[str]]] = [
    (change(bpb=1.0), {"claim-mean"}),
    (change(bpb=None), {"claim-missing"}),
    (change(seeds=[]), {"record-missing"}),
    (change(blurb=""), {"blurb-missing"}),
    (change(name="another"), {"name-differs"}),
    (change(track="main"), {"track-differs", "record-track"}),
    (change_seed(bpb=1.0), {"claim-differs", "claim-mean"}),
    (change_record(bpb=1.0), {"claim-differs", "record-edited"}),
    (better_by_hand, {"record-edited"}),
    (change_record(eligible=True), {"record-edited"}),
    (change_record(reasons=[]), {"record-edited"}),
    (change_record(nats_per_token=None), {"record-edited"}),
    (change_record(code={"every": 64, "bits": [1e9]}), {"record-edited"}),
    (change_record(code={"every": 64, "bits": [9.0, 8.0]}), {"record-edited"}),
    (swap_losses, {"record-edited"}),
    (rewrite("records/1.losses.npz", "junk"), {"record-edited"}),
    (change_record(rules=1), {"record-rules"}),
    (change_record(track="main"), {"record-track"}),
    (change_record(status="refused", reason="\x1b[2J" * 9999), {"record-unfinished"}),
    (change_record(bytes="many"), {"record", "record-artifact"}),
    (change_record(bpb=10**400), {"record", "record-artifact"}),
    (change_record(tokens=10**4000), {"record", "record-artifact"}),
    (change_record(bytes=-1), {"record", "record-artifact"}),
    (change_record(bpb=math.nan), {"record", "record-artifact"}),
    (change_record(nats_per_token=math.inf), {"record", "record-artifact"}),
    (bomb, {"record-edited"}),
    (rewrite("records/1.score.json", "[" * 9999), {"record", "record-artifact"}),
    (same_artifact_twice, {"record-twice"}),
    (drop_own_record, {"record-artifact", "few-seeds"}),
    (other_text_of_one, {"record-texts"}),
    (other_text_of_all, {"record-data"}),
    (change_seed(log=None), {"log-missing"}),
    (rewrite("logs/1.jsonl", '{"seed": 7}\n'), {"log-differs"}),
    (rewrite("logs/1.jsonl", '{"seed": "\\u001b' + "x" * 999 + '"}\n'), {"log-differs"}),
    (rewrite("logs/1.jsonl", "\x00no log"), set()),
    (rewrite("code/predict.py", "# other"), {"code-differs"}),
    (remove("code/train.py"), {"code-differs"}),
    (remove("README.md"), {"readme-missing"}),
]


@pytest.mark.parametrize(("edit", "expected"), CASES)
def test_each_difference_is_named(
    folder: Path, dataset: Path, edit: Callable[[Path], None], expected: set[str]
) -> None:
    edit(folder)
    assert rules_of(folder, dataset) - PRACTICE == expected


def test_before_the_training(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next step is said, and the exit code is that of a refusal."""
    folder = new("x", "naive", "laptop", "me", tmp_path / "fresh")
    assert main(["check", str(folder), "--data", str(dataset), "--write", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {f["rule"] for f in report["findings"]} == {"artifact-missing", "blurb-missing", "record-missing"}


def test_an_artifact_elsewhere(folder: Path, dataset: Path) -> None:
    """Is not checked, and the claim is; its digest and size stay when the rest is filled in."""
    found = entry.read(folder)
    entry.write(folder, replace(found, artifact=replace(found.artifact, file=None, url="https://example.org/a")))
    (folder / "artifact.zst").unlink()
    assert claims.fill(folder).artifact.sha256 == found.artifact.sha256
    report = check(folder, dataset, UNSANDBOXED)
    assert report.passes and {finding.rule for finding in report.findings} == {*PRACTICE, "artifact-elsewhere"}


def test_a_damaged_or_lying_entry_is_one_finding(folder: Path, dataset: Path) -> None:
    values = json.loads((folder / entry.FILE).read_text())
    for text in (
        "{",
        json.dumps(values | {"bpb": "1"}),
        json.dumps(values | {"artifact": {**values["artifact"], "bytes": 7}}),
    ):
        (folder / entry.FILE).write_text(text)
        (finding,) = check(folder, dataset, UNSANDBOXED, train=False).findings
        assert (finding.rule, finding.severity, finding.file) == ("entry", "error", entry.FILE)


def test_write_refuses_what_is_no_record(folder: Path) -> None:
    """And leaves the entry as it was."""
    before = (folder / entry.FILE).read_bytes()
    for name, text in (("records/7.score.json", "{}"), ("records/seed-01.json", "")):
        (folder / name).write_text(text)
        with pytest.raises(Refused, match=name):
            claims.fill(folder)
        (folder / name).unlink()
    change_record(status="refused", bpb=None)(folder)
    with pytest.raises(Refused, match="finished"):
        claims.fill(folder)
    assert (folder / entry.FILE).read_bytes() == before


def test_write_needs_a_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path), "--write", "--data", str(tmp_path)]) == 2
    assert "--write" in capsys.readouterr().err
