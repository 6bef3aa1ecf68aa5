"""`pgolf try`: other code on the same weights, paired with the unchanged artifact on the development text."""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import COUNTS, ROOT, UNIFORM, MakeArtifact
from pgolf.cli.main import main
from pgolf.data.dataset import open_dataset
from pgolf.errors import Refused, UsageError
from pgolf.rules import SOURCE_BYTES
from pgolf.score.losses import Losses
from pgolf.score.score import Options
from pgolf.submission.attempt import as_json, attempt, quarters, table
from pgolf.submission.folder import source_files

OPTIONS = Options(device="cpu", isolated=False, documents=12)

VOCAB = 257
"""Of plain bytes, which need no sandbox for a tokenizer, and BOS."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """A data set with 20 development documents of different lengths."""
    folder = tmp_path_factory.mktemp("development")
    texts = [f"document {number} says so. " * (1 + number % 5) for number in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    more = "--val-documents", "5", "--dev-documents", "20", "--tokenizer", str(tokenizer_model), "--workers", "1"
    assert main(["data", "build", str(folder / "texts.jsonl"), *more, "--out", str(folder / "data")]) == 0
    return folder / "data"


@pytest.fixture
def packed(make_artifact: MakeArtifact) -> MakeArtifact:
    """A function that packs an artifact of plain bytes around the source of a `predict.py`."""
    return partial(make_artifact, tokenizer="bytes", vocab_size=VOCAB, bos=VOCAB - 1)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-losses are kept below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes a folder with this predict.py."""

    def write(predict: str) -> Path:
        path = tmp_path / "code"
        path.mkdir(exist_ok=True)
        (path / "predict.py").write_text(predict.replace("VOCAB", str(VOCAB)))
        return path

    return write


def test_better_code_scores_better(data: Path, packed: MakeArtifact, folder: Callable[[str], Path]) -> None:
    """And worse code worse, on the same documents, spread over the development text."""
    code = folder(COUNTS)
    better = attempt(packed(UNIFORM), code, {}, data, OPTIONS)
    worse = attempt(packed(COUNTS, name="b.zst"), folder(UNIFORM), {}, data, OPTIONS)
    for result, sign in ((better, -1), (worse, 1)):
        assert result.base is not None
        values = as_json(result)
        assert math.copysign(1, values["difference"]) == sign
        assert values["difference"] == pytest.approx(values["bpb"] - values["unchanged"]["bpb"])
        assert values["half_interval"] < abs(values["difference"])
    assert worse.record.tokens and worse.record.bytes
    assert worse.record.bpb == pytest.approx(worse.record.tokens * math.log2(VOCAB) / worse.record.bytes)
    assert better.base is not None and better.base.nats == pytest.approx(worse.losses.nats)
    text = open_dataset(data).development_text().spread(12)
    assert better.losses.data == better.base.data == text.sha256
    assert better.losses.sizes.tolist() == [len(document) for document in text.documents]
    assert not better.record.eligible and "the development text, not the validation text" in better.record.reasons
    learning = quarters(better.losses)
    assert learning[3] < learning[0]
    assert "difference" in table(better)


def test_the_unchanged_artifact_is_scored_once(data: Path, packed: MakeArtifact, folder: Callable[[str], Path]) -> None:
    """For the same documents; what was kept of it is used only if it is whole and of the same artifact."""
    artifact, notes = packed(UNIFORM), list[str]()
    before = artifact.read_bytes()
    first = attempt(artifact, folder(COUNTS), {}, data, OPTIONS, notes.append)
    again = attempt(artifact, None, {"lanes": 2}, data, OPTIONS, notes.append)
    assert len(notes) == 1
    assert first.base is not None and again.base is not None
    assert first.base.nats.tolist() == again.base.nats.tolist()
    for path in Path("runs/try").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    attempt(artifact, None, {"lanes": 2}, data, OPTIONS, notes.append)
    assert len(notes) == 2
    assert artifact.read_bytes() == before


def test_without_changes_there_is_nothing_to_compare(data: Path, packed: MakeArtifact) -> None:
    """Also where a field gets the value that it has."""
    for changes in ({}, {"lanes": 3}):
        unchanged = attempt(packed(UNIFORM), None, changes, data, OPTIONS)
        assert unchanged.base is None and as_json(unchanged)["difference"] is None
        assert "score" in table(unchanged)


def test_fields_of_the_manifest_take_effect(data: Path, packed: MakeArtifact) -> None:
    """One lane is shown every token."""
    result = attempt(packed(UNIFORM), None, {"lanes": 1, "layout": "parts"}, data, OPTIONS)
    assert result.record.steps == result.record.tokens
    assert as_json(result)["difference"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("lane=64", "--set: submission.json: unknown field 'lane'"),
        ("lanes=many", "--set: submission.json: lanes is 'many'"),
        ("lanes=0", "--set: submission.json: lanes is 0"),
        ("lanes=null", "--set: submission.json: lanes is missing"),
        ("form=window", "--set: submission.json: lanes has no meaning in the window form"),
        ('name="a\\u001b[2J"', "--set: submission.json: name is"),
    ],
)
def test_a_wrong_field_is_one_sentence(
    data: Path, packed: MakeArtifact, capsys: pytest.CaptureFixture[str], field: str, expected: str
) -> None:
    capsys.readouterr()
    args = ["try", str(packed(UNIFORM)), "--set", field, "--data", str(data), "--no-sandbox"]
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"pgolf: {expected}") and err.count("\n") == 1
    assert err.strip().isprintable()


@pytest.mark.parametrize("field", ["lanes", "=4", ""])
def test_a_field_without_a_value_is_wrong_usage(
    packed: MakeArtifact, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["try", str(packed(UNIFORM)), "--set", field])
    assert stop.value.code == 2 and "is not KEY=VALUE" in capsys.readouterr().err


def test_code_that_raises_is_named(
    data: Path, packed: MakeArtifact, folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """With its place, and with what it printed on request: escaped."""
    code = folder(
        UNIFORM.replace("return torch", "print('seen\\x1b[2J'); raise KeyError('nothing')\n        return torch")
    )
    args = ["try", str(packed(UNIFORM)), "--code", str(code), "--data", str(data), "--no-sandbox"]
    capsys.readouterr()
    assert main(args) == 1
    quiet = capsys.readouterr().err
    assert quiet == "pgolf: step 0: predict: your code raised KeyError: 'nothing' (predict.py, line 6)\n"
    assert main([*args, "--verbose"]) == 1
    verbose = capsys.readouterr().err
    assert verbose.endswith(quiet) and "predict | seen\\x1b[2J\n" in verbose and "predict | Traceback" in verbose
    assert "\x1b" not in verbose


def test_an_artifact_without_a_score_can_be_mended(
    data: Path, packed: MakeArtifact, folder: Callable[[str], Path]
) -> None:
    result = attempt(packed("import nothing_like_it\n"), folder(UNIFORM), {}, data, OPTIONS)
    assert result.base is None and result.no_base and "your code raised ModuleNotFoundError" in result.no_base
    assert result.record.bpb and "no comparison" in table(result)


def test_weights_that_fill_the_limit_leave_room_for_an_idea(
    data: Path, packed: MakeArtifact, folder: Callable[[str], Path]
) -> None:
    """The trainer of the next artifact has to find the bytes; here its own code gives them."""
    noise = np.random.default_rng(1)
    members = {"weights.bin": noise.bytes(950_000), "train.py": b"# " + noise.bytes(15_000).hex().encode() + b"\n"}
    artifact = packed(UNIFORM, members)
    code = folder(UNIFORM)
    helper = code / "helper.py"
    helper.write_text(f"# {noise.bytes(60_000).hex()}\n")
    with pytest.raises(Refused, match="the limit of track laptop"):
        attempt(artifact, code, {}, data, OPTIONS)
    helper.write_text(f"# {noise.bytes(40_000).hex()}\n")
    result = attempt(artifact, code, {}, data, OPTIONS)
    assert result.changed_bytes is None and result.base is not None
    assert as_json(result)["difference"] == 0


def test_folders_that_are_none(data: Path, packed: MakeArtifact, tmp_path: Path) -> None:
    artifact, folder = packed(UNIFORM), tmp_path / "folder"
    with pytest.raises(UsageError, match="no such folder"):
        attempt(artifact, folder, {}, data, OPTIONS)
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"1")
    with pytest.raises(UsageError, match="no source file"):
        attempt(artifact, folder, {}, data, OPTIONS)
    os.mkfifo(folder / "predict.py")
    with pytest.raises(UsageError, match=r"predict\.py: is a FIFO"):
        attempt(artifact, folder, {}, data, OPTIONS)
    (folder / "predict.py").unlink()
    (folder / "table.h").write_bytes(bytes(SOURCE_BYTES + 1))
    with pytest.raises(Refused, match=r"table\.h: has more than"):
        attempt(artifact, folder, {}, data, OPTIONS)


def test_code_may_link_to_its_neighbours(tmp_path: Path) -> None:
    """As golf's does to naive's cache; a link to elsewhere would take a stranger's file."""
    naive = (ROOT / "baselines" / "naive" / "cache.py").read_bytes()
    assert source_files(ROOT / "baselines" / "golf")["cache.py"] == naive
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "predict.py").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="is a link to elsewhere"):
        source_files(tmp_path / "code")


def test_a_data_set_without_development_text(
    dataset: Path, packed: MakeArtifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["try", str(packed(UNIFORM)), "--data", str(dataset), "--no-sandbox"]) == 2
    assert "has no development text" in capsys.readouterr().err


def test_json_is_json(data: Path, packed: MakeArtifact, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a quarter has no document and one document has no interval."""
    args = ["try", str(packed(UNIFORM)), "--documents", "1", "--data", str(data)]
    capsys.readouterr()
    assert main([*args, "--no-sandbox", "--json"]) == 0

    def no_constant(name: str) -> Any:
        raise AssertionError(name)

    values = json.loads(capsys.readouterr().out, parse_constant=no_constant)
    assert values["documents"] == 1 and values["half_interval"] is None
    assert [value is None for value in values["quarters"]].count(True) == 3


def test_quarters_add_up_to_the_whole() -> None:
    noise = np.random.default_rng(2)
    sizes = noise.integers(0, 900, 50)
    nats = sizes * noise.uniform(0.5, 1.5, 50)
    scored = Losses("a", "b", nats, sizes)
    values = quarters(scored)
    middles = sizes.cumsum() - sizes / 2
    edges = np.arange(5) * sizes.sum() / 4
    shares = [sizes[(low <= middles) & (middles < high)].sum() for low, high in pairwise(edges)]
    assert np.dot(values, shares) == pytest.approx(nats.sum() / math.log(2))
