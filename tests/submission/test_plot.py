"""Loss of runs, and what the tokens of a text cost: from the files to figures, tables and the page."""

import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from conftest import CAUSAL, ROOT, UNIFORM, MakeArtifact
from pgolf.cli.main import main
from pgolf.data.dataset import open_dataset
from pgolf.errors import EnvironmentBroken
from pgolf.score import record, tokens
from pgolf.score.record import Environment, Packed, Record
from pgolf.score.tokens import TokenLosses
from pgolf.submission import costs, curves, page

LOGS = sorted((ROOT / "submissions" / "2026-11-26_golf" / "logs").glob("*.jsonl"))


@pytest.fixture(scope="module")
def made() -> TokenLosses:
    """Two documents, the first one hostile; a character of three tokens."""
    texts = ("", "<script>", ' "x" on=', "\u202e", "7", "é", " word", ".")
    text = np.array([1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 0], dtype=np.int64)
    nats = np.arange(1, 12, dtype=np.float32)
    return TokenLosses("a" * 64, "d" * 64, nats, texts, text, np.array([8, 3]), np.array([300, 200]))


def test_tokens_spell_the_text_and_cost_the_score(dataset: Path, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    path = make_artifact(CAUSAL)
    command = ["score", str(path), "--data", str(dataset), "--documents", "4"]
    assert main([*command, "--no-sandbox", "--device", "cpu", "--per-token"]) == 0
    scored = path.with_name("a.score.json")
    found, result = tokens.read(tokens.path(scored)), record.read(scored)
    edges = np.cumsum(found.lengths)[:-1]
    spelled = ["".join(found.texts[i] for i in part) for part in np.split(found.text, edges)]
    documents = [document.decode() for document in open_dataset(dataset).canonical_text().documents[:4]]
    assert [text.removeprefix(" ") for text in spelled] == documents
    assert result.bpb is not None and result.bytes is not None
    assert found.nats.sum(dtype=float) / math.log(2) / result.bytes == pytest.approx(result.bpb, rel=1e-6)
    assert main(["plot", str(scored), "--page", str(tmp_path / "a.html"), "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    each = costs.costs(scored, found)
    for rows in (each.positions, each.classes):
        assert sum(row.bits_per_byte for row in rows) == pytest.approx(result.bpb, rel=1e-6)
    assert sum(row.tokens for row in each.lengths) == result.tokens


LATE = b"""
import gc
from pgolf.sandbox import wire

def encode(text):
    return list(text.encode())

def decode(ids):
    if len(ids) == 1 and len(calls) == 0:  # what `check_decoding` does not begin with
        FAULT
    calls.append(1)
    return bytes(v for v in ids if v < 256).decode("utf-8", "replace")

calls = []
"""
LIES = b"[o for o in gc.get_objects() if isinstance(o, wire.Channel)][0].send(wire.Kind.TEXTS, bytes([9, 0, 0, 0]))"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (LIES, "broke the wire protocol"),
        (b"raise ValueError", "raised ValueError"),
        ("machine", "was suspended"),
        ("disk", "a.tokens.npz: No space left on device"),
    ],
    ids=["lies", "raises", "machine", "disk"],
)
def test_a_score_stands_without_its_tokens(
    dataset: Path,
    make_artifact: MakeArtifact,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    words: str,
) -> None:
    """A tokenizer that lies, or fails, for the log-losses by token only; a machine that fails then."""
    source = LATE.replace(b"FAULT", fault if isinstance(fault, bytes) else b"pass")
    path = make_artifact(UNIFORM, {"tok.py": source}, tokenizer="tok.py", vocab_size=300, bos=299)
    errors = {"machine": EnvironmentBroken("the machine was suspended"), "disk": OSError(28, "No space left on device")}
    if fault in errors:
        monkeypatch.setattr(tokens, "write", Mock(side_effect=errors[fault]))
    command = ["score", str(path), "--data", str(dataset), "--no-sandbox", "--device", "cpu", "--per-token"]
    assert main(command) == 0
    output = capsys.readouterr()
    assert "practice score" in output.out
    assert output.err.count("\n") == 1 and "the score stands, but there are no log-losses by token: " in output.err
    assert words in output.err
    scored = path.with_name("a.score.json")
    assert record.read(scored).status == "ok" and not tokens.path(scored).exists()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "word start"),
        ("ing", "continuation"),
        ("'s", "continuation"),
        (" 19", "digits"),
        ("...", "punctuation"),
        ("\n ", "whitespace"),
        (" é", "non-ASCII"),
        ("", "non-ASCII"),
    ],
)
def test_the_class_of_a_token(text: str, kind: str) -> None:
    assert costs.class_of(text) == kind


def test_bos_is_the_end_of_a_document(made: TokenLosses) -> None:
    kinds = [costs.CLASSES[number] for number in costs.classes(made)]
    assert [at for at, kind in enumerate(kinds) if kind == costs.END] == [7, 10]


def test_the_page_escapes_the_text_and_joins_the_parts_of_a_character(made: TokenLosses) -> None:
    spans: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "img", "a", "iframe", "link")
            assert not any(name.startswith("on") for name, _ in attributes)
            spans.extend(value for name, value in attributes if name == "title" and value)

    made_page = page.page(made, [0, 1], "<b>title</b>")
    Reader().feed(made_page)
    assert "<script" not in made_page and "<b>" not in made_page and "\u202e" not in made_page
    assert len(spans) == 6 + 3
    assert spans[4].startswith("'é': 18.000 nats") and spans[4].endswith("3 tokens together")
    assert spans[5].startswith("end of document: 8.000 nats") and "rank 1" in spans[5]


def test_tokens_read_back_are_those_that_were_written(made: TokenLosses, tmp_path: Path) -> None:
    tokens.write(made, tmp_path / "a.tokens.npz")
    back = tokens.read(tmp_path / "a.tokens.npz")
    assert back.texts == made.texts
    assert np.array_equal(back.text, made.text) and np.array_equal(back.nats, made.nats)


def test_loss_curves_of_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", *map(str, LOGS), "--out", str(tmp_path / "a.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(each["loss"]) == len(each["seconds"]) > 10 for each in found] == [True] * len(LOGS)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    line = '{"step": 1, "loss": 2.5, "tokens": 10, "seconds": 1.0}\n'
    (tmp_path / "a.jsonl").write_text(line + '{"step": 2, "lo')
    assert curves.read(tmp_path / "a.jsonl").loss.tolist() == [2.5]


def test_smoothing_keeps_a_straight_line_but_for_its_end() -> None:
    line = np.arange(100.0)
    assert np.allclose(curves.smooth(line)[:94], line[:94])


@pytest.mark.parametrize(
    "content", ["", "{}\n", "hello\n", '{"step": 1, "loss": NaN, "tokens": 1, "seconds": 1}\n', "[]\n"]
)
def test_what_is_neither_log_nor_record(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert main(["plot", str(tmp_path / "a.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("pgolf: ")


def entered(path: Path, made: TokenLosses) -> Path:
    """A record with its tokens beside it."""
    packed = Packed(made.artifact, 1000)
    found = Record(status="ok", rules=2, bpb=1.0, track="laptop", artifact=packed, environment=Environment.of("cpu"))
    record.write(found, path)
    tokens.write(made, tokens.path(path))
    return path


def test_records_that_cannot_be_drawn(made: TokenLosses, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = entered(tmp_path / "a.score.json", made), entered(tmp_path / "b.score.json", replace(made, data="e" * 64))
    bad = {
        "different texts": [a, b],
        "not both": [a, LOGS[0]],
        "shows the text of one": [a, a, "--page", tmp_path / "a.html"],
        "documents 0 to 1": [a, "--page", tmp_path / "a.html", "--document", 2],
        "no such record": [tmp_path / "c.score.json"],
    }
    for sentence, arguments in bad.items():
        assert main(["plot", *map(str, arguments)]) == 2
        assert sentence in capsys.readouterr().err
    tokens.path(b).write_bytes(b"rubbish")
    assert main(["plot", str(b)]) == 2
    tokens.path(b).unlink()
    assert main(["plot", str(b)]) == 2
    assert "--per-token" in capsys.readouterr().err
    entered(b, replace(made, artifact="b" * 64))
    entered(a, made)
    tokens.path(a).write_bytes(tokens.path(b).read_bytes())
    assert main(["plot", str(a)]) == 2
    assert "of another artifact" in capsys.readouterr().err


def test_without_matplotlib_the_figures_are_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(LOGS[0]), "--out", str(tmp_path / "a.png")]) == 3
    output = capsys.readouterr()
    assert "last loss" in output.out and "no picture" in output.err
