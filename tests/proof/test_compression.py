"""Text goes through the code and comes back, at the length that the scorer claims; nothing else ends in a traceback."""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import ALL, CAUSAL, COUNTS, DOCUMENTS, ROOT, UNIFORM, MakeArtifact
from pgolf import rules
from pgolf.artifact import Artifact, Manifest
from pgolf.cli.main import main
from pgolf.errors import Refused, UsageError
from pgolf.proof import compression
from pgolf.proof.compression import Packet
from pgolf.sandbox.wire import Ids
from pgolf.score import schedule, tokenization
from pgolf.score.devices import Runtime
from pgolf.score.likelihood import negative_log_likelihood
from pgolf.score.schedule import Step, Targets

VOCAB, BOS = 12, 1

BFLOAT16 = CAUSAL.replace("return x @ self.head", "return x.bfloat16() @ self.head.bfloat16()")

# A little noise, other in every process: too little to be seen in the size.
NOISY = CAUSAL.replace("x @ self.head", "x @ self.head + 0.01 * torch.randn(VOCAB)").replace(
    "import torch", "import time, torch\ntorch.manual_seed(time.time_ns())"
)

AWKWARD = "Ünïcödé 漢字 русский 👩‍👩‍👧‍👦🏳️‍🌈\r\n\t <s>\n" + "several windows of a text that goes on and on. " * 3


class Local:
    """A predictor without sandbox: it runs in this process."""

    def __init__(self, source: str, lanes: int) -> None:
        namespace: dict[str, Any] = {}
        exec(source.replace("VOCAB", str(VOCAB)), namespace)
        self.predictor = namespace["load"](None, torch.device("cpu"), lanes, 0)

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_deadline(self, deadline: float) -> None:
        pass

    def load(self, plan: int | None = None) -> int:
        return 0

    def step(self, step: Step) -> Tensor:
        ids, lane = (torch.from_numpy(numbers.astype("int64")) for numbers in (step.shown, step.lane))
        logits: Tensor = self.predictor.step(ids, lane)
        return logits


def local_artifact(layout: str = "documents", lanes: int = 3) -> Artifact:
    """An artifact with nothing but a manifest."""
    manifest = Manifest("t", "t", "laptop", VOCAB, BOS, "bytes", "step", layout=layout, lanes=lanes)
    return Artifact("0" * 64, 0, manifest, {})


def scored_bits(artifact: Artifact, source: str, documents: Sequence[Ids]) -> float:
    """The code length as the scorer finds it."""
    manifest = artifact.manifest
    targets, predictor, nats = Targets.of(manifest, documents), Local(source, manifest.lanes), 0.0
    walk = schedule.steps(manifest, schedule.count(manifest, len(documents), len(targets.tokens)))
    step = schedule.begin(walk)
    while step is not None:
        following = targets.tokens[targets.at(step)]
        nats += float(negative_log_likelihood(predictor.step(step), torch.from_numpy(following).long()).sum())
        step = schedule.advance(walk, following)
    return nats / math.log(2)


TOKENS = st.integers(0, VOCAB - 1).filter(lambda token: token != BOS)
TEXTS = st.lists(st.lists(TOKENS, max_size=40), min_size=1, max_size=5)
FORMS = st.tuples(
    st.sampled_from([CAUSAL, BFLOAT16, COUNTS]), st.sampled_from(["documents", "parts"]), st.integers(1, 7)
)


def encode(
    source: str, artifact: Artifact, documents: Sequence[Ids], most_steps: float = math.inf
) -> compression.Compressed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "Predictor", lambda *_: Local(source, artifact.manifest.lanes))
        texts = [b"x"] * len(documents)
        return compression.encode(artifact, texts, documents, Runtime(), lambda steps, *_: steps < most_steps)


def decode(source: str, artifact: Artifact, packet: Packet) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "Predictor", lambda *_: Local(source, artifact.manifest.lanes))
        return [ids.tolist() for ids in compression.decode(artifact, packet, Runtime())]


@settings(max_examples=25, deadline=None)
@given(form=FORMS, texts=TEXTS)
def test_what_went_in_comes_out_at_its_code_length(form: tuple[str, str, int], texts: list[list[int]]) -> None:
    """decode(encode(x)) == x in both layouts, and the code is as long as the scorer's sum."""
    source, layout, lanes = form
    artifact = local_artifact(layout, lanes)
    documents = [np.array(text, dtype=np.int32) for text in texts]
    done = encode(source, artifact, documents)
    back = decode(source, artifact, done.packet)
    assert [t for segment in back for t in segment] == [t for text in texts for t in (*text, BOS)]
    bits = scored_bits(artifact, source, documents)
    assert done.entropy_bits == pytest.approx(bits, rel=1e-5)
    assert 8 * len(done.packet.code) <= 1.001 * bits + 64


@settings(max_examples=25, deadline=None)
@given(form=FORMS, texts=TEXTS, steps=st.integers(0, 30))
def test_first_steps_come_back_too(form: tuple[str, str, int], texts: list[list[int]], steps: int) -> None:
    """A code that stops after some steps gives the beginnings of what the lanes were in."""
    source, layout, lanes = form
    artifact = local_artifact(layout, lanes)
    documents = [np.array(text, dtype=np.int32) for text in texts]
    packet = encode(source, artifact, documents, steps).packet
    assert packet.steps <= steps
    targets = Targets.of(artifact.manifest, documents)
    for start, segment in zip(targets.starts, decode(source, artifact, packet), strict=False):
        assert segment == targets.tokens[start : start + len(segment)].tolist()


@settings(max_examples=25, deadline=None)
@given(form=FORMS, texts=TEXTS, data=st.data())
def test_damaged_code_ends(form: tuple[str, str, int], texts: list[list[int]], data: st.DataObject) -> None:
    """A code that was cut, flipped or made up decodes to no more than was promised, or is refused."""
    source, layout, lanes = form
    artifact = local_artifact(layout, lanes)
    packet = encode(source, artifact, [np.array(text, dtype=np.int32) for text in texts]).packet
    code = bytearray(packet.code)
    if data.draw(st.booleans()) and code:
        code[data.draw(st.integers(0, len(code) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        code = bytearray(data.draw(st.binary(max_size=40)))
        code += bytes(-len(code) % 4)
    try:
        back = decode(source, artifact, Packet(**{**vars(packet), "code": bytes(code)}))
    except Refused as error:
        assert "not deterministic" in str(error)
    else:
        assert sum(map(len, back)) <= packet.tokens


PACKET = Packet("ab" * 32, "cd" * 32, 2, 9, 20, 5, 7, "torch 1, cpu", b"12345678")


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
        {"steps": 10},
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
    artifact = make_artifact(BFLOAT16, layout="parts", lanes=2)
    text, packed, back = tmp_path / "text", tmp_path / "text.pgz", tmp_path / "back"
    text.write_text(AWKWARD, encoding="utf-8", newline="")
    assert main(["compress", str(artifact), str(text), "-o", str(packed)]) == 0
    printed = capsys.readouterr().out
    assert f"{text.stat().st_size:,} bytes" in printed and f"{packed.stat().st_size:,} bytes" in printed
    assert "log-loss" in printed and "bits per byte" in printed
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


def prove(path: Path, dataset: Path, *amount: str) -> int:
    return main(["prove", str(path), "--data", str(dataset), *amount, "--device", "cpu", "--no-sandbox"])


@pytest.mark.parametrize(
    ("layout", "amount"), [("documents", ("--bytes", "300")), ("parts", ("--all",))][: 2 if ALL else 1]
)
def test_recorded_score_is_proven(
    make_artifact: MakeArtifact, dataset: Path, capsys: pytest.CaptureFixture[str], layout: str, amount: tuple[str, ...]
) -> None:
    """A predictor that learns from what it is shown does so on both sides; the figures go into the score's record."""
    path = make_artifact(COUNTS, layout=layout)
    assert prove(path, dataset, *amount) == 2
    assert "run `pgolf score" in capsys.readouterr().err
    assert main(["score", str(path), "--data", str(dataset), "--device", "cpu", "--no-sandbox"]) == 0
    capsys.readouterr()
    assert prove(path, dataset, *amount) == 0
    record = json.loads(path.with_suffix(".score.json").read_text())
    jsonschema.validate(record, json.loads((ROOT / "docs" / "record.schema.json").read_text()))
    proof = record["proof"]
    assert record["status"] == proof["status"] == "ok"
    assert proof["code_bits"] <= 1.001 * proof["recorded_bits"] + 64
    if amount == ("--all",):
        assert proof["bytes"] == record["bytes"] and proof["tokens"] == record["tokens"]
    else:
        assert 0 < proof["bytes"] < record["bytes"] and proof["steps"] % rules.CODE_EVERY == 0
    out = capsys.readouterr().out
    assert f"{proof['bytes']:,} of" in out
    assert f"{record['bpb']:.6f} bpb, as recorded" in out and "not proven  that the score is eligible" in out
    assert proof["bpb"] == record["bpb"]


@pytest.mark.parametrize("source", [NOISY, COUNTS.replace("self.counts[ids].log()", "(2.0 * self.counts[ids].log())")])
def test_what_cannot_be_proven(
    make_artifact: MakeArtifact, dataset: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    """A predictor whose logits differ from process to process, and a record that claims too few bits."""
    path = make_artifact(source)
    assert main(["score", str(path), "--data", str(dataset), "--device", "cpu", "--no-sandbox"]) == 0
    place = path.with_suffix(".score.json")
    record = json.loads(place.read_text())
    if source != NOISY:
        less = {name: 0.9 * record[name] for name in ("bpb", "nats_per_token")}
        bits = [0.9 * bits for bits in record["code"]["bits"]]
        place.write_text(json.dumps({**record, **less, "code": {**record["code"], "bits": bits}}))
    capsys.readouterr()
    assert prove(path, dataset, "--all") == 1
    error = capsys.readouterr().err
    assert error.startswith("refused: not proven: ") and error.count("\n") == 1 and "no score wrote" not in error
    assert json.loads(place.read_text())["proof"]["status"] == "refused"


def short(record: dict[str, Any]) -> dict[str, Any]:
    """The bits of the first steps, and a score that they would be all of."""
    bits = record["code"]["bits"][:1]
    bpb = bits[0] / record["bytes"]
    nats = bits[0] * math.log(2) / record["tokens"]
    return {"bpb": bpb, "nats_per_token": nats, "steps": rules.CODE_EVERY, "code": {"every": 64, "bits": bits}}


def sample(record: dict[str, Any]) -> dict[str, Any]:
    size = len(DOCUMENTS[0].encode())
    bpb = record["bpb"] * record["bytes"] / size
    return {"documents": 1, "bytes": size, "bpb": bpb, "eligible": True, "reasons": []}


LIES: list[tuple[Any, str]] = [
    (lambda r: {"bpb": 0.5}, "its bpb does not follow"),
    (lambda r: {"bpb": 0.5, "nats_per_token": 0.5 * r["nats_per_token"] / r["bpb"]}, "code.bits are not those"),
    (lambda r: {"bpb": 2 * r["bpb"], "nats_per_token": 2 * r["nats_per_token"], "steps": 128}, "code.bits has"),
    (lambda r: {"tokens": 2 * r["tokens"], "nats_per_token": 0.5 * r["nats_per_token"]}, "its tokens is"),
    (lambda r: {"code": {**r["code"], "every": 1 << 40}}, "code.every is"),
    (lambda r: {"code": {"every": 64, "bits": []}}, "code.bits has 0 entries"),
    (lambda r: {"code": {"every": 64, "bits": r["code"]["bits"][::-1]}}, "code.bits are not those"),
    (lambda r: {"code": None}, "without code"),
    (lambda r: {"form": "window", "code": None}, "its form is"),
    (lambda r: {"documents": -1}, "negative"),
    (lambda r: {"bytes": None}, "bytes is missing"),
    (lambda r: {"data": None}, "data is missing"),
    (lambda r: {"eligible": True}, "eligible and has reasons"),
    (lambda r: {"eligible": True, "reasons": [], "isolation": "bubblewrap"}, "eligible, although: the text has"),
    (lambda r: {"submission": {"name": "test", "author": "somebody else"}}, "its submission is"),
    (sample, "only a sample of the documents"),
    (short, "its steps is 64"),
]


def test_a_record_by_hand_is_not_proven(
    make_artifact: MakeArtifact, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What contradicts itself, the text or the artifact is refused by the name of its field, with exit code 1."""
    path = make_artifact(COUNTS, lanes=2)
    assert main(["score", str(path), "--data", str(dataset), "--device", "cpu", "--no-sandbox"]) == 0
    place = path.with_suffix(".score.json")
    record = json.loads(place.read_text())
    assert len(record["code"]["bits"]) > 2
    for lie, sentence in LIES:
        place.write_text(json.dumps(record | lie(record)))
        capsys.readouterr()
        assert prove(path, dataset, "--bytes", "1") == 1, sentence
        error = capsys.readouterr().err
        assert error.startswith("refused: not proven: no score wrote this record: ") and sentence in error
        assert json.loads(place.read_text())["proof"]["status"] == "refused"


def test_window_form_cannot_be_compressed(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """It needs tokens before their logits, which a decoder does not have."""
    manifest = Manifest("t", "t", "laptop", VOCAB, BOS, "bytes", "window", context=8)
    with pytest.raises(UsageError, match="window form"):
        compression.compress(Artifact("0" * 64, 0, manifest, {}), [b"x"], Runtime())


def test_ids_that_are_no_bytes_are_refused() -> None:
    """A vocabulary may be larger than 256 bytes and BOS; what lies above has no text."""
    ids = np.array([104, 105], dtype=np.int32)
    limit = contextlib.nullcontext(math.inf)
    assert tokenization.decode(local_artifact(), [ids, ids[:0]], [2, 0], Runtime(), limit) == [b"hi", b""]
    with pytest.raises(Refused, match="document 0: id 305 is no byte"):
        tokenization.decode(local_artifact(), [ids + 200], [2], Runtime(), limit)
