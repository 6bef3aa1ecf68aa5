"""`pgolf data build`: what it writes, what it refuses, and that it can be killed."""

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece as spm
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from conftest import SHARED, needs_fineweb
from pgolf.cli.main import main
from pgolf.data.build import build as build_module
from pgolf.data.build import sources, tokenize
from pgolf.data.build.byte_model import byte_model
from pgolf.data.build.checkpoint import claimed
from pgolf.data.build.shard_writer import ShardWriter
from pgolf.data.dataset import Dataset, load_tokenizer, open_dataset, overlap
from pgolf.data.shards import count_tokens, read_shard, split_documents
from pgolf.data.transforms import TRANSFORMS
from trainers import default_signals

NASTY = (
    "line\nbreaks\r\n\r\n\n and \ttabs\t",
    "  leading and trailing  ",
    "double  triple   spaces",
    "\u2581 and a\u2581b \u2581\u2581 next to spaces \u2581 ",
    "\U000f0000\U000f0001\u2581\U000f0000",
    "a\0b\0\0 \x01\x02\x1f\x7f\x80\x85",
    "<s>spelled</s><unk><pad><0x0A>",
    "\ufeffBOM \u200b\u00a0\u2028\u2029\x0b\x0c\u3000",
    "e\u0301 \u00e9 \ufb01 \uff21 \u2047 \u2585 \ufffd \uffff \U0010ffff \ue000",
    "👩‍👩‍👧‍👦 漢字 العربية",
    "\0",
    "1234567890 " * 30,
)

Run = Callable[..., tuple[int, str, str]]


def words(seed: int, count: int) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("etaoinshrdlu", k=generator.randint(1, 9))) for _ in range(count))


CORPUS = [f"{words(i, 60)}.\nNumber {i}, \u00fcber \u6f22\u5b57." for i in range(300)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `pgolf data build`, without a development text by default; returns exit code and both outputs."""

    def run(*args: object) -> tuple[int, str, str]:
        code = main(["data", "build", "--dev-documents", "0", *map(str, args), "--workers", "2"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", CORPUS)


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def training_texts(dataset: Dataset) -> list[str]:
    processor = load_tokenizer(dataset.tokenizer)
    return [
        processor.decode(ids.tolist())
        for shard in dataset.train_shards
        for ids in split_documents([(shard.path, shard.read(dataset.vocab_size))], dataset.bos)
    ]


def test_a_build_opens_and_holds_every_document(run: Run, corpus: Path, tmp_path: Path) -> None:
    code, out, _ = run(corpus, "--val-documents", 20, "--vocab-size", 400, "--out", tmp_path / "d", "--json")
    assert code == 0
    dataset = open_dataset(tmp_path / "d")
    assert [d.decode() for d in dataset.canonical_text().documents] == CORPUS[:20]
    assert training_texts(dataset) == CORPUS[20:]
    assert dataset.vocab_size == 400
    summary = json.loads(out)
    assert summary["train"]["documents"] == 280
    assert summary["train"]["bytes"] == sum(len(text.encode()) for text in CORPUS[20:])
    assert summary["train"]["tokens"] == count_tokens(dataset.train_shards)
    assert summary["validation"]["bytes"] == dataset.canonical_text().bytes
    assert summary["overlap"] == overlap(dataset) == 0


@pytest.mark.parametrize(
    "kind", ["zst", "frames", "gz", "upper", "parquet", "files", "lines", "lines.zst", "glob", "folder", "hub"]
)
def test_formats_are_read_the_same(
    run: Run, tmp_path: Path, tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(sources, "ROWS", 7)
    texts = [text.replace("\n", " ") for text in CORPUS[:40]]
    folder = tmp_path / "source"
    folder.mkdir()
    plain = write_jsonl(folder / "a.jsonl", texts)
    options: list[object] = []
    source: object = plain
    if kind == "zst":
        source = tmp_path / "a.jsonl.zst"
        source.write_bytes(zstandard.compress(plain.read_bytes()))
    elif kind == "frames":
        source = tmp_path / "a.jsonl.zst"
        data = plain.read_bytes()
        source.write_bytes(zstandard.compress(data[:3333]) + zstandard.compress(data[3333:]))
    elif kind == "gz":
        source = tmp_path / "a.jsonl.gz"
        data = plain.read_bytes()
        source.write_bytes(gzip.compress(data[:3333]) + gzip.compress(data[3333:]))
    elif kind == "upper":
        source = tmp_path / "A.JSONL.ZST"
        source.write_bytes(zstandard.compress(plain.read_bytes()))
    elif kind == "parquet":
        source = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), source, row_group_size=10)
    elif kind == "files":
        source = tmp_path / "files"
        source.mkdir()
        for i, text in enumerate(texts):
            (source / f"{i:03}.txt").write_text(text, encoding="utf-8")
    elif kind == "lines":
        source = tmp_path / "a.txt"
        source.write_text("".join(text + "\r\n" for text in texts), encoding="utf-8", newline="")
        options = ["--lines"]
    elif kind == "lines.zst":
        source = tmp_path / "a.txt.zst"
        source.write_bytes(zstandard.compress("\n".join(texts).encode()))
        options = ["--lines"]
    elif kind in ("glob", "folder"):
        write_jsonl(folder / "a.jsonl", texts[:15])
        write_jsonl(folder / "b.jsonl", texts[15:])
        source = folder / "*.jsonl" if kind == "glob" else folder
    elif kind == "hub":
        source = "owner/name"
        stream = datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))}).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
        info = SimpleNamespace(sha="0" * 40)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: info)
    code, _, err = run(source, *options, "--val-documents", 9, "--tokenizer", tokenizer_model, "--out", tmp_path / "d")
    assert (code, err) == (0, "")
    dataset = open_dataset(tmp_path / "d")
    assert [d.decode() for d in dataset.canonical_text().documents] == texts[:9]
    assert training_texts(dataset) == texts[9:]


def test_nasty_text_comes_back_byte_for_byte(run: Run, corpus: Path, tmp_path: Path) -> None:
    validation = write_jsonl(tmp_path / "nasty.jsonl", NASTY)
    code, _, _ = run(corpus, validation, "--val", validation, "--vocab-size", 400, "--out", tmp_path / "d")
    assert code == 0
    dataset = open_dataset(tmp_path / "d")
    assert dataset.canonical_text().documents == tuple(text.encode() for text in NASTY)
    assert dataset.index is not None
    assert dataset.index["text"]["changed_by_tokenizer"] == 0
    processor = spm.SentencePieceProcessor(model_file=str(dataset.tokenizer))
    path = dataset.val_shards[0].path
    ids = split_documents([(path, read_shard(path, 400))], dataset.bos)
    assert [processor.decode(document.tolist()) for document in ids] == list(NASTY)


@pytest.fixture(scope="module")
def lossless() -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=tokenize.train([*CORPUS, *NASTY], 400, "identity"))


@given(text=st.text() | st.text(alphabet="\u2581 \U000f0000\U000f0001a\n<s>\0"))
def test_a_trained_tokenizer_is_lossless(lossless: spm.SentencePieceProcessor, text: str) -> None:
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text
    assert not {lossless.bos_id(), lossless.eos_id(), lossless.unk_id()} & set(ids)


def test_copies_of_validation_documents_are_dropped(run: Run, tmp_path: Path) -> None:
    validation = write_jsonl(tmp_path / "v.jsonl", CORPUS[:10])
    train = write_jsonl(tmp_path / "t.jsonl", [*CORPUS[10:100], CORPUS[3], *CORPUS[100:], CORPUS[3], CORPUS[7]])
    code, out, _ = run(train, "--val", validation, "--vocab-size", 400, "--out", tmp_path / "d", "--json")
    assert code == 0
    assert json.loads(out)["train"]["dropped_overlap"] == 3
    assert json.loads(out)["overlap"] == 0
    assert training_texts(open_dataset(tmp_path / "d")) == CORPUS[10:]
    assert overlap(open_dataset(tmp_path / "d")) == 0


def test_empty_documents_are_dropped_and_counted(run: Run, tmp_path: Path) -> None:
    texts = ["", CORPUS[0], " \n\t", CORPUS[1], "", *CORPUS[2:]]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    with source.open("a") as file:
        file.write("\n\n")
    code, out, _ = run(source, "--val-documents", 2, "--vocab-size", 400, "--out", tmp_path / "d", "--json")
    assert code == 0
    summary = json.loads(out)
    assert (summary["validation"]["dropped_empty"], summary["train"]["dropped_empty"]) == (2, 3)
    assert len(open_dataset(tmp_path / "d").canonical_text().documents) == 2
    assert training_texts(open_dataset(tmp_path / "d")) == CORPUS[2:]


def test_shards_are_cut_between_documents(run: Run, corpus: Path, tmp_path: Path, tokenizer_model: Path) -> None:
    options = ["--val-documents", 30, "--tokenizer", tokenizer_model, "--shard-tokens"]
    assert run(corpus, *options, 5000, "--out", tmp_path / "many")[0] == 0
    assert run(corpus, *options, 10**9, "--out", tmp_path / "one")[0] == 0
    assert run(corpus, *options, 1, "--out", tmp_path / "each")[0] == 0
    many, one, each = (open_dataset(tmp_path / name) for name in ("many", "one", "each"))
    assert len(one.train_shards) == len(one.val_shards) == 1
    assert len(many.train_shards) > 4
    assert len(each.train_shards) == 270
    assert training_texts(many) == training_texts(one) == training_texts(each)
    sizes = [len(shard.read(many.vocab_size)) for shard in many.train_shards]
    longest = max(shard.tokens for shard in each.train_shards)
    assert all(5000 - longest < size <= 5000 for size in sizes[:-1])
    assert many.canonical_text().sha256 == one.canonical_text().sha256


def test_workers_and_blocks_do_not_change_the_files(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    for workers, block in ((1, 1 << 20), (3, 2000), (2, 333)):
        monkeypatch.setattr(sources, "BLOCK_BYTES", block)
        out = tmp_path / str(workers)
        args = ["--val-documents", "10", "--vocab-size", "400", "--shard-tokens", "7000", "--name", "x"]
        assert main(["data", "build", str(corpus), *args, "--out", str(out), "--workers", str(workers)]) == 0
        built.append(contents(out))
    assert built[0] == built[1] == built[2]


KILLABLE = """
import sys
from pgolf.data.build import build, sources
from pgolf.data.build.sources import FileSource
from pathlib import Path
build.CHECKPOINT_SECONDS = 0.0
sources.BLOCK_BYTES = 20_000
settings = build.Settings("d", [FileSource(Path(sys.argv[1]), False)], 200, vocab_size=400, shard_tokens=60_000)
build.build(settings, Path(sys.argv[2]), 2)
"""


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "big.jsonl", [words(i, 300) for i in range(1500)])
    command = [sys.executable, "-c", KILLABLE, str(source)]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    whole = time.monotonic() - start
    generator = random.Random(1)
    out = tmp_path / "killed"
    kills = progress = 0
    while not (out / "dataset.json").exists() and kills < 60:
        process = subprocess.Popen([*command, str(out)])
        try:
            process.wait(generator.uniform(0.15, 0.7) * whole)
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        for path in out.glob("*.bin"):
            read_shard(path, 400)
        if (out / "build.json").exists():
            position = json.loads((out / "build.json").read_text())["position"]
            assert position >= progress
            progress = position
    assert kills
    subprocess.run([*command, str(out)], check=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_just_after_a_shard_got_its_name(
    run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between a finished shard and the next checkpoint, which a random kill hardly ever hits."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(build_module, "CHECKPOINT_SECONDS", 0.0)
    args = [corpus, "--val-documents", 10, "--vocab-size", 400, "--shard-tokens", 7000, "--name", "x", "--out"]
    assert run(*args, tmp_path / "whole")[0] == 0

    close = ShardWriter.close_shard

    def full_after(shards: int) -> Callable[[Any], None]:
        def close_shard(self: Any) -> None:
            close(self)
            if len(self.done) == shards:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return close_shard

    for shards in (2, 3, 4):
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "close_shard", full_after(shards))
            code, _, err = run(*args, tmp_path / "stopped")
        assert code == 3
        assert "No space left" in err
        assert err.count("\n") == 1
    assert run(*args, tmp_path / "stopped")[0] == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


WAITING = """
import sys, time
from pgolf.cli.main import main
from pgolf.data.build.shard_writer import ShardWriter
close = ShardWriter.close_shard
def wait(self):
    time.sleep(600 * (self.prefix == "train"))
    close(self)
ShardWriter.close_shard = wait
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_ends_in_one_line_and_can_go_on(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "big.jsonl", CORPUS)
    out = tmp_path / "d"
    args = ["data", "build", str(source), "--val-documents", "20", "--vocab-size", "400", "--out", str(out)]
    command = [sys.executable, "-c", WAITING, *args]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=default_signals
    )
    while not list(out.glob("train_*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "pgolf: interrupted\n")
    assert main(args) == 0
    assert len(training_texts(open_dataset(out))) == 278  # and two of development


def test_workers_end_with_a_killed_build(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "big.jsonl", [words(i, 300) for i in range(3000)])
    process = subprocess.Popen([sys.executable, "-c", KILLABLE, str(source), str(tmp_path / "d")])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_dead_worker_is_reported(run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [corpus, "--val-documents", 10, "--vocab-size", 400, "--out", tmp_path / "d"]
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "encode", _die)
        code, _, err = run(*args)
    assert code == 3
    assert "worker process died" in err
    assert run(*args)[0] == 0


def _die(*_: object) -> None:
    os._exit(1)


def _disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_finished_build_is_left_alone(run: Run, corpus: Path, tmp_path: Path) -> None:
    args = [corpus, "--val-documents", 10, "--vocab-size", 400, "--out", tmp_path / "d"]
    assert run(*args)[0] == 0
    before = contents(tmp_path / "d"), (tmp_path / "d" / "dataset.json").stat().st_mtime_ns
    code, out, _ = run(*args)
    assert code == 0
    assert "already built" in out
    assert (contents(tmp_path / "d"), (tmp_path / "d" / "dataset.json").stat().st_mtime_ns) == before
    for changed in (["--vocab-size", 380], ["--shard-tokens", 999], ["--name", "other"], ["--field", "id"]):
        code, _, err = run(*args, *changed)
        assert code == 2
        assert "choose another --out or delete it" in err
    write_jsonl(corpus, CORPUS[:-1])
    assert "other sources" in run(*args)[2]
    assert contents(tmp_path / "d") == before[0]


def test_other_peoples_files_are_left_alone(run: Run, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    code, _, err = run(corpus, "--val-documents", 10, "--out", out)
    assert code == 2
    assert "not empty (thesis.txt)" in err
    assert contents(out) == {"thesis.txt": b"precious"}
    (tmp_path / "file").write_text("x")
    code, _, err = run(corpus, "--val-documents", 10, "--out", tmp_path / "file")
    assert code == 2
    assert "is not a folder" in err


def test_two_builds_do_not_share_a_folder(run: Run, corpus: Path, tmp_path: Path, tokenizer_model: Path) -> None:
    args = ["--val-documents", 10, "--tokenizer", tokenizer_model, "--out", tmp_path / "d"]
    with claimed(tmp_path / "d", {}):
        code, _, err = run(corpus, *args)
    assert code == 2
    assert "another build or fetch is at work there" in err


@needs_fineweb
def test_a_normalising_tokenizer_makes_the_text_that_it_gives_back(run: Run, tmp_path: Path) -> None:
    model = SHARED / "tokenizers" / "fineweb_1024_bpe.model"
    args = [SHARED / "fineweb_train_head.jsonl.zst", "--val", SHARED / "webpages.jsonl.zst", "--tokenizer", model]
    code, out, err = run(*args, "--out", tmp_path / "d", "--json")
    assert (code, err) == (0, "")
    dataset = open_dataset(tmp_path / "d")
    processor = spm.SentencePieceProcessor(model_file=str(model))
    with zstandard.open(SHARED / "webpages.jsonl.zst", "rt", encoding="utf-8", newline="\n") as file:
        texts = [json.loads(line)["text"] for line in file]
    expected = [processor.decode(processor.encode(text)) for text in texts]
    assert [d.decode() for d in dataset.canonical_text().documents] == expected
    changed = json.loads(out)["validation"]["changed_by_tokenizer"]
    assert changed == sum(a != b for a, b in zip(texts, expected, strict=True)) > 0
    path = dataset.val_shards[0].path
    ids = list(split_documents([(path, read_shard(path, 1024))], dataset.bos))
    assert all(np.array_equal(processor.encode(text), d) for text, d in zip(expected, ids, strict=True))


@needs_fineweb
def test_copies_that_differ_before_normalisation_only_are_dropped(run: Run, tmp_path: Path) -> None:
    validation = write_jsonl(tmp_path / "v.jsonl", ["one two\nthree", "\ufb01ne"])
    train = write_jsonl(tmp_path / "t.jsonl", ["one  two three ", "fine", "other"])
    model = SHARED / "tokenizers" / "fineweb_1024_bpe.model"
    code, out, _ = run(train, "--val", validation, "--tokenizer", model, "--out", tmp_path / "d", "--json")
    assert code == 0
    assert json.loads(out)["train"]["dropped_overlap"] == 2
    assert training_texts(open_dataset(tmp_path / "d")) == ["other"]


@needs_fineweb
@pytest.mark.parametrize("where", ["validation", "train"])
def test_a_lossy_tokenizer_is_refused(run: Run, tmp_path: Path, where: str) -> None:
    fine, broken = ["all is well"] * 3, ["all is well", "snake\u00e9_case"]
    validation = write_jsonl(tmp_path / "v.jsonl", broken if where == "validation" else fine)
    train = write_jsonl(tmp_path / "t.jsonl", ["another", *broken[where == "validation" :]])
    model = SHARED / "tokenizers" / "lossy_1024_bpe.model"
    code, _, err = run(train, "--val", validation, "--tokenizer", model, "--out", tmp_path / "d")
    assert code == 2
    assert f"{validation}: line 2" in err if where == "validation" else f"{train}: line 3" in err
    assert "'_' (byte 7 of the document)" in err or "'\u00e9' (byte 5 of the document)" in err
    assert not (tmp_path / "d").exists()


def test_normalisation_can_be_asked_for(run: Run, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", CORPUS)
    args = ["--val-documents", 10, "--vocab-size", 400, "--normalization", "nmt_nfkc", "--out", tmp_path / "d"]
    code, out, _ = run(source, *args, "--json")
    assert code == 0
    assert json.loads(out)["validation"]["changed_by_tokenizer"] == 10  # line breaks become spaces
    texts = [d.decode() for d in open_dataset(tmp_path / "d").canonical_text().documents]
    assert texts == [text.replace("\n", " ") for text in CORPUS[:10]]


def jsonl(*lines: bytes) -> dict[str, bytes]:
    return {"bad.jsonl": b"\n".join([json.dumps({"text": CORPUS[0]}).encode(), *lines]) + b"\n"}


ERRORS: dict[str, tuple[dict[str, bytes], list[str], int, str]] = {
    "missing file": ({}, ["nowhere.jsonl"], 2, "nowhere.jsonl: no such file or folder"),
    "missing glob": ({}, ["*.nothing"], 2, "*.nothing: matches no .jsonl"),
    "unknown extension": ({"a.csv": b"text\n"}, ["a.csv"], 2, "a.csv: unknown extension"),
    "folder without sources": ({"f/a.csv": b"text\n"}, ["f"], 2, "f: the folder holds no .jsonl"),
    "empty source": ({"a.jsonl": b""}, ["a.jsonl"], 2, "hold only 0 documents"),
    "too few to hold out": (jsonl(), ["bad.jsonl"], 2, "hold only 1 documents that are not empty; 2 cannot"),
    "nothing left to train on": (jsonl(b'{"text": "b"}'), ["bad.jsonl"], 2, "the sources hold no training document"),
    "malformed line": (jsonl(b'{"text": "b"}', b'{"text": '), ["bad.jsonl"], 2, "bad.jsonl: line 3: not valid JSON"),
    "not an object": (jsonl(b"[1]"), ["bad.jsonl"], 2, "bad.jsonl: line 2: not a JSON object"),
    "missing field": (jsonl(b'{"body": "b"}'), ["bad.jsonl"], 2, "line 2: no field 'text' among body; name one"),
    "not a string": (jsonl(b'{"text": 7}'), ["bad.jsonl"], 2, "line 2: field 'text' holds int, not a string"),
    "half a surrogate": (jsonl(b'{"text": "a\\ud800"}'), ["bad.jsonl"], 2, "line 2: character 1 is half of a"),
    "not UTF-8": (jsonl(b'{"text": "\xff"}'), ["bad.jsonl"], 2, "line 2: byte 10 is not UTF-8"),
    "not UTF-8 text": ({"a.txt": b"ab\xff"}, ["a.txt"], 2, "a.txt: document 1: byte 2 is not UTF-8"),
    "truncated zstd": (
        {"a.jsonl.zst": zstandard.compress(jsonl()["bad.jsonl"] * 9)[:-9]}, ["a.jsonl.zst"], 2, "the file is truncated",
    ),
    "not zstd": ({"a.jsonl.zst": b"plainly not"}, ["a.jsonl.zst"], 2, "a.jsonl.zst: not a sound zstd file"),
    "truncated gzip": (
        {"a.jsonl.gz": gzip.compress(jsonl()["bad.jsonl"] * 9)[:-9]}, ["a.jsonl.gz"], 2, "the file is truncated",
    ),
    "not gzip": ({"a.txt.gz": b"plainly not"}, ["a.txt.gz"], 2, "a.txt.gz: not a sound gzip file"),
    "a model of control characters": (
        {"m": b"\n\7\n\5\x80\x80abc" * 2, **jsonl()}, ["bad.jsonl", "--tokenizer", "m"], 2, "m: not a SentencePiece",
    ),
    "deep JSON": (jsonl(b"[" * 200_000), ["bad.jsonl"], 2, "line 2: not valid JSON"),
    "unknown extension in a glob": ({"f/a.csv": b""}, ["f/*"], 2, "f/*: matches no .jsonl"),
    "hidden files only": ({".f/a.jsonl": b""}, ["*/*.jsonl"], 2, "passed over: a.jsonl (hidden)"),
    "not parquet": ({"a.parquet": b"plainly not parquet"}, ["a.parquet"], 2, "not a sound parquet file"),
    "vocabulary over uint16": (jsonl(), ["bad.jsonl", "--vocab-size", "65537"], 2, "tokens are uint16"),
    "vocabulary over the text": (
        {"a.jsonl": b'{"text": "ab"}\n' * 4}, ["a.jsonl", "--vocab-size", "1024"], 2, "give --vocab-size 2",
    ),
    "vocabulary too small": (
        {"a.jsonl": b'{"text": "ab"}\n' * 4}, ["a.jsonl", "--vocab-size", "99"], 2, "needs at least",
    ),
    "no model": ({"m": b"no", **jsonl()}, ["bad.jsonl", "--tokenizer", "m"], 2, "m: not a SentencePiece model"),
    "model that holds more": (
        {"m": byte_model() + b"\xc2\x3e\x05learn", **jsonl()}, ["bad.jsonl", "--tokenizer", "m"], 2,
        "m: holds field 1000",
    ),
    "missing model": (jsonl(), ["bad.jsonl", "--tokenizer", "m"], 2, "m: no such file"),
    "two vocabularies": (
        {"m": b"no", **jsonl()}, ["bad.jsonl", "--tokenizer", "m", "--vocab-size", "9"], 2, "leave out --vocab-size",
    ),
    "no shard size": (jsonl(), ["bad.jsonl", "--shard-tokens", "0"], 2, "--shard-tokens 0 is not between"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_a_users_mistake_is_one_sentence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files, args, expected, message = ERRORS[name]
    monkeypatch.chdir(tmp_path)
    for file, data in files.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*args, "--val-documents", 2, "--out", "d")
    assert code == expected
    assert out == ""
    assert message in err
    assert err.startswith("pgolf: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_says_what_it_passes_over(run: Run, tmp_path: Path) -> None:
    """Read are any case of an extension and .gz; links, hidden files and all else are named and counted."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / ".ipynb_checkpoints", root / "sub", elsewhere):
        folder.mkdir(parents=True)
    write_jsonl(root / "B.JSONL", CORPUS[:30])
    write_jsonl(root / "sub" / "a.jsonl", CORPUS[60:90])
    (root / "c.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "c", CORPUS[30:60]).read_bytes()))
    write_jsonl(root / ".ipynb_checkpoints" / "a-checkpoint.jsonl", ["a copy"])
    write_jsonl(elsewhere / "d.jsonl", ["elsewhere"])
    (root / "dangling.jsonl").symlink_to("nowhere")
    (root / "linked").symlink_to(elsewhere)
    (root / "notes.md").write_text("# Notes")
    os.mkfifo(root / "fifo.jsonl")
    args = ["--val-documents", 5, "--vocab-size", 400, "--out"]
    code, _, err = run(root, *args, tmp_path / "d")
    assert code == 0
    assert training_texts(open_dataset(tmp_path / "d")) == CORPUS[5:90]
    assert err == (
        f"pgolf: {root}: 3 files taken; passed over: .ipynb_checkpoints (hidden), dangling.jsonl and 1 more (a link), "
        "fifo.jsonl (a FIFO), notes.md (of an unknown extension)\n"
    )
    code, _, err = run(root / "*", *args, tmp_path / "glob")
    assert code == 0
    assert "2 files taken; passed over: .ipynb_checkpoints (hidden), dangling.jsonl (a link), fifo.jsonl (no" in err
    for name in ("dangling.jsonl", "fifo.jsonl"):
        code, _, err = run(root / name, *args, tmp_path / "x")
        assert code == 2 and f"{name}: is " in err


def test_a_link_that_is_named_is_read(run: Run, corpus: Path, tmp_path: Path) -> None:
    """As the snapshots of a hub cache are."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.jsonl").symlink_to(corpus)
    for name in ("links/a.jsonl", "links/*.jsonl"):
        out = tmp_path / name.replace("*", "glob").replace("/", "-")
        assert run(tmp_path / name, "--val-documents", 5, "--vocab-size", 400, "--out", out)[0] == 0
        assert training_texts(open_dataset(out)) == CORPUS[5:]


@pytest.mark.parametrize("where", ["page", "footer", "end"])
def test_a_damaged_parquet_file_is_named_with_its_row_group(run: Run, tmp_path: Path, where: str) -> None:
    """And not the folder that is built."""
    path = tmp_path / "a.parquet"
    texts = [words(i, 40) for i in range(300)]
    options = {"compression": "snappy", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, **options)
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    at = {"page": column.data_page_offset + column.total_compressed_size // 2, "footer": len(data) - 100}
    if where == "end":
        del data[-3000:]
    else:
        data[at[where] : at[where] + 40] = bytes(40)
    path.write_bytes(data)
    code, _, err = run(path, "--val-documents", 2, "--vocab-size", 300, "--out", tmp_path / "d")
    assert code == 2
    assert err.startswith(f"pgolf: {path}: {'row group 1: ' if where == 'page' else ''}not a sound parquet file (")
    assert err.count("\n") == 1


def test_text_in_parquet_that_is_not_utf8_is_named(run: Run, tmp_path: Path) -> None:
    values = pa.StringArray.from_buffers(2, pa.py_buffer(np.int32([0, 2, 4])), pa.py_buffer(b"ab\xff\xfe"))
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    code, _, err = run(tmp_path / "a.parquet", "--val-documents", 1, "--out", tmp_path / "d")
    assert code == 2
    assert "row 2: byte 0 is not UTF-8" in err


def test_a_zstd_window_of_two_gigabytes_is_read(run: Run, tmp_path: Path) -> None:
    """What `zstd --long=31` writes when it reads from a pipe: it asks for all of the window."""
    texts = CORPUS[:40]
    parameters = zstandard.ZstdCompressionParameters(window_log=31, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(data) + packer.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes()).window_size == 1 << 31
    code, _, err = run(tmp_path / "a.jsonl.zst", "--val-documents", 2, "--vocab-size", 400, "--out", tmp_path / "d")
    assert (code, err) == (0, "")
    assert training_texts(open_dataset(tmp_path / "d")) == texts[2:]


@given(text=st.text(alphabet="ab \n", max_size=60), size=st.integers(1, 9))
def test_pieces_for_training_are_bounded_and_whole(text: str, size: int) -> None:
    """Their length, whatever the text; and where there are spaces, a cut falls before one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "PIECE_CHARACTERS", size)
        pieces = list(tokenize.pieces(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)
    for piece, after in pairwise(pieces):
        assert after[0] == " " or " " not in piece[1:]


def test_pieces_do_not_change_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenize.train(CORPUS, 400, "identity")
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 50)
    models = [spm.SentencePieceProcessor(model_proto=m) for m in (whole, tokenize.train(CORPUS, 400, "identity"))]
    pieces = [[model.id_to_piece(i) for i in range(400)] for model in models]
    assert pieces[0] == pieces[1]


def test_a_word_of_any_length_can_be_trained_on(run: Run, tmp_path: Path) -> None:
    """SentencePiece 0.2.1 ends the process at words over 65,535 characters."""
    source = write_jsonl(tmp_path / "a.jsonl", [*CORPUS[:20], "ab" * 40_000, *CORPUS[20:40]])
    assert run(source, "--val-documents", 2, "--vocab-size", 400, "--out", tmp_path / "d")[0] == 0
    assert "ab" * 40_000 in training_texts(open_dataset(tmp_path / "d"))


def test_bad_documents_are_skipped_and_counted(run: Run, tmp_path: Path) -> None:
    """Each kind, on both sides; the documents between them keep their order."""
    bad = [b'{"text": ', b"[1]", b'{"body": "b"}', b'{"text": 7}', b'{"text": "a\\ud800"}', b'{"text": "\xff"}']
    good = [json.dumps({"text": text}).encode() for text in CORPUS]
    lines = [bad[0], good[0], *bad[1:3], good[1], *good[2:100], *bad, *good[100:]]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    args = [source, "--val-documents", 2, "--vocab-size", 400, "--out", tmp_path / "d"]
    assert run(*args)[0] == 2
    code, out, _ = run(*args, "--skip-bad")
    assert code == 0
    assert "9 documents skipped that have no text or are not sound" in out
    dataset = open_dataset(tmp_path / "d")
    assert dataset.index is not None
    assert (dataset.index["text"]["skipped_bad"], dataset.index["train"]["skipped_bad"]) == (3, 6)
    assert [d.decode() for d in dataset.canonical_text().documents] == CORPUS[:2]
    assert training_texts(dataset) == CORPUS[2:]
    assert "other skip_bad" in run(*args)[2]


CASED = [f"Mr. {a.title()} met NASA's {b} AND \ue000{a.upper()}\ue001 iN Oslo" for a, b in zip(*2 * [iter(CORPUS)])]  # noqa: B905


@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_a_transform_leaves_the_canonical_text_alone(run: Run, tmp_path: Path, normalization: str) -> None:
    """Shards and tokenizer are made of transformed text; bits are per byte of the original one."""
    source = write_jsonl(tmp_path / "a.jsonl", CASED)
    args = [source, "--val-documents", 9, "--vocab-size", 500, "--normalization", normalization, "--out"]
    assert run(*args, tmp_path / "plain")[0] == run(*args, tmp_path / "cased", "--transform", "case-1")[0] == 0
    plain, cased = open_dataset(tmp_path / "plain"), open_dataset(tmp_path / "cased")
    assert (plain.transform, cased.transform) == (None, "case-1")
    text = cased.canonical_text()
    assert text.sha256 == plain.canonical_text().sha256
    if normalization == "identity":
        assert [d.decode() for d in text.documents] == CASED[:9]
    transform = TRANSFORMS["case-1"]
    processor = load_tokenizer(cased.tokenizer)
    path = cased.val_shards[0].path
    ids = list(split_documents([(path, read_shard(path, 500))], cased.bos))
    assert [processor.decode(i.tolist()) for i in ids] == [transform.apply(d.decode()) for d in text.documents]
    assert [transform.invert(t) for t in training_texts(cased)] == training_texts(plain)
    assert cased.index is not None and plain.index is not None
    assert cased.index["train"]["bytes"] == plain.index["train"]["bytes"]
    assert not any(processor.id_to_piece(i).lower() != processor.id_to_piece(i) for i in range(259, 500))


def test_an_unknown_character_behind_a_transform_is_placed_in_the_document(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "m"
    with model.open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(["ab \ue000"] * 9), model_writer=file, vocab_size=8, hard_vocab_limit=False,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=3,
        )  # fmt: skip
    source = write_jsonl(tmp_path / "a.jsonl", ["ab", "A Bx", "ab"])
    args = [source, "--val-documents", 2, "--tokenizer", model, "--transform", "case-1", "--out", tmp_path / "d"]
    assert "line 2: the tokenizer is lossy: it does not know 'x' (byte 3 of the document)" in run(*args)[2]


def test_any_bytes_in_names(run: Run, tmp_path: Path) -> None:
    """A file name need not be text; it can be built from, built to and complained about, on any terminal."""
    source = write_jsonl(tmp_path / os.fsdecode(b"\xff\xfe.jsonl"), CORPUS)
    model_options = ["--val-documents", 5, "--vocab-size", 400, "--out"]
    out = tmp_path / os.fsdecode(b"d\x80")
    assert run(source, *model_options, out)[0] == 0
    assert "already built" in run(source, *model_options, out)[1]
    dataset = open_dataset(out)
    assert dataset.name == out.name
    assert training_texts(dataset) == CORPUS[5:]
    code, _, _ = run(source, "--val-documents", 5, "--tokenizer", dataset.tokenizer, "--out", tmp_path / "e")
    assert code == 0
    start = [sys.executable, "-m", "pgolf", "data", "build", str(source), "--val-documents", "5"]
    command = [*start, "--dev-documents", "0", "--vocab-size", "400", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\udc80: already built" in done.stdout
    command = [*start, "--tokenizer", str(source), "--out", str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.endswith(b"\\udcff\\udcfe.jsonl: not a SentencePiece model\n")


@pytest.mark.parametrize("name", ["val_documents.jsonl.part", "val_000000.bin.part", "train_000000.bin.part"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_lies_under_a_part_name_is_not_written_to(
    run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """A folder from elsewhere, with a build that goes on in it."""
    out, victim = tmp_path / "d", tmp_path / "victim"
    victim.write_bytes(b"precious" * 10_000)
    args = [corpus, "--val-documents", 10, "--vocab-size", 400, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(build_module.Builder, "validate", _disk_full)
        assert run(*args)[0] == 3
    (out / name).symlink_to(victim) if kind == "link" else os.mkfifo(out / name)
    assert run(*args)[0] == 0
    assert victim.read_bytes() == b"precious" * 10_000
    assert training_texts(open_dataset(out)) == CORPUS[10:]
    assert all(path.is_file() and not path.is_symlink() for path in out.iterdir())


def test_a_checkpoint_is_not_taken_up_through_a_link(
    run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unfinished shard is appended to, so it must be there itself."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(build_module, "CHECKPOINT_SECONDS", 0.0)
    out, victim = tmp_path / "d", tmp_path / "victim"
    args = [corpus, "--val-documents", 10, "--vocab-size", 400, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(build_module.Builder, "finish", _disk_full)
        close = ShardWriter.close_shard
        patch.setattr(ShardWriter, "close_shard", lambda self: self.prefix == "train" or close(self))
        assert run(*args)[0] == 3
    part = out / "train_000000.bin.part"
    part.rename(victim)
    part.symlink_to(victim)
    before = victim.read_bytes()
    code, _, err = run(*args)
    assert code == 3 and "train_000000.bin.part: is a link" in err
    assert victim.read_bytes() == before


@pytest.mark.parametrize("content", ["[" * 200_000, "{", "[]", '{"settings": {}, "position": "x", "more": 1}'])
def test_a_damaged_checkpoint_is_one_sentence(run: Run, corpus: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "build.json").write_text(content)
    code, _, err = run(corpus, "--val-documents", 10, "--out", tmp_path / "d")
    assert code == 3 and "build.json: damaged" in err and err.count("\n") == 1


def test_an_empty_out_is_refused(run: Run, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(corpus, "--val-documents", 10, "--out", "")
    assert stop.value.code == 2
    assert "the name of the folder is empty" in capsys.readouterr().err
    assert run(corpus, "--val-documents", 10, "--out", "/")[0] == 2


def test_a_late_mistake_leaves_nothing_behind(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    source = write_jsonl(tmp_path / "a.jsonl", CORPUS)
    with source.open("a") as file:
        file.write('{"text": 1.5}\n')
    monkeypatch.setattr(build_module, "SAMPLE_CHARACTERS", 20_000)
    args = ["--val-documents", 2, "--vocab-size", 400, "--shard-tokens", 5000, "--out", tmp_path / "d"]
    code, _, err = run(source, *args)
    assert code == 2
    assert "line 301: field 'text' holds float, not a string" in err
    assert not (tmp_path / "d").exists()


def test_parquet_without_the_field_is_named(run: Run, tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    code, _, err = run(tmp_path / "a.parquet", "--val-documents", 1, "--out", tmp_path / "d")
    assert code == 2
    assert "no field 'text' among body, n; name one of them with --field" in err
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    code, _, err = run(tmp_path / "b.parquet", "--val-documents", 1, "--out", tmp_path / "d")
    assert code == 2
    assert "row 2: field 'text' holds null" in err


def test_a_hub_that_cannot_be_reached(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    code, _, err = run("owner/name", "--val-documents", 1, "--out", tmp_path / "d")
    assert code == 3
    assert "owner/name: no such file or folder, and the hub cannot be asked for it (no route)" in err
    assert not (tmp_path / "d").exists()


def test_a_stream_that_breaks_can_be_taken_up_again(
    run: Run, tmp_path: Path, tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "ROWS", 10)
    monkeypatch.setattr(build_module, "CHECKPOINT_SECONDS", 0.0)
    broken = True

    def rows() -> Any:
        for i, text in enumerate(CORPUS):
            if i == 200 and broken:
                raise ConnectionError("reset by peer")
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: SimpleNamespace(sha="0" * 40))
    args = ["name", "--val-documents", 9, "--tokenizer", tokenizer_model, "--out", tmp_path / "d"]
    code, _, err = run(*args)
    assert code == 3
    assert "reset by peer); run the same command again" in err
    assert json.loads((tmp_path / "d" / "build.json").read_text())["position"] > 9
    broken = False
    assert run(*args)[0] == 0
    assert training_texts(open_dataset(tmp_path / "d")) == CORPUS[9:]


@pytest.mark.parametrize(("source", "module"), [("owner/name", "datasets"), ("a.parquet", "pyarrow.parquet")])
def test_what_is_not_installed_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run(source, "--val-documents", 1, "--out", "d")
    assert code == 3
    assert "pip install 'pgolf[data]'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["", "build", "demo"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", *command.split(), "--help"])
    assert stop.value.code == 0
    assert f"example:\n  pgolf data {command}" in capsys.readouterr().out
