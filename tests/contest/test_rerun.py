"""The re-run: what it trains and scores, how it ends, what it publishes, and that it can be killed."""

import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jsonschema
import numpy as np
import pytest
import sentencepiece as spm

from conftest import ALL, DOCUMENTS, ROOT, write_dataset
from contest.fakes import CALIBRATION, Scorer, Trainer, disjoint_dataset, install, packed, submission
from pgolf import entry, repeat, rules
from pgolf.artifact import parse
from pgolf.cli.main import main
from pgolf.contest import calibrate, claim, rerun_record, state, verdict
from pgolf.contest.case import Options
from pgolf.contest.rerun import rerun
from pgolf.contest.rerun_record import Rerun
from pgolf.data.build.byte_model import byte_model
from pgolf.data.dataset import open_dataset, training_files
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import is_temporary, open_regular
from pgolf.sandbox import box
from pgolf.sandbox.training import Late

SCHEMA = json.loads((ROOT / "docs" / "rerun.schema.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    return disjoint_dataset(tmp_path_factory.mktemp("data") / "public", tokenizer_model)


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    return disjoint_dataset(tmp_path_factory.mktemp("data") / "hush-hush", tokenizer_model, DOCUMENTS[:5])


class Case:
    """A submission with its fakes."""

    def __init__(self, folder: Path, data: Path, patch: pytest.MonkeyPatch, **changes: Any) -> None:
        self.members = submission(data, **changes)
        self.path = folder / "a.zst"
        self.path.write_bytes(packed(self.members))
        self.out = folder / "out"
        self.options = Options(data, out=self.out, device="cpu", isolated=False, claimed=2.0)
        self.trainer, self.scorer = Trainer(self.members), Scorer()
        self.said: list[str] = []
        install(patch, self.trainer, self.scorer)

    def run(self, **options: Any) -> Rerun:
        record, _ = rerun(self.path, replace(self.options, **options), self.said.append)
        return record


@pytest.fixture
def case(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(tmp_path, data, monkeypatch)


def test_a_rerun_trains_on_sources_and_scores(case: Case, data: Path, secret: Path) -> None:
    record = case.run(score_data=(secret,))
    assert (record.status, record.verdict and record.verdict.status) == ("ok", "reproduces"), record
    assert len(case.trainer.jobs) == 3 and len(case.scorer.calls) == 6
    for job, run in zip(case.trainer.jobs, record.seeds, strict=True):
        assert set(job.sources) == {"submission.json", "predict.py", "train.py"}
        assert job.arguments[2:] == ("--track", "laptop", "--seed", str(run.seed), "--lr=1")
        assert all(name.startswith("train_") for name in job.shards)
        assert run.seconds == {"sandbox": 1.0, "prepare": 2.0, "train": 3.0}
        assert run.declared and (run.declared.steps, run.declared.settings) == (100, {"lr": 1})
        assert [score.data.name for score in run.scores] == ["public", None]
        assert run.artifact and run.artifact.sha256 in [digest for digest, _ in case.scorer.calls]
    assert len({run.seed for run in record.seeds}) == 3
    assert {member.name: member.source for member in record.members} == {
        name: name in {*case.trainer.jobs[0].sources, "tokenizer.model"} for name in case.members
    }
    given, kept = re.findall(r"^(?:trained on|kept out) +(.*)", rerun_record.table(record), re.MULTILINE)
    assert " of source in 3 files, and tokenizer.model " in given and kept.startswith("weights.bin 1 bytes")
    assert record.seconds == {"calibrate": 1.0, "train": 18.0, "score": 12.0, "total": 31.0}


def test_the_record_keeps_to_its_schema_and_is_read_back(case: Case, secret: Path) -> None:
    record = case.run(score_data=(secret,))
    place = case.out / "record.json"
    jsonschema.validate(json.loads(place.read_text()), SCHEMA)
    assert rerun_record.read(place) == record
    for text in ("", "{}", "[]", place.read_text().replace("pgolf-rerun-1", "pgolf-rerun-0")):
        place.write_text(text)
        with pytest.raises(ValueError):
            rerun_record.read(place)


def test_schema_names_the_fields() -> None:
    def check(kind: Any, schema: Any) -> None:
        names = [field.name for field in fields(kind)]
        assert list(schema["properties"]) == schema["required"] == names
        assert schema["additionalProperties"] is False
        for name, hint in get_type_hints(kind).items():
            inner = [each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)]
            if inner:
                part = schema["properties"][name]
                check(inner[0], part.get("items", part))

    check(Rerun, SCHEMA)
    assert tuple(SCHEMA["properties"]["verdict"]["properties"]["status"]["enum"]) == verdict.STATUSES


@pytest.mark.parametrize("status", ["ok", "refused", "failed"])
def test_nothing_names_a_secret_text(case: Case, secret: Path, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither record nor printed table, however it ends; its log-losses are this user's alone."""
    bad = Scorer(status=status, reason=None if status == "ok" else f"{secret}: document 3 differs at 'hush-hush'")
    monkeypatch.setattr(
        "pgolf.contest.rerun.scorer.score",
        lambda path, where, *more: (bad if where.root == secret else case.scorer)(path, where, *more),
    )
    record = case.run(score_data=(secret,), seeds=1)
    assert record.status == status
    printed = (case.out / "record.json").read_text() + rerun_record.table(record)
    assert "hush" not in printed and str(secret.parent) not in printed
    private = [*case.out.glob("seed-1/*.losses.npz")]
    assert len(private) == (2 if status == "ok" else 1)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)
    assert stat.S_IMODE(case.out.stat().st_mode) == 0o700


def test_started_again_it_repeats_nothing_that_is_finished(case: Case, secret: Path) -> None:
    first = case.run(score_data=(secret,))
    assert case.run(score_data=(secret,)) == first
    assert len(case.trainer.jobs) == 3 and len(case.scorer.calls) == 6
    more = case.run(score_data=(secret,), seeds=4)
    assert more.seeds[:3] == first.seeds and len(more.seeds) == 4
    assert len(case.run(score_data=(secret,), seeds=2).seeds) == 4  # a seed once drawn counts


def test_what_a_machine_fails_at_is_tried_again(case: Case) -> None:
    case.trainer.error = EnvironmentBroken("the GPU is gone")
    record = case.run()
    assert (record.status, record.reason, record.seeds) == ("failed", "the GPU is gone", ())
    case.trainer.error = OSError(28, "No space left on device", "/somewhere")
    assert case.run().reason == "/somewhere: No space left on device"
    case.scorer.status, case.scorer.reason = "failed", "the machine was suspended"
    record = case.run()
    assert record.status == "failed" and record.reason and "the machine was suspended" in record.reason
    case.scorer.status, case.scorer.reason = "ok", None
    record = case.run()
    assert record.status == "ok" and len(case.trainer.jobs) == 2 + 3


def test_a_refusal_is_a_result(case: Case) -> None:
    case.trainer.error = Refused("no artifact within 60 s")
    record = case.run()
    assert record.status == "refused" and record.reason == "seed 1 of 3: no artifact within 60 s"
    assert record.verdict and record.verdict.status == "refused"
    assert case.run() == record  # not tried again
    assert len(case.trainer.jobs) == 1
    jsonschema.validate(json.loads((case.out / "record.json").read_text()), SCHEMA)


def test_a_refusal_by_the_scorer_is_one_too(case: Case) -> None:
    case.scorer.status, case.scorer.reason = "refused", "not a finite logit"
    record = case.run()
    assert record.status == "refused" and record.reason and record.reason.endswith("on public: not a finite logit")
    assert record.seeds[0].artifact and record.seeds[0].scores[0].bpb is None


def changed(name: str, content: bytes) -> Any:
    return lambda members: members | {name: content}


def manifest(**values: Any) -> Any:
    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        found = json.loads(members["submission.json"])
        if "settings" in values:
            found["training"] |= values
        else:
            found |= values
        return members | {"submission.json": json.dumps(found).encode()}

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed("predict.py", b"import torch\n"), "predict.py"),
        (changed("more.py", b""), "more.py"),
        (changed("tokenizer.model", b"other"), "tokenizer.model"),
        (manifest(lanes=4), "submission.json: lanes"),
        (manifest(settings={"lr": 2}), "submission.json: training.settings.lr"),
        (manifest(training=None), "submission.json: training"),
    ],
)
def test_train_py_that_writes_something_else(case: Case, change: Any, named: str) -> None:
    case.trainer.change = change
    record = case.run()
    assert record.status == "refused" and record.reason and named in record.reason
    assert case.scorer.calls == []


def test_what_train_py_writes_is_read_as_hostile(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contest.fakes.packed", lambda members: b"no artifact")
    record = case.run()
    assert record.status == "refused" and record.reason and "wrote is no artifact" in record.reason


def test_steps_weights_and_version_of_pgolf_may_differ(data: Path) -> None:
    a, b = (
        parse(packed(submission(data, *each, pgolf=each[1].decode())), 1_000_000) for each in ((1, b"a"), (2, b"b"))
    )
    assert not list(repeat.differences(a, b))


def test_what_vanishes_on_the_way_is_the_machines_fault(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_model: Path, secret: Path
) -> None:
    """Exit code 3 and not 2, whichever call notices; and the record says what is missing."""
    monkeypatch.setattr("pgolf.cli.contest.Options", lambda **values: Options(**values, isolated=False))
    mine = disjoint_dataset(tmp_path / "mine", tokenizer_model)
    case.trainer.change = lambda members: (shutil.rmtree(mine, ignore_errors=True), members)[1]
    arguments = ["rerun", str(case.path), "--data", str(mine), "--out", str(case.out), "--device", "cpu"]
    assert main([*arguments, "--seeds", "2"]) == 3
    assert "cannot be read" in str(rerun_record.read(case.out / "record.json").reason)
    case.trainer.change = lambda members: (case.path.unlink(missing_ok=True), members)[1]
    assert main(arguments) == 2, "what is not there at the beginning is wrong usage"
    case.out = tmp_path / "other"
    case.scorer.error = UsageError("device cuda:1 is not here")
    record = case.run(out=case.out)
    assert (record.status, record.reason) == ("failed", "device cuda:1 is not here")


def test_each_text_is_read_once(case: Case, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        "pgolf.data.dataset.open_regular", lambda path: (opened.append(path.name), open_regular(path))[1]
    )
    case.run(score_data=(secret,))
    assert opened.count("val_documents.jsonl") == 2


def test_log_and_output_of_a_training_are_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that is refused."""

    def spoken(*args: Any, **more: Any) -> Any:
        box.show_output.get()("train", "step 1\nTraceback\n")
        return case.trainer(*args, **more)

    monkeypatch.setattr("pgolf.contest.rerun.training.train", spoken)
    case.run(seeds=1)
    assert (case.out / "seed-1" / "log.jsonl").read_bytes() == b'{"step": 1}\n'
    assert (case.out / "seed-1" / "output.txt").read_text() == "step 1\nTraceback\n"
    case.trainer.error = Refused("no artifact")
    assert case.run(seeds=2).status == "refused"
    assert (case.out / "seed-2" / "output.txt").read_text() == "step 1\nTraceback\n"


def test_lateness_comes_with_what_tells_it_from_a_busy_machine(case: Case, data: Path) -> None:
    case.trainer.error = Late("train", "not within 60 s")
    record = case.run()
    assert record.status == "refused" and record.verdict and record.verdict.reason == record.reason
    assert record.reason and "load average" in record.reason and "naive took 100 ms a step" in record.reason
    assert "--max-hours" not in record.reason


def test_a_track_without_limit_has_one_of_the_organizer(case: Case, data: Path) -> None:
    case.path.write_bytes(packed(submission(data, track="unlimited")))
    case.trainer.error = Late("train", "not within 1800 s")
    record = case.run(max_hours=0.5)
    assert case.trainer.limits and case.trainer.limits.train_seconds == 1800
    assert record.reason and "--max-hours" in record.reason
    assert record.limits and record.limits.train_seconds is None


@pytest.mark.parametrize(
    ("claimed", "noise", "status", "code"),
    [(2.0, 0.0001, "reproduces", 0), (1.5, 0.0001, "does not reproduce", 1), (2.0, 1.0, "inconclusive", 0)],
)
def test_verdicts_and_exit_codes(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    claimed: float,
    noise: float,
    status: str,
    code: int,
) -> None:
    case.scorer.noise = noise
    weights = iter([b"a\0", b"b\x80", b"c\xff"])
    case.trainer.weights = lambda seed: next(weights)
    monkeypatch.setattr("pgolf.cli.contest.Options", lambda **values: Options(**values, isolated=False))
    arguments = ["rerun", str(case.path), "--data", str(case.options.data), "--out", str(case.out), "--device", "cpu"]
    assert main([*arguments, "--claim", str(claimed), "--json"]) == code
    printed = capsys.readouterr()
    assert json.loads(printed.out)["verdict"]["status"] == status
    assert "seed 3 of 3: training" in printed.err and str(case.out / "record.json") in printed.err
    assert main([*arguments, "--claim", str(claimed)]) == code
    assert f"verdict     {status}: " in capsys.readouterr().out


def test_exit_codes_without_a_verdict(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("pgolf.cli.contest.Options", lambda **values: Options(**values, isolated=False))
    arguments = ["--data", str(case.options.data), "--out", str(case.out), "--device", "cpu"]
    case.trainer.error = EnvironmentBroken("the GPU is gone")
    assert main(["rerun", str(case.path), *arguments]) == 3
    case.trainer.error = Refused("too late")
    assert main(["rerun", str(case.path), *arguments]) == 1
    (tmp_path / "garbage.zst").write_bytes(b"garbage")
    assert main(["rerun", str(tmp_path / "garbage.zst"), *arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "refused"
    assert main(["rerun", str(tmp_path / "none.zst"), *arguments]) == 2
    assert "no such artifact" in capsys.readouterr().err


def test_practice_scores_reproduce_nothing(case: Case) -> None:
    """What the machine or the text lacks says nothing against the submission, and confirms no claim."""
    case.scorer.reasons = ("the text has 9 bytes", "no sandbox")
    record = case.run()
    assert record.status == "ok" and record.verdict and record.verdict.status == "inconclusive"
    assert "practice scores, which do not count (the text has 9 bytes; no sandbox)" in record.verdict.reason
    assert "inconclusive: practice scores" in rerun_record.table(record)


def window(members: dict[str, bytes]) -> dict[str, bytes]:
    found = json.loads(members["submission.json"])
    del found["lanes"]
    return members | {"submission.json": json.dumps(found | {"form": "window", "context": 128}).encode()}


def coded(members: dict[str, bytes]) -> dict[str, bytes]:
    return manifest(tokenizer="tok.py")(members) | {"tok.py": b""}


@pytest.mark.parametrize(("change", "words"), [(window, "window form"), (coded, "the tokenizer is code")])
def test_what_never_counts_is_not_run_again(
    case: Case, change: Any, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that looks ahead in its window would reproduce any claim."""
    case.path.write_bytes(packed(change(case.members)))
    arguments = ["rerun", str(case.path), "--data", str(case.options.data), "--out", str(case.out), "--device", "cpu"]
    assert main([*arguments, "--claim", "2", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    jsonschema.validate(record, SCHEMA)
    assert record["status"] == record["verdict"]["status"] == "refused" and record["artifact"]["sha256"]
    assert "no score of this artifact counts: " in record["reason"] and words in record["reason"]
    assert case.trainer.jobs == [] and not case.out.exists()


def test_equal_seeds_count_once(case: Case) -> None:
    case.trainer.weights = lambda seed: b"same"
    record = case.run()
    assert record.verdict and (record.verdict.seeds, record.verdict.status) == (1, "inconclusive")
    assert "2 of 3 seeds gave what another gave" in record.verdict.reason


def test_a_slower_machine_by_declared_steps(case: Case, tmp_path: Path) -> None:
    """The submitted artifact declares more steps than the re-run's; far more is a matter for a person."""
    for steps, status in ((100, "does not reproduce"), (120, "inconclusive"), (300, "quarantined")):
        case.path.write_bytes(packed(submission(case.options.data, steps)))
        record = case.run(claimed=1.9, out=tmp_path / str(steps))
        assert record.verdict and record.verdict.status == status, record.verdict
        assert record.verdict.speed and record.verdict.speed.ratio == pytest.approx(100 / steps)


def test_a_folder_has_its_claim_and_the_speed_behind_it(case: Case, tmp_path: Path) -> None:
    record = case.run()
    assert record.calibration == CALIBRATION
    folder = tmp_path / "submission"
    (folder / "records").mkdir(parents=True)
    shutil.copy(case.path, folder / "artifact.zst")
    fast = replace(CALIBRATION, naive_ms=80.0)
    rerun_record.write(replace(record, calibration=fast), folder / "records" / "rerun.json")
    shutil.copy(case.out / "record.json", folder / "records" / "1.json")
    entry.write(
        folder,
        entry.Entry(
            entry.FORMAT,
            "n",
            "a",
            "laptop",
            "2026-05-01",
            "",
            entry.Packed("artifact.zst", record.artifact.sha256, record.artifact.bytes),
            1.9,
            (entry.Seed(1, 1.9, "records/1.json", None),),
        ),
    )
    case.path = folder
    record = case.run(claimed=None)
    assert record.claimed == rerun_record.Claimed(1.9, 1)
    assert record.verdict and record.verdict.status == "inconclusive" and "slower machine" in record.verdict.reason
    assert record.verdict.speed == verdict.Speed(0.8, "calibration")
    old = replace(record, rules=rules.VERSION - 1)
    rerun_record.write(old, folder / "records" / "rerun.json")
    record = case.run(claimed=None)
    assert record.verdict and record.verdict.status == "does not reproduce"
    assert any("was made under rules" in line for line in case.said)
    (folder / "submission.json").write_text("{}")
    record = case.run(claimed=None)
    assert record.status == "refused" and record.reason and "format is missing" in record.reason


@pytest.mark.parametrize("number", ["1" + "0" * 400, "9" * 30, "1e300", "NaN", "1e999", "0", "-5", "1e-300"])
def test_a_claimed_calibration_has_figures_of_a_machine(case: Case, tmp_path: Path, number: str) -> None:
    """Any other number says nothing about a machine, breaks no re-run and enters no published record."""
    record = case.run(seeds=1)
    claimed = tmp_path / "records" / "rerun.json"
    claimed.parent.mkdir()
    for name in ("fp32_tflops", "bf16_tflops", "bandwidth_gb", "naive_ms"):
        rerun_record.write(replace(record, calibration=replace(CALIBRATION, **{name: 77.5})), claimed)
        claimed.write_text(claimed.read_text().replace("77.5", number))
        found, words = claim.calibration(claimed)
        assert found is None and re.search("says nothing|is not used", words or "")


def test_declared_settings_are_numbers_of_json(case: Case) -> None:
    """They go into the published record."""
    for number in ("NaN", "1e999", "9" * 30):
        text = case.members["submission.json"].decode().replace('"lr": 1', f'"lr": {number}')
        with pytest.raises(Refused, match="training is"):
            packed(case.members | {"submission.json": text.encode()})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda o, d: replace(o, processes=2), "begun with another number of processes"),
        (lambda o, d: replace(o, score_data=(d,)), "begun with another list of texts"),
    ],
)
def test_a_folder_belongs_to_one_rerun(case: Case, secret: Path, make: Any, sentence: str) -> None:
    case.run(seeds=1)
    case.options = make(case.options, secret)
    with pytest.raises(UsageError, match=sentence):
        case.run(seeds=1)


def test_other_rules_or_another_artifact_begin_anew(case: Case, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case.run(seeds=1)
    case.path.write_bytes(packed(submission(data, steps=7)))
    with pytest.raises(UsageError, match="another artifact"):
        case.run(seeds=1)
    case.path.write_bytes(packed(case.members))
    monkeypatch.setattr("pgolf.__version__", "9.9")
    with pytest.raises(UsageError, match="another version of pgolf"):
        case.run(seeds=1)


def test_a_changed_state_is_noticed(case: Case) -> None:
    case.run(seeds=1)
    (case.out / "seed-1" / "artifact.zst").write_bytes(b"other")
    record = case.run(seeds=1)
    assert record.status == "failed" and record.reason and "was changed after it was made" in record.reason


@pytest.mark.parametrize(
    "name", ["state.json", "calibration.json", "seed-1/run.json", "seed-1/score-*.score.json", "seed-1/score-*.npz"]
)
@pytest.mark.parametrize("change", ["edited", "of another re-run", "unreadable"])
def test_only_what_this_user_wrote_here_is_believed(case: Case, tmp_path: Path, name: str, change: str) -> None:
    """Not even a file of another re-run of the same artifact, data and machine, where the best seeds could be from."""
    case.run(seeds=1)
    (place,) = case.out.glob(name)
    other = tmp_path / "other"
    case.run(seeds=1, out=other)
    if change == "of another re-run":
        shutil.copy(other / place.relative_to(case.out), place)
    elif place.suffix == ".json" and change == "edited":
        values = json.loads(place.read_text())
        changes = {"bpb": 1.0} if "bpb" in values else {"seed": 1} if "seed" in values else {"bandwidth_gb": 1.0}
        place.write_text(json.dumps(values | changes))
    else:
        place.write_bytes(place.read_bytes()[:-9])
    before = {path: path.read_bytes() for path in case.out.rglob("*") if path.is_file()}
    if place.suffix == ".npz":
        record = case.run(seeds=1)
        assert record.status == "failed" and record.reason and "was changed after it was made" in record.reason
        return
    with pytest.raises(UsageError, match="was not written by this user's pgolf"):
        case.run(seeds=1)
    assert {path: path.read_bytes() for path in case.out.rglob("*") if path.is_file()} == before


def test_files_of_one_seed_are_none_of_another(case: Case) -> None:
    case.run(seeds=2)
    shutil.rmtree(case.out / "seed-2")
    shutil.copytree(case.out / "seed-1", case.out / "seed-2")
    with pytest.raises(UsageError, match=r"seed-2/run\.json: was not written by this user's pgolf"):
        case.run(seeds=2)


@pytest.mark.parametrize("where", ["default", "out"])
def test_a_submission_brings_its_finished_rerun_along(
    case: Case, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the scratch folder of the submission, in which the organizer works, or in a pull request's."""
    monkeypatch.setattr("pgolf.cli.contest.Options", lambda **values: Options(**values, isolated=False))
    submission = tmp_path / "submission"
    submission.mkdir()
    monkeypatch.chdir(submission)
    with monkeypatch.context() as author:
        author.setenv("XDG_STATE_HOME", str(tmp_path / "author"))
        record, place = rerun(case.path, replace(case.options, out=None))
    assert record.status == "ok" and place and place.parent.parent == Path("runs/rerun")
    case.trainer.jobs.clear()
    arguments = ["rerun", str(case.path), "--data", str(case.options.data), "--device", "cpu", "--claim", "2"]
    arguments += ["--out", str(place.parent)] * (where == "out")
    assert main(arguments) == 2
    assert f"{place.parent}/state.json: was not written by this user's pgolf" in capsys.readouterr().err
    (place.parent / "state.json").unlink()
    assert main(arguments) == 2, "nor is what lies there without a state used, or written over"
    assert case.trainer.jobs == []


def test_the_finished_is_kept_where_the_folder_is_relative(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores too: a score that was noisy is not drawn anew."""
    monkeypatch.chdir(case.out.parent)
    first, place = rerun(case.path, replace(case.options, out=None))
    assert place and not place.is_absolute()
    assert rerun(case.path, replace(case.options, out=None))[0] == first
    assert len(case.trainer.jobs) == len(case.scorer.calls) == 3


@pytest.mark.parametrize("kind", ["FIFO", "link", "folder"])
def test_a_lock_that_is_no_file(case: Case, tmp_path: Path, kind: str) -> None:
    """It neither hangs the re-run nor makes it write elsewhere."""
    case.out.mkdir()
    lock, elsewhere = case.out / "lock", tmp_path / "elsewhere"
    {"FIFO": os.mkfifo, "link": lambda path: path.symlink_to(elsewhere), "folder": os.mkdir}[kind](lock)
    with pytest.raises(UsageError, match="lock: was not written by this user's pgolf"):
        case.run()
    assert not elsewhere.exists() and case.trainer.jobs == []


def test_the_folder_of_a_seed_is_no_link(case: Case, tmp_path: Path) -> None:
    case.run(seeds=1)
    (case.out / "seed-2").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="seed-2: was not written by this user's pgolf"):
        case.run(seeds=2)


def test_the_key_is_this_users_alone(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    case.run(seeds=1)
    key = tmp_path / "state" / "pgolf" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert [*key.parent.iterdir()] == [key] and len(key.read_bytes()) == 32
    key.chmod(0o644)
    with pytest.raises(EnvironmentBroken, match="is not a key that this user alone can read"):
        case.run(seeds=1)
    key.unlink()
    key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentBroken, match="XDG_STATE_HOME"):
        case.run(seeds=1)


def test_two_reruns_do_not_share_a_folder(case: Case) -> None:
    with state.opened(case.out, {}), pytest.raises(UsageError, match="another re-run is using this folder"):
        case.run()


def test_text_that_is_trained_on(case: Case, tmp_path: Path, tokenizer_model: Path) -> None:
    same = write_dataset(tmp_path / "same", DOCUMENTS, tokenizer_model)
    record = case.run(data=same)
    assert record.status == "failed" and record.reason and "are validation documents" in record.reason
    assert case.trainer.jobs == []


def test_a_secret_text_that_is_trained_on(case: Case, tmp_path: Path, tokenizer_model: Path) -> None:
    documents = tuple(f"training document {number}, and nothing else" for number in range(9))
    hidden = disjoint_dataset(tmp_path / "hush-hush", tokenizer_model, documents)
    record = case.run(score_data=(hidden,))
    assert record.status == "failed" and record.reason and "hush" not in record.reason
    assert any(f"9 training documents are validation documents of {hidden}" in line for line in case.said)


def test_another_tokenizer_is_wrong_usage(case: Case, data: Path) -> None:
    """Also one that no shards can be made with, though the file of the dataset's lies beside it."""
    others = [
        case.members | {"tokenizer.model": byte_model()},
        submission(data, transform="case-1"),
        submission(data, tokenizer="bytes", vocab_size=257, bos=256) | {"bytes": case.members["tokenizer.model"]},
        submission(data, tokenizer="tokenizer.json") | {"tokenizer.json": case.members["tokenizer.model"]},
    ]
    for members in others:
        case.path.write_bytes(packed(members))
        with pytest.raises(UsageError, match="data build SOURCE --tokenizer"):
            case.run()


def hidden_in(model: bytes, data: bytes) -> bytes:
    """The model with data in a field that SentencePiece does not know, and so skips."""
    return model + bytes([0xC2, 0x3E, len(data) & 127 | 128, len(data) >> 7 & 127 | 128, len(data) >> 14]) + data


def test_a_tokenizer_that_carries_weights_is_refused(case: Case, tmp_path: Path, tokenizer_model: Path) -> None:
    """The trainer would read them in its dataset, before the clock. Whatever the data that the organizer has."""
    weights = random.Random(1).randbytes(700_000)
    fat = tmp_path / "fat.model"
    fat.write_bytes(hidden_in(tokenizer_model.read_bytes(), weights))
    plain, same = (spm.SentencePieceProcessor(model_file=str(path)) for path in (tokenizer_model, fat))
    assert all(plain.encode(text) == same.encode(text) for text in DOCUMENTS)
    with_it = disjoint_dataset(tmp_path / "fat", fat)
    files, _ = training_files(open_dataset(with_it))
    assert weights in files["tokenizer.model"], "the attack is real"
    case.path.write_bytes(packed(submission(with_it)))
    for folder in (with_it, case.options.data):
        record = case.run(data=folder)
        assert (
            record.status == "refused" and record.reason and record.reason.startswith("the tokenizer tokenizer.model")
        )
        assert "field 1000" in record.reason and record.verdict and record.verdict.status == "refused"
    assert case.trainer.jobs == []


def test_what_counts_of_a_tokenizer_is_source(case: Case, tmp_path: Path, tokenizer_model: Path) -> None:
    """And is looked at like it: here the scores, which BPE does not need."""
    numbers = np.random.default_rng(1).random(4000, np.float32)
    pieces = [
        b"\x0a%c\x0a%c%b\x15%b" % (len(text) + 7, len(text), text, score.tobytes())
        for text, score in ((b"w%d" % at, score) for at, score in enumerate(numbers))
    ]
    model = tmp_path / "scores.model"
    model.write_bytes(tokenizer_model.read_bytes() + b"".join(pieces))
    data = disjoint_dataset(tmp_path / "scores", model)
    case.trainer.members = case.members = submission(data)
    case.path.write_bytes(packed(case.members))
    record = case.run(data=data, seeds=1)
    assert record.status == "ok" and any(line.startswith("tokenizer.model: 8,192") for line in record.quarantine)
    limit = rules.TRACKS["laptop"].source_bytes
    case.path.write_bytes(packed(case.members | {"big.py": b"#" * (limit - 15_000)}))
    record = case.run(data=data, out=tmp_path / "other")
    assert record.status == "refused" and record.reason and "what counts of the tokenizer" in record.reason


def test_shards_for_an_artifact_are_built_with_its_tokenizer(
    case: Case, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And behind its transform; what is no SentencePiece model makes none."""
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "Document {n} says so."}}\n' for n in range(40)))
    args = ["data", "build", str(tmp_path / "text.jsonl"), "--val-documents", "5", "--workers", "1"]
    args += ["--tokenizer", str(case.path), "--out", str(tmp_path / "built")]
    case.path.write_bytes(packed(submission(data, transform="case-1")))
    assert main(args) == 0
    assert repeat.is_in_tokens_of(parse(case.path.read_bytes(), 1_000_000), open_dataset(tmp_path / "built"))
    case.path.write_bytes(packed(submission(data, tokenizer="bytes", vocab_size=257, bos=256)))
    assert main(args) == 2
    case.path.write_bytes(case.path.read_bytes()[:-9])
    assert main(args) == 1
    assert "only a SentencePiece model makes shards" in capsys.readouterr().err


def test_sources_over_the_limit(case: Case) -> None:
    case.path.write_bytes(packed(case.members | {"big.py": b"#" * rules.TRACKS["laptop"].source_bytes}))
    record = case.run()
    assert record.status == "refused" and record.reason and "the limit of track laptop is 128,000" in record.reason


def test_names_count_as_source(case: Case) -> None:
    """Which empty files have as well."""
    limit = rules.TRACKS["laptop"].source_bytes
    members = case.members | {f"{number:097d}.py": b"" for number in range(200)} | {"big.py": b"#" * (limit - 19_000)}
    assert sum(len(data) for name, data in members.items() if name != "tokenizer.model") < limit
    case.path.write_bytes(packed(members))
    record = case.run()
    assert record.status == "refused" and record.reason and "names included" in record.reason


TRAINER = """
import json, sys
from pathlib import Path
from pgolf import artifact
from pgolf.data.shards import read_shard

DATA, SEED = Path(sys.argv[2]), int(sys.argv[sys.argv.index("--seed") + 1])
EXAMPLE
assert not [*DATA.rglob("*.bin")] and not [*DATA.glob("val*")]
open_data()
(shard,) = (DATA / "shards").iterdir()
assert len(read_shard(shard, 65536)) > 100
members = {path.name: path.read_bytes() for path in Path(__file__).parent.iterdir()}
assert set(members) == {"train.py", "predict.py", "submission.json"}, members.keys()
manifest = json.loads(members["submission.json"])
manifest["training"]["steps"] += 1
members["submission.json"] = json.dumps(manifest).encode()
members["tokenizer.model"] = (DATA / "tokenizer.model").read_bytes()
members["weights.bin"] = SEED.to_bytes(8, "little")
artifact.pack(members, Path("/tmp/a.zst"), 1_000_000)
hand_over(Path("/tmp/a.zst").read_bytes())
"""


def test_sandboxes_from_end_to_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A train.py without torch in the training sandbox, and its artifact in the scorer's."""
    monkeypatch.undo()
    monkeypatch.setattr("pgolf.contest.rerun.calibrate", lambda *args: CALIBRATION)
    example = re.search(r"^```py\n(.*?)^```", (ROOT / "docs" / "artifact.md").read_text(), re.MULTILINE | re.DOTALL)
    assert example
    case.path.write_bytes(packed(case.members | {"train.py": TRAINER.replace("EXAMPLE", example[1]).encode()}))
    record = case.run(seeds=1, isolated=True)
    assert record.status == "ok", record.reason
    run = record.seeds[0]
    assert run.declared and run.declared.steps == 101
    assert set(run.seconds) == {"sandbox", "prepare", "train"} and run.scores[0].bpb
    assert "no sandbox" not in run.scores[0].reasons


def test_calibration_measures_something() -> None:
    assert calibrate.matrix_rate(calibrate.torch.float32, "cpu", 256) > 0
    assert calibrate.copy_rate("cpu", 1 << 20) > 0
    log = "".join(json.dumps({"step": n, "seconds": 0.1 * n}) + "\n" for n in range(1, 31))
    assert calibrate.median_step("noise\n{}\n" + log) == pytest.approx(100)
    assert calibrate.median_step("nothing") is None


KILLED = """
import os, sys, random, signal, time
from pathlib import Path
import pytest
sys.path.insert(0, sys.argv[1])
from contest.fakes import Scorer, Trainer, install, submission
from pgolf.contest.case import Options
from pgolf.contest.rerun import rerun
data, secret, path, out, kills = *map(Path, sys.argv[2:6]), int(sys.argv[6])
def trained(line):
    with (out.parent / "done").open("a") as file:
        file.write(line + "\\n")
install(pytest.MonkeyPatch(), Trainer(submission(data), seconds=0.05), Scorer(seconds=0.03))
def run():
    options = Options(data, (secret,), out=out, device="cpu", isolated=False, claimed=2.0)
    record, _ = rerun(path, options, trained)
    assert record.status == "ok", record
for attempt in range(kills + 1):
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if attempt < kills:
        time.sleep(random.uniform(0.02, 0.35))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in ((9, 0) if attempt < kills else (0,)), status
"""


@pytest.mark.parametrize("kills", [4, 50] if ALL else [4])
def test_killed_at_any_moment_every_seed_is_finished_once(kills: int, data: Path, secret: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "a.zst", tmp_path / "out"
    path.write_bytes(packed(submission(data)))
    command = [sys.executable, "-c", KILLED, str(ROOT / "tests"), *map(str, (data, secret, path, out)), str(kills)]
    subprocess.run(command, check=True, timeout=600)
    record = rerun_record.read(out / "record.json")
    assert len(record.seeds) == len({run.seed for run in record.seeds}) == 3
    assert record.verdict and record.verdict.status == "reproduces"
    assert not [path for path in out.rglob("*") if is_temporary(path)]
    finished = (tmp_path / "done").read_text().splitlines()
    for number in (1, 2, 3):
        run = record.seeds[number - 1]
        assert [score.data.name for score in run.scores] == ["public", None]
        for line in ("trained in 3.0 s", f"{run.scores[0].bpb:.6f} bpb on public in 2.0 s"):
            assert finished.count(f"seed {number} of 3: {line}") <= 1  # 0: killed between the file and the line
