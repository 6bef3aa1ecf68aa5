"""The training steps of a check: what train.py writes is compared with the artifact, whatever it does."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm

from conftest import ROOT, UNIFORM, MakeArtifact, write_dataset
from pgolf import artifact
from pgolf.artifact import MANIFEST, Artifact
from pgolf.data.dataset import open_dataset
from pgolf.errors import Refused
from pgolf.repeat import without_budget
from pgolf.rules import ARTIFACT_BYTES
from pgolf.sandbox import training
from pgolf.sandbox.training import Job, Limits, Trained
from pgolf.submission.retrain import differences, retrain

EXAMPLE = re.search(r"^```py\n(.*?)^```", (ROOT / "docs" / "artifact.md").read_text(), re.MULTILINE | re.DOTALL)
assert EXAMPLE
# Packs its own folder, as a submission's train.py does; CHANGE may make another artifact of it.
TRAINER = f"""
import json, sys, tempfile
from pathlib import Path
from pgolf.artifact import pack
{EXAMPLE[1]}
data = Path(sys.argv[sys.argv.index("--data") + 1])
members = {{path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}}
members["tokenizer.model"] = (data / "tokenizer.model").read_bytes()
open_data()
CHANGE
with tempfile.TemporaryDirectory() as folder:
    pack(members, Path(folder) / "a.zst", 10**6)
    hand_over((Path(folder) / "a.zst").read_bytes())
"""
DECLARED = {"arguments": ["--steps=900", "--dim", "8"], "settings": {"dim": 8}, "steps": 900}


def rules_of(path: Path, dataset: Path) -> dict[str, str]:
    _, findings = retrain(artifact.read(path, ARTIFACT_BYTES), open_dataset(dataset), "cpu", isolated=False)
    return {finding.rule: finding.severity for finding in findings}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("", {}),
        ("members['predict.py'] += b'#'", {"training-sources": "error"}),
        ("raise SystemExit(0)", {"training-fails": "error"}),
        ("hand_over(b'junk')", {"training-fails": "error"}),
    ],
)
def test_a_train_py_runs_and_is_compared(
    change: str, expected: dict[str, str], make_artifact: MakeArtifact, dataset: Path
) -> None:
    train = TRAINER.replace("CHANGE", change).encode()
    assert rules_of(make_artifact(UNIFORM, {"train.py": train}, training=DECLARED), dataset) == expected


def test_code_that_raises_is_said_with_its_line(make_artifact: MakeArtifact, dataset: Path) -> None:
    """A traceback that the code makes up is shown as any of its words: short and escaped."""
    train = TRAINER.replace("CHANGE", "raise KeyError('\\x1b[2J' + 'x' * 999)").encode()
    line = train[: train.index(b"raise KeyError")].count(b"\n") + 1
    path = make_artifact(UNIFORM, {"train.py": train}, training=DECLARED)
    _, (finding,) = retrain(artifact.read(path, ARTIFACT_BYTES), open_dataset(dataset), "cpu", isolated=False)
    assert (finding.rule, finding.file, finding.line) == ("training-fails", "train.py", line)
    assert finding.what.startswith("your code raised KeyError: ") and "--verbose" in finding.remedy
    assert finding.what.isprintable() and len(finding.what) < 400


def test_without_a_declaration(make_artifact: MakeArtifact, dataset: Path) -> None:
    """Nothing is an error: a submission may have nothing to train."""
    good = make_artifact(UNIFORM, {"train.py": TRAINER.replace("CHANGE", "").encode()})
    assert rules_of(good, dataset) == {"training-missing": "warning"}
    nothing = rules_of(make_artifact(UNIFORM), dataset)
    assert nothing == {"training-missing": "warning", "training-fails": "warning"}


def test_job_is_that_of_a_rerun(make_artifact: MakeArtifact, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources only, the declared arguments, and another budget."""
    jobs: list[Job] = []

    def fake(job: Job, limits: Limits, *, isolated: bool = True) -> Trained:
        jobs.append(job)
        return Trained(path.read_bytes(), {"sandbox": 1.0, "prepare": 119.0, "train": 2.0}, "")

    monkeypatch.setattr(training, "train", fake)
    path = make_artifact(UNIFORM, {"weights.bin": b"w", "prefix.npy": b"p"}, training=DECLARED, packages=["numpy"])
    assert rules_of(path, dataset) == {"prepare-slow": "warning"}
    (job,) = jobs
    assert sorted(job.sources) == ["predict.py", MANIFEST, "train.py"] and job.packages == ("numpy",)
    assert " ".join(job.arguments) == "--out /tmp/artifact.zst --track laptop --seed 1 --dim 8 --steps 3"
    assert sorted(job.shards) == ["train_000000.bin"] and not any(b"fox" in data for data in job.files.values())


def test_shards_of_another_tokenizer_are_no_ground_for_a_verdict(
    make_artifact: MakeArtifact, tokenizer_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.model"
    with other.open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words here", "and others there"]), model_writer=file, vocab_size=280,
            model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    data = write_dataset(tmp_path / "data", ["some words"], other)
    found = rules_of(make_artifact(UNIFORM, training=DECLARED), data)
    assert found == {"training-data": "warning"}


@pytest.mark.parametrize(
    ("members", "manifest", "expected"),
    [
        ({}, {}, {}),
        ({"weights.bin": b"other"}, {}, {}),
        ({"weights.bin": None}, {}, {"training-members": "weights.bin"}),
        ({"prefix.npy": b"p"}, {}, {"training-members": "prefix.npy"}),
        ({"train.py": b"# other"}, {}, {"training-sources": "train.py"}),
        ({"more.py": b""}, {}, {"training-sources": "more.py"}),
        ({"tokenizer.model": b"other"}, {}, {"training-tokenizer": "tokenizer.model"}),
        ({}, {"lanes": 4}, {"training-manifest": MANIFEST}),
        ({}, {"layout": "parts"}, {"training-manifest": MANIFEST}),
        ({}, {"packages": ["numpy"]}, {"training-manifest": MANIFEST}),
        ({}, {"vocab_size": 1000}, {"training-manifest": MANIFEST, "training-sources": "predict.py"}),
        ({}, {"name": "other"}, {}),
        ({}, {"training": DECLARED | {"steps": 3}}, {}),
        ({}, {"training": DECLARED | {"arguments": ["--dim", "8", "--steps", "3"]}}, {}),
        ({}, {"training": DECLARED | {"arguments": ["--dim=9"]}}, {"training-settings": MANIFEST}),
        ({}, {"training": DECLARED | {"parameters": 1}}, {"training-settings": MANIFEST}),
        ({}, {"training": DECLARED | {"settings": {"dim": 9}}}, {"training-settings": MANIFEST}),
        ({}, {"training": DECLARED | {"settings": {"dim": 8, "x": 1}}}, {"training-settings": MANIFEST}),
        ({}, {"training": None}, {"training-settings": MANIFEST}),
    ],
)
def test_each_difference_has_its_rule_and_file(
    make_artifact: MakeArtifact, members: Mapping[str, Any], manifest: dict[str, Any], expected: dict[str, str]
) -> None:
    def made(members: Mapping[str, Any], manifest: dict[str, Any]) -> Artifact:
        path = make_artifact(UNIFORM, {"weights.bin": b"w", **members}, **{"training": DECLARED} | manifest)
        return artifact.read(path, ARTIFACT_BYTES)

    found = list(differences(made({}, {}), made(members, manifest)))
    assert {finding.rule: finding.file for finding in found} == expected
    assert all(finding.remedy for finding in found)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("--dim 8 --steps 900", "--dim 8"),
        ("--steps=900 --dim 8", "--dim 8"),
        ("--seconds 5.5 --dim=8", "--dim=8"),
        ("--seconds=5 --steps 3 --x", "--x"),
        ("--steps_more 3", "--steps_more 3"),
    ],
)
def test_only_the_budget_is_replaced(before: str, after: str) -> None:
    assert without_budget(before.split()) == tuple(after.split())


def test_settings_of_strangers_are_shown_short(make_artifact: MakeArtifact) -> None:
    """However long the reader lets them be."""

    def made(value: str) -> Artifact:
        training = DECLARED | {"settings": {"dim": value}}
        return artifact.read(make_artifact(UNIFORM, training=training), ARTIFACT_BYTES)

    (finding,) = differences(made("x" * 200), made("y"))
    assert len(finding.what) < 300 and finding.what.isprintable()
    assert json.dumps(finding.what)


def test_refusals_are_findings(make_artifact: MakeArtifact, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(job: Job, limits: Limits, *, isolated: bool = True) -> Trained:
        raise Refused("train.py did not ask for the data within 30 s")

    monkeypatch.setattr(training, "train", fake)
    assert rules_of(make_artifact(UNIFORM, training=DECLARED), dataset) == {"training-fails": "error"}
