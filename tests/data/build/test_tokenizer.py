"""`pgolf tokenizer`: what is trained, what is measured, and where a tokenizer loses text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece as spm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pgolf.cli.main import main

TEXTS = [f"Line {number}: caf\u00e9, na\u00efve, {number * number}.\n" for number in range(60)]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: object) -> tuple[int, str, str]:
        code = main(["tokenizer", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def byte_level(path: Path) -> Path:
    """A tokenizer.json of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={each: number for number, each in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.save(str(path))
    return path


def test_formats_are_measured_on_the_same_text(run: Run, text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.model"
    assert run("train", text, "--vocab-size", 300, "--out", own)[0] == 0
    assert spm.SentencePieceProcessor(model_file=str(own)).vocab_size() == 300
    names = ["bytes", own, byte_level(tmp_path / "tokenizer.json")]
    code, out, _ = run("compare", *names, "--text", text, "--json", "--plot", tmp_path / "a.png")
    assert code == 0
    rows = {Path(row["name"]).stem: row for row in json.loads(out)}
    size = len("".join(TEXTS).encode())
    assert rows["bytes"]["tokens"] == rows["tokenizer"]["tokens"] == size
    assert (rows["bytes"]["model_bytes"], rows["bytes"]["vocab_size"], rows["tokenizer"]["vocab_size"]) == (0, 257, 256)
    assert rows["own"]["bytes_per_token"] == size / rows["own"]["tokens"] > 1
    assert 0 < rows["own"]["compressed_bytes"] < rows["own"]["model_bytes"] == own.stat().st_size
    assert all(row["first_change"] is None and row["changed"] == 0 for row in rows.values())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_lost_byte_is_named(run: Run, tmp_path: Path) -> None:
    """A model that normalises gives back other text for a document of which it is said where."""
    text, own = tmp_path / "a.jsonl", tmp_path / "own.model"
    documents = ["plain", "so it is", "here \ufb01ne", "a  b"]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    code, _, err = run("train", text, "--vocab-size", 300, "--normalization", "nmt_nfkc", "--out", own)
    assert code == 0, err
    code, out, _ = run("compare", own, "--text", text, "--json")
    (row,) = json.loads(out)
    assert row["changed"] == 1
    assert row["first_change"] == {"document": 2, "byte": 5, "text": "\ufb01ne", "back": "fine"}
    assert "document 2, byte 5: '\ufb01ne' comes back as 'fine'" in run("compare", own, "--text", text)[1]


def test_a_transform_is_measured_by_the_bytes_of_the_text(run: Run, text: Path) -> None:
    code, out, _ = run("compare", "bytes", "--text", text, "--transform", "case-1", "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["changed"] == 0
    assert row["bytes_per_token"] < 1  # capitals have markers of three bytes


def test_what_is_no_tokenizer(run: Run, text: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.model").write_bytes(b"no model")
    for name, sentence in [
        (tmp_path / "a.json", "not a tokenizer.json"),
        (tmp_path / "a.model", "not a SentencePiece model"),
        (tmp_path / "b.model", "cannot be read (No such file or directory)"),
        ("gpt2", "a tokenizer is a SentencePiece .model, a tokenizer.json or the word bytes"),
    ]:
        code, _, err = run("compare", name, "--text", text)
        assert code == 2
        assert sentence in err and len(err.splitlines()) == 1
    for size, sentence in [(70_000, "is over 65,536"), (9000, "the text yields at most"), (20, "too small")]:
        code, _, err = run("train", text, "--vocab-size", size, "--out", tmp_path / "c.model")
        assert code == 2
        assert sentence in err and not (tmp_path / "c.model").exists()
