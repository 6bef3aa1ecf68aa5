"""Two scores of one text: what is paired, what is refused, and that the interval means what it says."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CAUSAL, UNIFORM, MakeArtifact
from pgolf.cli.main import main
from pgolf.contest import compare
from pgolf.data.dataset import CanonicalText
from pgolf.errors import UsageError
from pgolf.score import losses, record
from pgolf.score.losses import Losses
from pgolf.score.record import Environment, Packed, Record, Submission
from pgolf.stats import paired_difference

SIZES = np.array([100, 300, 50], dtype=np.int64)


def scored(path: Path, nats: list[float], sizes: np.ndarray = SIZES, **changes: Any) -> Path:
    """A record with its log-losses beside it."""
    values: dict[str, Any] = {
        "status": "ok",
        "eligible": True,
        "rules": 2,
        "bpb": sum(nats) / math.log(2) / int(sizes.sum()),
        "tokens": 90,
        "steps": 30,
        "track": "laptop",
        "submission": Submission(path.name, "a"),
        "artifact": Packed("a" * 64, 1000),
        "seconds": {"predictor": 2.0, "total": 9.0},
        "environment": Environment.of("cpu"),
    }
    record.write(Record(**values | changes), path)
    losses.write(Losses("a" * 64, "d" * 64, np.array(nats, dtype=np.float64), sizes), losses.path(path))
    return path


def test_the_difference_is_that_of_the_scores(tmp_path: Path) -> None:
    a, b = (
        scored(tmp_path / "a.score.json", [100.0, 290.0, 60.0]),
        scored(tmp_path / "b.score.json", [90.0, 270.0, 61.0]),
    )
    result = compare.compare(a, b)
    assert result.bpb == pytest.approx(result.b.record.bpb - result.a.record.bpb)
    assert (result.better, result.documents) == (2, 3)
    assert compare.as_json(result)["difference"] == result.bpb
    assert "B is better on 2 of 3" in compare.table(result)
    assert compare.plot(result, tmp_path / "diff.png") is None
    assert (tmp_path / "diff.png").read_bytes().startswith(b"\x89PNG")


def test_a_score_against_itself_differs_by_nothing(tmp_path: Path) -> None:
    a = scored(tmp_path / "a.score.json", [100.0, 290.0, 60.0])
    result = compare.compare(a, a)
    assert (result.bpb, result.half_interval, result.better) == (0, 0, 0)


def test_one_document_has_no_interval(tmp_path: Path) -> None:
    a = scored(tmp_path / "a.score.json", [100.0], np.array([100]))
    result = compare.compare(a, a)
    assert math.isnan(result.half_interval)
    assert compare.as_json(result)["half_interval"] is None
    assert "±" not in compare.table(result)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, hits, tries = np.random.default_rng(0), 0, 1000
    for _ in range(tries):
        sizes = generator.integers(100, 2000, 200)
        difference = 0.01 * sizes + generator.normal(0, 0.05, 200) * sizes
        ratio, half = paired_difference(np.zeros(200), difference, sizes)
        hits += abs(ratio - 0.01) < half
    assert 0.93 < hits / tries < 0.97


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"status": "refused", "bpb": None}, "was refused"),
        ({"artifact": Packed("b" * 64, 1)}, "another artifact"),
    ],
)
def test_records_that_cannot_be_compared(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    good, bad = (
        scored(tmp_path / "a.score.json", [1.0, 2.0, 3.0]),
        scored(tmp_path / "b.score.json", [1.0, 2.0, 3.0], **changes),
    )
    with pytest.raises(UsageError, match=sentence):
        compare.compare(good, bad)


def test_a_file_that_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"status": "ok"}')
    with pytest.raises(UsageError, match="not a record"):
        compare.compare(tmp_path / "a.json", tmp_path / "a.json")


def test_texts_that_differ_are_not_paired(tmp_path: Path) -> None:
    a, b = scored(tmp_path / "a.score.json", [1.0, 2.0, 3.0]), scored(tmp_path / "b.score.json", [1.0, 2.0], SIZES[:2])
    with pytest.raises(UsageError, match="of 3 and 2 documents"):
        compare.compare(a, b)
    losses.write(Losses("a" * 64, "e" * 64, np.ones(3), SIZES), losses.path(b))
    with pytest.raises(UsageError, match="different texts"):
        compare.compare(a, b)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 rubbish", b"\x93NUMPY", b"x" * 100])
def test_a_broken_file_of_losses_is_named(tmp_path: Path, content: bytes) -> None:
    a = scored(tmp_path / "a.score.json", [1.0, 2.0, 3.0])
    losses.path(a).write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.losses\.npz: not a file of log-losses"):
        compare.compare(a, a)
    losses.path(a).unlink()
    with pytest.raises(UsageError, match="no such file"):
        compare.compare(a, a)


@pytest.mark.parametrize("nats", [math.nan, math.inf, 1e300])
def test_losses_that_no_text_has_are_named(tmp_path: Path, nats: float) -> None:
    """They would make a comparison that JSON cannot hold."""
    a = scored(tmp_path / "a.score.json", [1.0, 2.0, nats], bpb=1.0)
    with pytest.raises(UsageError, match=r"a\.losses\.npz: not a file of log-losses"):
        compare.compare(a, a)
    with pytest.raises(UsageError, match="figures that no text has"):
        losses.write(Losses("a" * 64, "d" * 64, np.ones(3), np.zeros(3, np.int64)), losses.path(a))
        losses.read(losses.path(a))


def test_losses_of_documents_add_up_to_those_of_tokens() -> None:
    encoded = [np.zeros(n, dtype=np.int32) for n in (3, 0, 5)]
    nll = np.arange(11, dtype=np.float64)
    found = Losses.of("", nll, encoded, CanonicalText((b"abc", b"", b"d")))
    assert found.nats.tolist() == [nll[:4].sum(), nll[4], nll[5:].sum()]
    assert found.sizes.tolist() == [3, 0, 1]


def test_a_score_leaves_what_diff_needs(
    dataset: Path, make_artifact: MakeArtifact, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [make_artifact(code, name=name) for code, name in ((UNIFORM, "a.zst"), (CAUSAL, "b.zst"))]
    for path in paths:
        assert main(["score", str(path), "--data", str(dataset), "--no-sandbox", "--device", "cpu"]) == 0
    records = [path.with_name(path.name.replace(".zst", ".score.json")) for path in paths]
    for path in records:
        found, kept = record.read(path), losses.read(losses.path(path))
        assert found.nats_per_token is not None and found.tokens is not None
        assert kept.nats.sum() == pytest.approx(found.nats_per_token * found.tokens, rel=1e-12)
        assert int(kept.sizes.sum()) == found.bytes
    capsys.readouterr()
    assert main(["diff", *map(str, records), "--json"]) == 0
    a, b = (record.read(path).bpb for path in records)
    assert a is not None and b is not None
    assert json.loads(capsys.readouterr().out)["difference"] == pytest.approx(b - a)
