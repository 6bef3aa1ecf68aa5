"""Text goes through the code and comes back, at the length that the scorer claims; nothing else ends in a traceback."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import CAUSAL, UNIFORM, MakeArtifact
from pgolf import rules
from pgolf.artifact import Artifact, Manifest, read
from pgolf.cli import main
from pgolf.data.dataset import CanonicalText
from pgolf.errors import Refused, UsageError
from pgolf.proof import compression as codec
from pgolf.proof import prove
from pgolf.proof.compression import Packet
from pgolf.sandbox.wire import Ids
from pgolf.score import tokenization as tokenizer
from pgolf.score.predictors import Question, negative_log_likelihood
from pgolf.score.windows import Plan

VOCAB, BOS = 12, 1
FIELDS: dict[str, Any] = {"name": "t", "author": "t", "track": "laptop", "vocab_size": VOCAB, "bos": BOS}

# Counts which token follows which, in the rounds that were scored.
COUNTS = """
import torch

class Counts:
    def __init__(self):
        self.counts = torch.ones(VOCAB, VOCAB)

    def predict(self, documents):
        for ids in documents:
            yield torch.log(self.counts[ids])

    def update(self, documents):
        for ids in documents:
            self.counts.index_put_((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)

def load(root, device):
    return Counts()
"""

BFLOAT16 = CAUSAL.replace("return x @ self.head", "return x.bfloat16() @ self.head.bfloat16()")

# A little noise, other in every process: too little to be seen in the size.
MOODY = CAUSAL.replace("x @ self.head", "x @ self.head + 0.01 * torch.randn(VOCAB)").replace(
    "import torch", "import time, torch\ntorch.manual_seed(time.time_ns())"
)

# Its rows favour the token that comes next, where the window shows it.
PEEKS = UNIFORM.replace(
    "return torch.zeros(*ids.shape, VOCAB)",
    "return 3.0 * torch.nn.functional.one_hot(ids.roll(-1, 1), VOCAB).float()",
)

AWKWARD = "Ünïcödé 漢字 русский 👩‍👩‍👧‍👦🏳️‍🌈\r\n\t <s>\n" + "several windows of a text that goes on and on. " * 3


class Local:
    """A lane without a box: the predictor runs in this process."""

    def __init__(self, source: str) -> None:
        namespace: dict[str, Any] = {}
        exec(source.replace("VOCAB", str(VOCAB)), namespace)
        self.predictor = namespace["load"](None, torch.device("cpu"))
        self.worker = SimpleNamespace(channel=SimpleNamespace(deadline=0.0))
        self.logits = torch.empty(0)

    def ask(self, number: int, slot: int, question: Question) -> None:
        logits = self.predictor(torch.from_numpy(question.ids.astype("int64")))
        assert question.count == 1
        self.logits = logits[torch.arange(len(logits)), torch.from_numpy(question.first.astype("int64"))]

    def answer(self, number: int, slot: int, rows: int) -> Tensor:
        assert len(self.logits) == rows
        return self.logits

    def show(self, number: int, documents: Sequence[Ids], last: bool = False) -> list[Tensor]:
        [block] = self.predictor.predict([torch.from_numpy(ids.astype("int64")) for ids in documents])
        return [block[-1:] if last else block]

    def update(self, documents: Sequence[Ids]) -> None:
        self.predictor.update([torch.from_numpy(ids.astype("int64")) for ids in documents])


def scored_bits(manifest: Manifest, source: str, documents: Sequence[Ids]) -> float:
    """The code length by the plan, with whole windows and rounds."""
    lane = Local(source)
    plan = Plan.separate(manifest, documents)
    nats = 0.0
    for number, pieces in enumerate(plan.rounds):
        for start, length, first in zip(pieces.start, pieces.length, pieces.first, strict=True):
            ids = plan.stream[start : start + length]
            if manifest.form == "streaming":
                [logits] = lane.show(number, [ids])
            else:
                logits = lane.predictor(torch.from_numpy(ids.astype("int64"))[None])[0]
            targets = torch.from_numpy(plan.stream[start + first + 1 : start + length + 1].astype("int64"))
            nats += float(negative_log_likelihood(logits[first:], targets).sum())
        if manifest.adapts:
            lane.update(plan.show(number))
    return nats / math.log(2)


def local_artifact(**fields: Any) -> Artifact:
    """An artifact with nothing but a manifest."""
    return Artifact("0" * 64, 0, Manifest(**FIELDS, tokenizer="bytes", **fields), {})


TOKENS = st.integers(0, VOCAB - 1).filter(lambda token: token != BOS)
TEXTS = st.lists(st.lists(TOKENS, max_size=60), min_size=1, max_size=5)
FORMS = st.sampled_from(
    [
        (CAUSAL, {"context": 8}),
        (CAUSAL, {"context": 1}),
        (CAUSAL, {"context": 16, "stride": 5}),
        (BFLOAT16, {"context": 64, "window": "document"}),
        (COUNTS, {"form": "streaming", "round": 7, "adapts": True}),
        (COUNTS, {"form": "streaming", "round": 1000}),
    ]
)


@settings(max_examples=25, deadline=None)
@given(form=FORMS, texts=TEXTS)
def test_what_went_in_comes_out_at_its_code_length(form: tuple[str, dict[str, Any]], texts: list[list[int]]) -> None:
    """decode(encode(x)) == x for every form of predictor, and the code is as long as the scorer's sum."""
    source, fields = form
    artifact = local_artifact(**fields)
    documents = [np.array(text, dtype=np.int32) for text in texts]
    code = codec.encode(artifact, Local(source), documents)  # type: ignore[arg-type]
    tokens = sum(map(len, documents)) + len(documents)
    back = codec.decode(artifact, Local(source), code, len(documents), tokens)  # type: ignore[arg-type]
    assert [ids.tolist() for ids in back] == texts
    bits = scored_bits(artifact.manifest, source, documents)
    noise = 0.01 if source == BFLOAT16 else 0.001
    assert 8 * len(code) <= (1 + noise) * bits + 64


@settings(max_examples=25, deadline=None)
@given(form=FORMS, texts=TEXTS, data=st.data())
def test_damaged_code_ends(form: tuple[str, dict[str, Any]], texts: list[list[int]], data: st.DataObject) -> None:
    """A code that was cut, flipped or made up decodes to something of the promised size, or is refused."""
    source, fields = form
    artifact = local_artifact(**fields)
    documents = [np.array(text, dtype=np.int32) for text in texts]
    code = bytearray(codec.encode(artifact, Local(source), documents))  # type: ignore[arg-type]
    if data.draw(st.booleans()) and code:
        code[data.draw(st.integers(0, len(code) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        code = bytearray(data.draw(st.binary(max_size=40)))
        code += bytes(-len(code) % 4)
    tokens = sum(map(len, documents)) + len(documents)
    try:
        back = codec.decode(artifact, Local(source), bytes(code), len(documents), tokens)  # type: ignore[arg-type]
    except Refused as error:
        assert "not deterministic" in str(error)
    else:
        assert sum(map(len, back)) + len(back) == tokens


PACKET = Packet("ab" * 32, "cd" * 32, 2, 9, 20, "torch 1, cpu", b"12345678")


def test_packet_round_trip() -> None:
    """What is written is read."""
    assert Packet.decode(PACKET.encode(), "x.pgz") == PACKET


@given(data=st.data())
def test_damaged_packets_are_refused(data: st.DataObject) -> None:
    """Cut, lengthened, flipped, or any bytes at all: one sentence."""
    file = PACKET.encode()
    at = data.draw(st.integers(0, len(file) - 1))
    flipped = file[:at] + bytes([file[at] ^ data.draw(st.integers(1, 255))]) + file[at + 1 :]
    for damaged in (flipped, file[:at], file + b"\0\0\0\0", data.draw(st.binary(max_size=200))):
        with pytest.raises(UsageError, match=r"^x\.pgz: [^\n]+$"):
            Packet.decode(damaged, "x.pgz")


@pytest.mark.parametrize(
    "lie",
    [
        {"documents": 0},
        {"documents": 10},
        {"tokens": rules.CODED_TOKENS + 1},
        {"text_bytes": (1 << 32) - 1},
        {"environment": "two\nlines"},
        {"code": b"123"},
    ],
)
def test_lying_packets_are_refused(lie: dict[str, Any]) -> None:
    """A sound checksum does not make a claim believable."""
    with pytest.raises(UsageError, match=r"^x\.pgz: "):
        Packet.decode(Packet(**{**vars(PACKET), **lie}).encode(), "x.pgz")


def test_file_through_the_command_line(
    make_artifact: MakeArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bfloat16 model with SentencePiece compresses an awkward file, gives it back, and refuses what it cannot."""
    artifact = make_artifact(BFLOAT16, context=16)
    text, packed, back = tmp_path / "text", tmp_path / "text.pgz", tmp_path / "back"
    text.write_text(AWKWARD, encoding="utf-8", newline="")
    assert main(["compress", str(artifact), str(text), "-o", str(packed)]) == 0
    printed = capsys.readouterr().out
    assert f"{text.stat().st_size:,} bytes" in printed and f"{packed.stat().st_size:,} bytes" in printed
    assert "scored" in printed and "bits per byte" in printed
    assert main(["decompress", str(artifact), str(packed), "-o", str(back)]) == 0
    assert back.read_bytes() == text.read_bytes()
    back.unlink()

    packet = Packet.decode(packed.read_bytes(), "")
    other = make_artifact(UNIFORM, name="other.zst")
    elsewhere = tmp_path / "elsewhere.pgz"
    elsewhere.write_bytes(Packet(**{**vars(packet), "environment": "torch 1.0, abacus"}).encode())
    binary = tmp_path / "binary"
    binary.write_bytes(b"abc\xff")
    capsys.readouterr()
    for command, code, sentence in (
        (["decompress", other, packed, "-o", back], 2, "was compressed with the artifact"),
        (["decompress", artifact, elsewhere, "-o", back], 3, "torch 1.0, abacus"),
        (["decompress", artifact, text, "-o", back], 2, "is not a file that `pgolf compress` wrote"),
        (["decompress", artifact, tmp_path / "none", "-o", back], 2, "No such file"),
        (["decompress", artifact, packed, "-o", packed], 2, "would overwrite"),
        (["compress", artifact, binary, "-o", back], 2, "not UTF-8 (byte 3)"),
        (["compress", artifact, text, "-o", tmp_path / "no" / "folder"], 2, "no such folder"),
    ):
        assert main([str(part) for part in command]) == code
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert not back.exists() and not list(tmp_path.glob("*.part"))


def test_proof_of_a_streaming_artifact(
    make_artifact: MakeArtifact, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A predictor that learns from round to round does so on both sides; the figures go into the score's record."""
    fields = {"form": "streaming", "context": None, "round": 64, "adapts": True}
    path = make_artifact(COUNTS, tokenizer="bytes", vocab_size=257, bos=256, **fields)
    scored = path.with_suffix(".score.json")
    scored.write_text(json.dumps({"status": "ok", "artifact": {"sha256": read(path, 10**6).sha256}}))
    arguments = ["prove", str(path), "--data", str(dataset), "--bytes", "180", "--seed", "3"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    record = json.loads(scored.read_text())
    proof = record["proof"]
    assert record["status"] == proof["status"] == "ok" and proof["seed"] == 3
    assert proof["bytes"] >= 180 and f"{proof['code_bytes']:,} bytes" in table
    assert proof["code_bytes"] <= 1.001 * proof["scored_bytes"] + 8
    assert proof["scored_bytes"] < 0.99 * proof["tokens"]  # it did learn: log2(257) is over 8
    assert set(proof["seconds"]) == {"score", "compress", "decompress", "total"}
    assert not path.with_suffix(".proof.json").exists()


@pytest.mark.parametrize(("source", "sentence"), [(MOODY, "not deterministic"), (PEEKS, "more than its scored code")])
def test_what_cannot_be_proven(
    make_artifact: MakeArtifact, dataset: Path, capsys: pytest.CaptureFixture[str], source: str, sentence: str
) -> None:
    """A predictor that computes other rows each time, and one that was scored with the future at hand."""
    path = make_artifact(source, tokenizer="bytes", vocab_size=257, bos=256)
    assert main(["prove", str(path), "--data", str(dataset), "--bytes", "100", "--seed", "1"]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    record = json.loads(path.with_suffix(".proof.json").read_text())
    assert record["proof"]["status"] == "refused" and sentence in record["proof"]["reason"]


def test_documents_are_drawn_by_seed() -> None:
    """Enough of them, short ones first, other ones for another seed; too little text is told."""
    text = CanonicalText((*(b"x" * (number % 50) for number in range(1000)), b"y" * 5000))
    one, two = (prove.draw(text, 2000, np.random.default_rng(seed)) for seed in (1, 2))
    assert one == prove.draw(text, 2000, np.random.default_rng(1)) != two
    for drawn in (one, two):
        sizes = [len(text.documents[number]) for number in drawn]
        assert 2000 <= sum(sizes) < 2050 and drawn == sorted(set(drawn)) and max(sizes) < 500
        assert min(drawn) < 250 and max(drawn) > 750
    assert 1000 in prove.draw(text, text.bytes, np.random.default_rng(1))
    with pytest.raises(UsageError, match="only"):
        prove.draw(text, text.bytes + 1, np.random.default_rng(1))


def test_ids_that_are_no_bytes_are_refused() -> None:
    """A vocabulary may be larger than 256 bytes and BOS; what lies above has no text."""
    ids = np.array([104, 105], dtype=np.int32)
    assert list(tokenizer.decode(local_artifact(), [ids, ids[:0]], [2, 0], 0.0, isolated=True)) == [b"hi", b""]
    with pytest.raises(Refused, match="document 0: id 305 is no byte"):
        list(tokenizer.decode(local_artifact(), [ids + 200], [2], 0.0, isolated=True))
